"""How fast are PLOT rows retrieved, and how often are they there as the corpus grows?"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numba
import numpy as np
import numpy.typing as npt
import torch
from pydantic import JsonValue

import hmi_kernels
from benchmarks.arguments import Arguments, read_arguments, read_texts
from benchmarks.peers.gathered_plot import GatheredPlot
from benchmarks.peers.numba_plot import NumbaPlot
from benchmarks.plot_lookup import lookup_case
from benchmarks.plot_opening import measure_large_table
from benchmarks.result import BenchmarkResult, Case, Curve, Quantity, Ratio, System
from hmi_engine.demo.base_model import PACKAGE, packaged_model
from hmi_engine.demo.tasks import DemoData
from hmi_engine.demo.timing import interleave
from hmi_engine.errors import HmiError
from hmi_engine.memory.plot_view import PlotView
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.packing import PackedSequences
from hmi_engine.models.tokenization import TextEncoder
from hmi_engine.store import Store

__all__ = ["hit_curves", "main"]

QUESTION = (
    "How fast are PLOT rows retrieved, how often are they there, and how does that grow with the corpus?"
)

DOMAIN = "everything"
MAX_WORDS = 60
TOLERANCE = 5e-3
BATCH_SIZES = (32, 256)
WARM_UP = 2
OURS, PUBLISHED = "HMI look-up and merge", "numba search, numpy gather"
SERIAL, PARALLEL = "numba alone, one thread", "numba alone, all threads"
BASELINES = (PUBLISHED, SERIAL, PARALLEL)
NOTES = (
    "Retrieval goes from token ids to the input of the first upper layer, one call for each batch. "
    "HMI's figure includes adding the position and the LayerNorm; the baseline's does not.",
    "All read the same rows (float16, memory-mapped) of the same table; their results were compared "
    "before timing. The texts are held out: none is in the table's corpus.",
    "Search alone goes from token ids to row numbers; all systems found the same, which was checked before "
    "timing. The tables of Python, SQLite and DuckDB lie in memory and get all keys of a batch at once, made "
    "by numpy; each in the fastest of the ways that were tried.",
    "The large table holds the corpus' bigrams and random ones. Header, index, keys and counts are real; its "
    "rows are a hole in a sparse file, which is mapped and read as any other but costs no disk. Memory is "
    "what /proc/self/smaps says of the file's mapping.",
    "numba's threads sleep between calls (workqueue layer) and a pause precedes every sample: otherwise the "
    "waiting threads of one system take the cores of the next.",
    "Curves: the corpus' texts in random order, cut at growing sizes; an n-gram is found if the corpus holds "
    "it at least twice, as a table asks.",
)

_Array = npt.NDArray[np.float32]
_Run = Callable[[], Iterator[_Array]]


@dataclass(frozen=True)
class _Texts:
    """Token ids of the corpus, shuffled, and of the held-out texts."""

    corpus: list[list[int]]
    held_out: PackedSequences


def _read(data: DemoData, encoder: TextEncoder) -> _Texts:
    texts = list(dict.fromkeys(text for domain in data.domains for text in domain.texts))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = list(dict.fromkeys(example.text for task in data.tasks for example in task.test))
    return _Texts(
        encoder.token_ids([texts[index] for index in order]),
        PackedSequences.pack(encoder.token_ids(held_out)),
    )


def hit_curves(corpus: Sequence[list[int]], held_out: PackedSequences, *, num_points: int) -> list[Curve]:
    """Share of the held-out n-grams, by length, that a growing corpus holds at least twice.

    Sizes halve from the whole corpus down; ``num_points`` of them.
    """
    sizes = [max(1, len(corpus) >> (num_points - 1 - point)) for point in range(num_points)]
    tokens = [float(sum(map(len, corpus[:size]))) for size in sizes]
    curves = []
    for order, name in ((1, "unigrams"), (2, "bigrams"), (3, "trigrams")):
        wanted, occurrences = hmi_kernels.count_ngrams(held_out.input_ids, held_out.offsets, order=order)
        counter = hmi_kernels.NgramCounter(order)
        shares, counted = [], 0
        for size in sizes:
            batch = PackedSequences.pack(list(corpus[counted:size]))
            counter.add(batch.input_ids, batch.offsets)
            counted = size
            keys, _ = counter.items(2)
            found = torch.isin(wanted, keys)
            shares.append(float(occurrences[found].sum() / occurrences.sum()))
        curves.append(
            Curve(
                figure="hit_rate",
                name=name,
                x_label="corpus tokens",
                y_label="share of held-out n-grams found",
                x=tuple(tokens),
                y=tuple(shares),
            )
        )
    return curves


def _retrieval_cases(
    folder: Path, data: DemoData, *, window: Literal[2, 3], plot_bytes: int, repetitions: int
) -> tuple[list[Case], list[Quantity]]:
    """One case for each batch size, on one table."""
    with Store.create(folder / f"window{window}", general=packaged_model(), window=window) as store:
        texts = list(dict.fromkeys(text for domain in data.domains for text in domain.texts))
        store.add_domain(DOMAIN, iter(texts), plot_bytes=plot_bytes, row_format=store.general.row_dtype)
        held_out = _read(data, store.encoder).held_out
        plots = PlotLibrary(store.layout, store.catalog, store.general)
        cases = [
            _retrieval_case(store, plots, held_out, batch_size, repetitions) for batch_size in BATCH_SIZES
        ]
        with plots.reading([DOMAIN]) as view:
            cases.append(_lookup_case(view, held_out, window, repetitions))
            references = view.lookup(held_out, [DOMAIN] * held_out.num_sequences)
        rates = _hit_rates(references, held_out, window)
        plots.close()
    return cases, rates


def _lookup_case(view: PlotView, held_out: PackedSequences, window: int, repetitions: int) -> Case:
    table = view.table(DOMAIN)
    if table is None:
        raise HmiError(f"domain {DOMAIN!r} has no table; is plot_layers 0?")
    return lookup_case(
        f"search alone, window {window}, {BATCH_SIZES[-1]} texts per call",
        table.index,
        table.row_keys,
        _batches(held_out, BATCH_SIZES[-1]),
        window=window,
        repetitions=repetitions,
    )


def _retrieval_case(
    store: Store, plots: PlotLibrary, held_out: PackedSequences, batch_size: int, repetitions: int
) -> Case:
    systems = _systems(store, plots, _batches(held_out, batch_size))
    _check_equal(store, held_out, systems)
    seconds = interleave({name: _exhaust(run) for name, run in systems.items()}, repetitions, warm_up=WARM_UP)
    work = [held_out.num_tokens] * repetitions
    measured = {name: System.of(name, _DESCRIPTIONS[name], seconds[name], work, "tokens") for name in systems}
    general, rows = store.general, store.domains[DOMAIN].rows
    settings: dict[str, JsonValue] = {
        "window": general.window,
        "texts_per_call": batch_size,
        "rows": rows,
        "table_bytes": rows * general.window * general.hidden_size * 2,
        "held_out_tokens": held_out.num_tokens,
        "hidden_size": general.hidden_size,
    }
    return Case(
        name=f"retrieval, window {general.window}, {batch_size} texts per call",
        settings=settings,
        systems=tuple(measured.values()),
        ratios=tuple(Ratio.of(measured[OURS], measured[name]) for name in BASELINES),
    )


def _batches(sequences: PackedSequences, size: int) -> list[PackedSequences]:
    token_ids = [ids.tolist() for ids in sequences.input_ids.split(sequences.lengths)]
    return [PackedSequences.pack(token_ids[start : start + size]) for start in range(0, len(token_ids), size)]


_DESCRIPTIONS = {
    OURS: "n-gram search in open-addressing tables, gather, sum, position, LayerNorm",
    PUBLISHED: "the published form: typed dictionary, rows gathered and added by numpy",
    SERIAL: "typed dictionary, gather and sum in one compiled loop",
    PARALLEL: "the same, sequences shared out to all threads",
}


def _systems(store: Store, plots: PlotLibrary, batches: Sequence[PackedSequences]) -> dict[str, _Run]:
    """Each retrieves batch after batch. A batch's memory is given back before the next, as in service."""
    tables = plots.reading([DOMAIN])
    table, root = tables.table(DOMAIN), tables.table("general")
    if table is None or root is None or root.unigrams is None:
        raise HmiError(f"the store at {store.layout.root} lacks a table; is plot_layers 0?")
    keys, rows, unigrams = (tensor.numpy() for tensor in (table.row_keys, table.rows, root.unigrams))
    arrays = [(batch.input_ids.numpy(), batch.offsets.numpy()) for batch in batches]

    def retrieve(batch: PackedSequences) -> _Array:
        domains = [DOMAIN] * batch.num_sequences
        with plots.reading([DOMAIN]) as view:
            references = view.lookup(batch, domains)
            result: _Array = view.merge(store.model, batch, domains, references).numpy()
        return result

    def ours() -> Iterator[_Array]:
        return map(retrieve, batches)

    def baseline(parallel: bool) -> _Run:
        peer = NumbaPlot(keys, rows, unigrams, window=store.general.window, parallel=parallel)
        return lambda: (peer.run(ids, offsets) for ids, offsets in arrays)

    gathered = GatheredPlot(keys, rows, unigrams, window=store.general.window)

    def published() -> Iterator[_Array]:
        return (gathered.run(ids, offsets) for ids, offsets in arrays)

    return {OURS: ours, PUBLISHED: published, SERIAL: baseline(False), PARALLEL: baseline(True)}


def _check_equal(store: Store, held_out: PackedSequences, systems: dict[str, _Run]) -> None:
    """The baselines' sums, with position and LayerNorm added here, must be HMI's output."""
    expected = torch.from_numpy(np.concatenate(list(systems[OURS]())))
    positions = store.model.merge_positions[held_out.positions()]
    for name in BASELINES:
        found = store.model.merge_norm(torch.from_numpy(np.concatenate(list(systems[name]()))) + positions)
        gap = float((found - expected).abs().max())
        if gap > TOLERANCE:
            raise HmiError(f"{name} and {OURS} differ by {gap:.1e}: they do not retrieve the same")


def _exhaust(run: _Run) -> Callable[[int], None]:
    def call(_: int) -> None:
        deque(run(), maxlen=0)

    return call


def _hit_rates(references: torch.Tensor, held_out: PackedSequences, window: int) -> list[Quantity]:
    """Found windows; in a window-3 table also what back-off finds of the others."""
    num_windows = held_out.num_tokens - (held_out.num_sequences if window == 2 else 0)
    found = references[:, 0] >= 0
    rates = [
        Quantity(name=f"window {window}: whole n-grams", value=float(found.sum()) / num_windows, unit="share")
    ]
    if window == 3:
        for column, side in ((1, "left"), (2, "right")):
            share = float((references[~found, column] >= 0).double().mean())
            rates.append(
                Quantity(name=f"window 3: {side} bigrams where the trigram misses", value=share, unit="share")
            )
    return rates


def measure(arguments: Arguments) -> BenchmarkResult:
    """Runs retrieval for both window widths, and the curves."""
    data = read_texts(arguments, max_words=MAX_WORDS)
    plot_bytes = (8 if arguments.quick else 256) << 20
    repetitions = 3 if arguments.quick else 25
    numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]  # its threads sleep between calls
    numba.set_num_threads(min(torch.get_num_threads(), numba.get_num_threads()))
    texts = _read(data, TextEncoder(packaged_model(), 512))
    cases: list[Case] = []
    quantities: list[Quantity] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for window in (2, 3):
            of_window, rates = _retrieval_cases(
                Path(folder),
                data,
                window=2 if window == 2 else 3,
                plot_bytes=plot_bytes,
                repetitions=repetitions,
            )
            cases.extend(of_window)
            quantities.extend(rates)
        of_large, costs = measure_large_table(
            Path(folder) / "large.plot",
            PackedSequences.pack(texts.corpus),
            _batches(texts.held_out, BATCH_SIZES[-1]),
            num_rows=300_000 if arguments.quick else 6_500_000,
            repetitions=repetitions,
        )
        cases.extend(of_large)
        quantities.extend(costs)
    return BenchmarkResult.of(
        arguments,
        "plot",
        QUESTION,
        settings={
            "model": PACKAGE,
            "text": data.source,
            "corpus_tokens": sum(map(len, texts.corpus)),
            "plot_bytes": plot_bytes,
            "repetitions": repetitions,
        },
        notes=NOTES,
        cases=cases,
        quantities=quantities,
        curves=tuple(hit_curves(texts.corpus, texts.held_out, num_points=4 if arguments.quick else 9)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments("plot", QUESTION, argv)
    result = measure(arguments)
    result.write(arguments.out)
    for line in result.ratio_lines():
        print(line)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
