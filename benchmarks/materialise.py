"""How fast do counted n-grams become the rows of a table?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import BertModel
from transformers.utils import logging as transformers_logging

import hmi_kernels
from benchmarks.arguments import Arguments, read_arguments, read_texts
from benchmarks.result import BenchmarkResult, Case, Quantity, Ratio, System
from hmi_engine.construct.build_folder import BuildFolder
from hmi_engine.construct.counting import count_corpus
from hmi_engine.construct.materialise import RowSources, build_table
from hmi_engine.construct.table_plan import TablePlan, TableSettings, plan_table
from hmi_engine.demo.base_model import packaged_model
from hmi_engine.demo.timing import interleave
from hmi_engine.knowledge.frequencies import Frequencies
from hmi_engine.knowledge.plot_table import PlotTable
from hmi_engine.knowledge.row_formats import RowFormat, stored_row_bytes
from hmi_engine.models.windows import fill_places
from hmi_engine.store import Store

__all__ = ["main", "measure"]

QUESTION = "How fast do counted n-grams become the rows of a table?"
PLOT_LAYERS = 3
MAX_WORDS = 60
WINDOWS_PER_CALL = 1024  # of the peer: the fastest of 256, 1024 and 4096 on the machine of the results
PEER = "transformers, one window a sequence"
COPIED = "HMI, float16, all rows copied from the table before"
FORMATS: tuple[RowFormat, ...] = ("float16", "int8", "pq8")
NOTES = (
    "From keys to a table's row files, flushed to the disk: the most frequent n-grams of the text, MiniLM "
    "with K = 3. Nothing is read from an earlier table but where the row says so: that is an update whose "
    "n-grams stay.",
    f"The peer is transformers' BertModel cut to K layers, {WINDOWS_PER_CALL} windows a call as sequences of "
    "2 or 3 tokens without padding, its states written as float16 to one file. Its rows and HMI's were "
    "compared before timing.",
    "pq8: codebooks are trained within each repetition, on at most 32,768 of the rows; in a larger table "
    "that part weighs less.",
)


@dataclass(frozen=True)
class _Plan:
    num_rows: int
    repetitions: int


QUICK = _Plan(500, 2)
FULL = _Plan(60_000, 7)


def measure(arguments: Arguments) -> BenchmarkResult:
    """Measures both widths of windows."""
    plan = QUICK if arguments.quick else FULL
    data = read_texts(arguments, max_words=MAX_WORDS)
    texts = list(dict.fromkeys(text for domain in data.domains for text in domain.texts))
    cases: list[Case] = []
    quantities: list[Quantity] = []
    with tempfile.TemporaryDirectory() as folder:
        for window in (2, 3):
            path = Path(folder) / f"window{window}"
            with Store.create(
                path, general=packaged_model(), plot_layers=PLOT_LAYERS, window=window
            ) as store:
                case, error = _measure_window(store, window, texts, plan)
            cases.append(case)
            quantities.append(Quantity(name=f"{case.name}: largest difference", value=error, unit=""))
    return BenchmarkResult.of(
        arguments,
        "materialise",
        QUESTION,
        settings={"text": data.source, "plot_layers": PLOT_LAYERS, "repetitions": plan.repetitions},
        notes=NOTES,
        cases=cases,
        quantities=quantities,
    )


def _measure_window(
    store: Store, window: Literal[2, 3], texts: Sequence[str], plan: _Plan
) -> tuple[Case, float]:
    plans = _plans(store, window, texts, plan.num_rows)
    transformers_logging.set_verbosity_error()  # the layers above K are left out on purpose
    peer = BertModel.from_pretrained(store.general_folder, num_hidden_layers=PLOT_LAYERS).eval()
    with _built(store, plans["float16"], "before") as table:
        error = float((_peer_rows(peer, store, plans["float16"])[:] - table.rows.float()).abs().max())
        systems: dict[str, Callable[[int], object]] = {PEER: lambda _: _write_peer_rows(peer, store, plans)}
        for row_format in FORMATS:
            systems[f"HMI, {row_format}"] = _building(store, plans[row_format])
        systems[COPIED] = _building(store, plans["float16"], [table])
        seconds = interleave(systems, plan.repetitions)
    num_rows = len(plans["float16"].keys)
    measured = {
        name: System.of(
            name, _description(name, window, store), seconds[name], [num_rows] * plan.repetitions, "rows"
        )
        for name in systems
    }
    return Case(
        name=f"window {window}",
        settings={"rows": num_rows},
        systems=tuple(measured.values()),
        ratios=tuple(Ratio.of(measured[name], measured[PEER]) for name in systems if name != PEER),
    ), error


def _plans(store: Store, window: int, texts: Sequence[str], num_rows: int) -> dict[RowFormat, TablePlan]:
    """The same n-grams, the most frequent, in each format."""
    counts = count_corpus(texts, store.encoder, window=window, max_ngrams=num_rows)
    frequencies = Frequencies.none().with_corpus(
        counts.keys, counts.counts, occurrences=counts.total_occurrences
    )
    plans = {}
    for row_format in FORMATS:
        settings = TableSettings(plot_bytes=1 << 40, row_format=row_format, min_count=1)
        plans[row_format] = plan_table(
            frequencies,
            settings,
            store.general,
            layer_identity=store.general.domain_layers,
            corpus_tokens=counts.num_tokens,
            documents=counts.documents,
        )
    return plans


@contextmanager
def _built(store: Store, plan: TablePlan, name: str, tables: Sequence[PlotTable] = ()) -> Iterator[PlotTable]:
    with BuildFolder.open(store.layout, name) as folder:
        folder.save(plan, plan.fingerprint())
        yield build_table(plan, RowSources(store.model.window_states, tables), folder)
        folder.remove()


def _building(store: Store, plan: TablePlan, tables: Sequence[PlotTable] = ()) -> Callable[[int], None]:
    def build(_: int) -> None:
        with _built(store, plan, "repetition", tables):
            pass

    return build


@torch.no_grad()
def _peer_rows(peer: BertModel, store: Store, plan: TablePlan) -> Tensor:
    window = store.general.window
    tokens = fill_places(
        hmi_kernels.ngram_tokens(plan.keys)[:, :window], store.general.placeholder_token_id
    ).long()
    parts = [peer(input_ids=part).last_hidden_state.half() for part in tokens.split(WINDOWS_PER_CALL)]
    return torch.cat(parts)


def _write_peer_rows(peer: BertModel, store: Store, plans: dict[RowFormat, TablePlan]) -> None:
    with tempfile.TemporaryFile(dir=store.layout.root) as file:
        file.write(_peer_rows(peer, store, plans["float16"]).numpy().data)


def _description(name: str, window: int, store: Store) -> str:
    if name == PEER:
        return (
            f"BertModel, {PLOT_LAYERS} layers, {WINDOWS_PER_CALL} windows a call, float32, written as float16"
        )
    if name == COPIED:
        return "rows found by key in a mapped table and copied"
    row_format = next(entry for entry in FORMATS if name.endswith(entry))
    size = stored_row_bytes(row_format, window, store.general.hidden_size)
    return f"domain layers over windows, projections of layer 0 looked up; {size} bytes a row"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments("materialise", QUESTION, argv)
    measure(arguments).write(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
