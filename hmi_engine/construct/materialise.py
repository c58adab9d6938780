"""Computes the rows of a planned table through the domain layers; what is computed already is copied."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.construct.build_folder import BuildFolder
from hmi_engine.construct.counting import Progress
from hmi_engine.construct.row_encoding import SAMPLE_ROWS, RowEncoder
from hmi_engine.construct.table_plan import TablePlan
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.plot_table import PlotMetadata, PlotTable, unigram_slots_of
from hmi_engine.knowledge.row_formats import is_product_quantized, stored_shapes
from hmi_engine.models.windows import fill_places

__all__ = ["RowSources", "WindowLayersOf", "build_root_table", "build_table", "compute_unigrams"]

WINDOWS_PER_BATCH = 8192
_STEP = "computing rows"

WindowLayersOf = Callable[[Tensor], Tensor]
"""Runs windows, int32 [M, W] token ids with -1 where absent, through domain layers: float32 [M, W, H].

A decoder's gives only the last token's: [M, 1, H]."""


@dataclass(frozen=True)
class RowSources:
    """Where rows come from.

    Attributes:
        windows: computes rows; the weights are those of the plan's layer identity.
        tables: tables of the same layer identity, whose rows are copied where they have what is wanted.
        codebooks: those to go on with, where rows are product-quantised; None to train new ones.
        pause: called after each computed batch, so that a caller can give way to other work.
        batches_at_once: from so many threads ``windows`` is called, where it runs on other machines.
    """

    windows: WindowLayersOf
    tables: Sequence[PlotTable] = ()
    codebooks: Tensor | None = None
    pause: Callable[[], None] = field(default=lambda: None)
    batches_at_once: int = 1


def build_table(
    plan: TablePlan,
    sources: RowSources,
    folder: BuildFolder,
    *,
    unigrams: Tensor | None = None,
    progress: Progress | None = None,
) -> PlotTable:
    """Makes the table of a plan, going on after the rows that ``folder`` holds from an interrupted build.

    Args:
        plan: what the table holds.
        sources: where its rows come from.
        folder: takes the rows batch by batch.
        unigrams: [V, 3, H] of the store's float type, or None.
        progress: told about the rows.

    Raises:
        StoreFullError: no room; the folder keeps what is done.
        MissingDependencyError: product-quantised rows need faiss.
    """
    metadata = plan.metadata
    encoder = _encoder(plan, sources, folder, progress)
    shapes = stored_shapes(metadata.row_format, len(plan.keys), metadata.row_slots, metadata.hidden_size)
    shapes.pop("codebooks", None)
    usable = [table for table in sources.tables if _has_same_format(table, encoder)]
    writer = folder.rows(shapes)
    starts = range(writer.done, len(plan.keys), WINDOWS_PER_BATCH)
    keys = (plan.keys[start : start + WINDOWS_PER_BATCH] for start in starts)
    make = partial(_batch, metadata=metadata, tables=usable, sources=sources, encoder=encoder)
    with closing(_in_order(make, keys, sources.batches_at_once)) as batches:
        for batch in batches:
            writer.append(batch)
            if progress:
                progress(_STEP, writer.done, len(plan.keys))
    return PlotTable(
        index=hmi_kernels.plot_index_build(plan.keys),
        row_keys=plan.keys,
        row_counts=plan.counts,
        unigrams=unigrams,
        documents=plan.documents,
        metadata=metadata,
        codebooks=encoder.codebooks,
        candidate_keys=plan.candidate_keys,
        candidate_counts=plan.candidate_counts,
        **writer.tensors(),
    )


def _in_order(
    make: Callable[[Tensor], dict[str, Tensor]], all_keys: Iterable[Tensor], at_once: int
) -> Generator[dict[str, Tensor], None, None]:
    """Yields ``make`` of each, in order, some of them made ahead in threads; close it where it is left."""
    if at_once == 1:
        for keys in all_keys:
            yield make(keys)
        return
    pending: deque[Future[dict[str, Tensor]]] = deque()
    with ThreadPoolExecutor(at_once, "hmi-rows") as executor:
        try:
            for keys in all_keys:
                pending.append(executor.submit(make, keys))
                if len(pending) > at_once:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _encoder(
    plan: TablePlan, sources: RowSources, folder: BuildFolder, progress: Progress | None
) -> RowEncoder:
    row_format = plan.metadata.row_format
    if not is_product_quantized(row_format):
        return RowEncoder(row_format, None)
    codebooks = folder.codebooks
    if codebooks is None:
        codebooks = sources.codebooks
    if codebooks is None:
        # Keys that lie evenly over all: a random sample would have to be drawn again after a restart.
        chosen = _evenly_spread(len(plan.keys), SAMPLE_ROWS)
        sample = _compute(plan.keys[chosen], plan.metadata, sources, "training codebooks", progress)
        codebooks = RowEncoder.fit(sample, row_format).codebooks
    if codebooks is not None and folder.codebooks is None:
        folder.codebooks = codebooks
    return RowEncoder.from_codebooks(row_format, codebooks)


def _evenly_spread(length: int, most: int) -> Tensor:
    """Places in a sequence, int64, from the first to the last; at most so many.

    In integers: torch.linspace has float32, in which a large length rounds to a place behind the last.
    """
    count = min(length, most)
    return torch.arange(count) * (length - 1) // max(count - 1, 1)


def _has_same_format(table: PlotTable, encoder: RowEncoder) -> bool:
    if table.metadata.row_format != encoder.row_format:
        return False
    if table.codebooks is None or encoder.codebooks is None:
        return table.codebooks is encoder.codebooks
    return torch.equal(table.codebooks, encoder.codebooks)


def _batch(
    keys: Tensor,
    metadata: PlotMetadata,
    tables: Sequence[PlotTable],
    sources: RowSources,
    encoder: RowEncoder,
) -> dict[str, Tensor]:
    """The stored tensors of the rows of ``keys`` int64 [M]."""
    shapes = stored_shapes(metadata.row_format, len(keys), metadata.row_slots, metadata.hidden_size)
    shapes.pop("codebooks", None)
    stored = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    missing = torch.ones(len(keys), dtype=torch.bool)
    for table in tables:
        rows = hmi_kernels.plot_index_find(table.index, keys)
        found = missing & (rows >= 0)
        for name, tensor in stored.items():
            tensor[found] = getattr(table, name)[rows[found]]
        missing &= ~found
    if missing.any():
        encoded = encoder.encode(_compute(keys[missing], metadata, sources))
        for name, tensor in stored.items():
            tensor[missing] = getattr(encoded, name)
        sources.pause()
    return stored


def _compute(
    keys: Tensor,
    metadata: PlotMetadata,
    sources: RowSources,
    step: str = "",
    progress: Progress | None = None,
) -> Tensor:
    """float32 [M, W, H]: the rows of ``keys`` int64 [M]."""
    tokens = hmi_kernels.ngram_tokens(keys)[:, : metadata.window]
    if metadata.family == "bert":
        tokens = fill_places(tokens, metadata.placeholder_token_id)
    rows = torch.empty(len(keys), metadata.row_slots, metadata.hidden_size)
    return _run_windows(tokens, rows, sources.windows, step, progress)


@torch.no_grad()
def _run_windows(
    tokens: Tensor, rows: Tensor, windows: WindowLayersOf, step: str, progress: Progress | None
) -> Tensor:
    for start in range(0, len(tokens), WINDOWS_PER_BATCH):
        end = min(start + WINDOWS_PER_BATCH, len(tokens))
        rows[start:end] = windows(tokens[start:end])
        if progress and step:
            progress(step, end, len(tokens))
    return rows


def compute_unigrams(
    windows: WindowLayersOf, general: GeneralInfo, *, progress: Progress | None = None
) -> Tensor:
    """Returns the unigram rows of every token id, as :func:`hmi_kernels.plot_merge` reads them.

    They are [V, 3, H] of the store's float type: for bigram windows the token alone, on the right and on the
    left of the placeholder; for trigram windows at each slot among placeholders. A decoder's are [V, 1, H],
    of the token alone.
    """
    unigrams = torch.empty(
        general.vocab_size,
        unigram_slots_of(general.family),
        general.hidden_size,
        dtype=getattr(torch, general.row_dtype),
    )
    for number, (tokens, slot) in enumerate(_unigram_windows(general)):
        told = progress and _part_of(progress, number * general.vocab_size, unigrams.shape[:2].numel())
        rows = torch.empty(
            general.vocab_size, general.row_slots if tokens.shape[1] > 1 else 1, general.hidden_size
        )
        rows = _run_windows(tokens, rows, windows, "computing unigram rows", told)
        unigrams[:, number] = rows[:, slot]
    return unigrams


def _part_of(progress: Progress, before: int, total: int) -> Progress:
    """Tells of a part as of the whole."""
    return lambda step, done, _: progress(step, before + done, total)


def _unigram_windows(general: GeneralInfo) -> Iterator[tuple[Tensor, int]]:
    """For each unigram row the windows of all tokens, int32 [V, W], and the slot that it is."""
    token_ids = torch.arange(general.vocab_size, dtype=torch.int32)
    if general.is_causal or general.window == 2:
        yield token_ids[:, None], 0
    if general.is_causal:
        return
    for slot in (1, 0) if general.window == 2 else range(general.window):
        tokens = torch.full((general.vocab_size, general.window), -1, dtype=torch.int32)
        tokens[:, slot] = token_ids
        yield fill_places(tokens, general.placeholder_token_id), slot


def build_root_table(
    windows: WindowLayersOf, general: GeneralInfo, *, progress: Progress | None = None
) -> PlotTable:
    """Makes the root's first table: the unigram row of every token id, and no n-grams yet."""
    none = torch.empty(0, dtype=torch.int64)
    return PlotTable(
        index=hmi_kernels.plot_index_build(none),
        rows=torch.empty(0, general.row_slots, general.hidden_size, dtype=getattr(torch, general.row_dtype)),
        row_keys=none,
        row_counts=none,
        unigrams=compute_unigrams(windows, general, progress=progress),
        documents=none,
        metadata=PlotMetadata(
            family=general.family,
            window=general.window,
            plot_layers=general.plot_layers,
            layer_identity=general.domain_layers,
            hidden_size=general.hidden_size,
            vocab_size=general.vocab_size,
            placeholder_token_id=general.placeholder_token_id,
            row_dtype=general.row_dtype,
            row_format=general.row_dtype,
            corpus_tokens=0,
            min_count=0,
            admission_count=0,
        ),
    )
