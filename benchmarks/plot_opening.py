"""Opening a large table: how long it takes, what memory it costs, and what processes share of it."""

from __future__ import annotations

import gc
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

import hmi_kernels
from benchmarks.peers.key_tables import PythonTable
from benchmarks.peers.numba_plot import build_dictionary
from benchmarks.plot_lookup import lookup_case
from benchmarks.result import Case, Quantity, Ratio, System
from hmi_engine.demo.timing import interleave, median
from hmi_engine.knowledge.atomic import atomic_write
from hmi_engine.knowledge.plot_table import FORMAT_VERSION, PlotMetadata, open_plot
from hmi_engine.knowledge.row_formats import ROW_FORMATS, codebook_bytes, stored_row_bytes
from hmi_engine.knowledge.selection import bytes_per_row, table_bytes
from hmi_engine.models.packing import PackedSequences

__all__ = ["made_up_keys", "measure_large_table", "opening_case", "sharing_quantities", "write_sparse_table"]

OURS = "HMI mapping"
OPENINGS = 20
SHARE_READ = 0.05
"""Of the rows, in one stretch: what each process reads before its memory is asked for."""

HIDDEN_SIZE, VOCABULARY = 384, 30522
"""Of the made-up table: those of the packaged model."""

_DESCRIPTIONS = {
    OURS: "file mapped, header and row numbers of the index checked; rows are read when they are used",
    "numba dictionary": "built from the keys, as the published form does when it starts",
    "Python dict": "built from the keys",
}


class Residency(NamedTuple):
    """Memory of one process that a file's mapping accounts for, in bytes.

    ``resident`` pages are in memory and mapped; ``proportional`` counts a page that n processes map as 1/n;
    ``private`` pages are of this process alone and were written to.
    """

    resident: int
    proportional: int
    private: int


def measure_large_table(
    path: Path,
    corpus: PackedSequences,
    batches: Sequence[PackedSequences],
    *,
    num_rows: int,
    repetitions: int,
) -> tuple[list[Case], list[Quantity]]:
    """Writes a table of about ``num_rows`` at ``path``; opens it, searches it, and asks what it costs.

    Its bigrams are those of ``corpus`` and random ones; ``batches`` are what is searched.
    """
    known, _ = hmi_kernels.count_ngrams(corpus.input_ids, corpus.offsets, order=2)
    keys = made_up_keys(max(0, num_rows - len(known)), VOCABULARY, known)
    write_sparse_table(path, keys, _metadata(corpus.num_tokens))
    search = lookup_case(
        f"search alone, window 2, {batches[0].num_sequences} texts per call, large table",
        open_plot(path).index,
        keys,
        batches,
        window=2,
        repetitions=repetitions,
    )
    sizes = [size for window in (2, 3) for size in _format_quantities(window, HIDDEN_SIZE, len(keys))]
    return [search, opening_case(path, keys, min(repetitions, 5))], [*sharing_quantities(path), *sizes]


def _metadata(corpus_tokens: int) -> PlotMetadata:
    return PlotMetadata(
        family="bert",
        window=2,
        plot_layers=3,
        hidden_size=HIDDEN_SIZE,
        placeholder_token_id=103,
        vocab_size=VOCABULARY,
        row_dtype="float16",
        row_format="float16",
        layer_identity="made up",
        corpus_tokens=corpus_tokens,
        min_count=1,
        admission_count=1,
    )


def made_up_keys(
    num_rows: int, vocabulary: int, known: torch.Tensor | None = None, *, seed: int = 0
) -> torch.Tensor:
    """About ``num_rows`` random bigram keys beside the known ones, int64: distinct, ascending, N % 8 == 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (num_rows, 2), generator=generator, dtype=torch.int32)
    made_up = hmi_kernels.ngram_keys(tokens)
    keys: torch.Tensor = torch.unique(made_up if known is None else torch.cat([made_up, known]))
    return keys[: len(keys) // 8 * 8]


def write_sparse_table(path: Path, keys: torch.Tensor, metadata: PlotMetadata) -> None:
    """Writes a PLOT file whose header, index, keys and counts are real and whose float16 rows are a hole.

    Args:
        path: the file.
        keys: int64 [N], distinct and ascending; N a multiple of 8, so that nothing needs padding.
        metadata: of a window and a hidden size whose rows are multiples of 64 bytes.
    """
    index = hmi_kernels.plot_index_build(keys)
    row_bytes = len(keys) * stored_row_bytes("float16", metadata.window, metadata.hidden_size)
    header, offset = {}, 0
    for name, dtype, shape, num_bytes in (
        ("index", "I64", list(index.shape), index.nbytes),
        ("row_keys", "I64", [len(keys)], keys.nbytes),
        ("row_counts", "I64", [len(keys)], keys.nbytes),
        ("candidate_keys", "I64", [0], 0),
        ("candidate_counts", "I64", [0], 0),
        ("documents", "I64", [0], 0),
        ("rows", "F16", [len(keys), metadata.window, metadata.hidden_size], row_bytes),
    ):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    described = {
        "format": "hmi-plot",
        "format_version": str(FORMAT_VERSION),
        "hmi": metadata.model_dump_json(),
    }
    text = json.dumps({"__metadata__": described, **header}).encode()
    text += b" " * (-(8 + len(text)) % 64)

    def write(partial_file: Path) -> None:
        with partial_file.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in (index, keys, torch.ones_like(keys)):
                file.write(tensor.numpy().data)
            file.truncate(8 + len(text) + offset)

    atomic_write(path, write, sync=False)


def opening_case(path: Path, keys: torch.Tensor, repetitions: int) -> Case:
    """Times opening of a table, beside the building of the peers' dictionaries from the same keys."""
    numbers = keys.numpy()
    runs: dict[str, Callable[[int], object]] = {
        OURS: partial(_repeat_opening, path),
        "numba dictionary": lambda _: build_dictionary(numbers),
        "Python dict": lambda _: PythonTable(numbers),
    }
    seconds = interleave(runs, repetitions)
    work = {name: OPENINGS if name == OURS else 1 for name in runs}
    measured = {
        name: System.of(name, _DESCRIPTIONS[name], seconds[name], [work[name]] * repetitions, "openings")
        for name in runs
    }
    return Case(
        name=f"opening a table of {path.stat().st_size / 1e9:.2g} GB",
        settings={"rows": len(keys), "file_bytes": path.stat().st_size},
        systems=tuple(measured.values()),
        ratios=tuple(Ratio.of(measured[OURS], measured[peer]) for peer in measured if peer != OURS),
    )


def _repeat_opening(path: Path, _: int) -> None:
    for _ in range(OPENINGS):
        open_plot(path)


def sharing_quantities(path: Path, num_processes: int = 2) -> list[Quantity]:
    """Opens a table in several fresh processes, lets each read the same part, and asks what that costs."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(num_processes)]
    processes = [context.Process(target=_open_and_read, args=(path, theirs)) for _, theirs in pipes]
    for process in processes:
        process.start()
    try:
        ours = [mine for mine, _ in pipes]
        milliseconds, opened = zip(*(connection.recv() for connection in ours), strict=True)
        _tell(ours)
        read_bytes = [connection.recv() for connection in ours]
        _tell(ours)
        read: list[Residency] = [connection.recv() for connection in ours]
        _tell(ours)
    finally:
        for process in processes:
            process.join(timeout=60)
            process.kill()
    size = f"{path.stat().st_size / 1e9:.2g} GB"
    return [
        Quantity(name=f"first opening of {size} in a process", value=median(milliseconds), unit="ms"),
        Quantity(
            name="memory of the mapping after opening",
            value=median([state.resident / 1024 for state in opened]),
            unit="KiB",
        ),
        *_shared(read_bytes[0], read),
    ]


def _shared(read_bytes: int, states: Sequence[Residency]) -> list[Quantity]:
    who = f"each of {len(states)} processes that have read {read_bytes / 2**20:.0f} MiB of it"
    names = ("resident (RSS)", "its part of what is shared (PSS)", "private")
    return [
        Quantity(name=f"{who}: {name}", value=median([state[column] / 2**20 for state in states]), unit="MiB")
        for column, name in enumerate(names)
    ]


def _tell(connections: Sequence[Connection]) -> None:
    for connection in connections:
        connection.send(None)


def _open_and_read(path: Path, connection: Connection) -> None:
    """A process: opens, reports; reads, reports; reports its memory when all have read."""
    gc.collect()
    started = time.perf_counter()
    table = open_plot(path)
    milliseconds = (time.perf_counter() - started) * 1e3
    connection.send((milliseconds, _residency(path)))
    connection.recv()
    part = table.rows[: max(1, int(len(table.rows) * SHARE_READ))]
    _ = table.index.sum(), part.view(torch.int16).sum()  # every page is read
    connection.send(table.index.nbytes + part.nbytes)
    connection.recv()
    connection.send(_residency(path))
    connection.recv()


def _residency(path: Path) -> Residency:
    """What ``/proc/self/smaps`` says of the mappings of one file (Linux)."""
    fields = {"Rss:": 0, "Pss:": 0, "Private_Dirty:": 0}
    is_of_file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_of_file = line.endswith(f" {path.resolve()}")
        elif is_of_file and words[0] in fields:
            fields[words[0]] += int(words[1]) * 1024
    return Residency(*fields.values())


def _format_quantities(window: int, hidden_size: int, num_rows: int) -> list[Quantity]:
    """Bytes that a row takes in a file of ``num_rows``, by format: with index, key, count and codebooks."""
    quantities = []
    for row_format in ROW_FORMATS:
        of_row = bytes_per_row(window, hidden_size, row_format)
        total = table_bytes(num_rows, of_row) + codebook_bytes(row_format, window, hidden_size)
        quantities.append(
            Quantity(
                name=f"window {window}, {num_rows:,} rows: file bytes a row, {row_format}",
                value=total / num_rows,
                unit=f"bytes ({stored_row_bytes(row_format, window, hidden_size):,} of them the row itself)",
            )
        )
    return quantities
