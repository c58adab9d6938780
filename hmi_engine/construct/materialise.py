"""Counts a corpus' n-grams, chooses which to keep, and computes their rows through the domain layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

import hmi_kernels
from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.plot_table import PlotMetadata, PlotTable, text_digest
from hmi_engine.knowledge.selection import Selection, bytes_per_row, select_rows
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import PackedSequences
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["CorpusCounts", "Progress", "build_plot", "build_unigram_plot", "count_corpus"]

Progress = Callable[[str, int, int | None], None]
"""Called with the name of a step, how much is done, and the total where it is known."""

TEXTS_PER_BATCH = 1024
WINDOWS_PER_BATCH = 8192


@dataclass(frozen=True)
class CorpusCounts:
    """What a corpus holds: windows that a table may keep, by decreasing width, and which texts it was.

    Attributes:
        keys: int64 [N] n-gram keys.
        counts: int64 [N] occurrences.
        num_texts: texts read.
        num_tokens: tokens read, special tokens included.
        documents: sorted int64 digests of the texts.
    """

    keys: torch.Tensor
    counts: torch.Tensor
    num_texts: int
    num_tokens: int
    documents: torch.Tensor


def count_corpus(
    texts: Iterable[str],
    encoder: TextEncoder,
    *,
    window: int,
    progress: Progress | None = None,
) -> CorpusCounts:
    """Counts the windows of a corpus in one pass.

    ``window=2``: bigrams. ``window=3``: trigrams, and the bigrams at both sides of a missing neighbour, which
    are the windows at a sequence's ends and what back-off composes a missing trigram from.

    Raises:
        CorpusError: the corpus holds no text.
    """
    counters = [hmi_kernels.NgramCounter(order) for order in range(2, window + 1)]
    digests: list[int] = []
    num_tokens = 0
    for batch in _batches(texts, TEXTS_PER_BATCH):
        sequences = PackedSequences.pack([ids for ids in encoder.token_ids(batch) if ids])
        for counter in counters:
            counter.add(sequences.input_ids, sequences.offsets)
        digests.extend(map(text_digest, batch))
        num_tokens += sequences.num_tokens
        if progress:
            progress("counting n-grams (texts)", len(digests), None)
    if not digests:
        raise CorpusError("the corpus holds no text; check the paths and, for JSON lines, the field `text`")
    keys, counts = _windows([counter.items() for counter in counters], window)
    documents = torch.tensor(digests, dtype=torch.int64).unique()
    return CorpusCounts(keys, counts, len(digests), num_tokens, documents)


def _windows(
    counted: Sequence[tuple[torch.Tensor, torch.Tensor]], window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys as the lookup builds them, from counts of bigrams (and trigrams)."""
    bigrams, bigram_counts = counted[0]
    if window == 2:
        return bigrams, bigram_counts
    # A counter's bigram occupies slots 0 and 1; the same two tokens are also a window's slots 1 and 2.
    trigrams, trigram_counts = counted[1]
    right = hmi_kernels.ngram_keys(hmi_kernels.ngram_tokens(bigrams).roll(1, dims=1))
    return (
        torch.cat([trigrams, bigrams, right]),
        torch.cat([trigram_counts, bigram_counts, bigram_counts]),
    )


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, size)):
        yield batch


def build_plot(
    counts: CorpusCounts,
    model: HierarchicalBert,
    general: GeneralInfo,
    *,
    plot_bytes: int,
    min_count: int,
    inherited: Sequence[torch.Tensor] = (),
    progress: Progress | None = None,
) -> tuple[PlotTable, Selection]:
    """Makes a domain's table: the most frequent windows that fit into ``plot_bytes``.

    Args:
        counts: the corpus.
        model: computes the rows.
        general: the store's base.
        plot_bytes: budget for rows and index.
        min_count: rarer windows are left out.
        inherited: sorted keys int64 of each ancestor's table; what an ancestor holds is not stored again.
        progress: told about the rows.

    Returns:
        The table, and the choice that was made (hit mass on the corpus itself).
    """
    selection = select_rows(
        counts.keys,
        counts.counts,
        budget_bytes=plot_bytes,
        bytes_per_row=bytes_per_row(general.window, general.hidden_size, general.row_dtype),
        min_count=min_count,
        exclude=inherited,
    )
    keys, order = torch.sort(selection.keys)
    tokens = hmi_kernels.ngram_tokens(keys)[:, : general.window]
    table = PlotTable(
        index=hmi_kernels.plot_index_build(keys),
        rows=_compute_rows(tokens, model, getattr(torch, general.row_dtype), "computing rows", progress),
        row_keys=keys,
        row_counts=selection.counts[order],
        unigrams=None,
        documents=counts.documents,
        metadata=_metadata(general, counts.num_tokens, min_count, selection.admission_count),
    )
    return table, selection


def build_unigram_plot(
    model: HierarchicalBert, general: GeneralInfo, *, progress: Progress | None = None
) -> PlotTable:
    """Makes the root's table: the unigram row of every token id, and no n-grams yet."""
    tokens = torch.full((general.vocab_size, general.window), -1, dtype=torch.int32)
    tokens[:, general.window - 2] = torch.arange(general.vocab_size, dtype=torch.int32)
    dtype = getattr(torch, general.row_dtype)
    rows = _compute_rows(tokens, model, dtype, "computing unigram rows", progress)
    none = torch.empty(0, dtype=torch.int64)
    return PlotTable(
        index=hmi_kernels.plot_index_build(none),
        rows=torch.empty(0, general.window, general.hidden_size, dtype=dtype),
        row_keys=none,
        row_counts=none,
        unigrams=rows[:, general.window - 2].contiguous(),
        documents=none,
        metadata=_metadata(general, 0, 0, 0),
    )


def _metadata(general: GeneralInfo, corpus_tokens: int, min_count: int, admission_count: int) -> PlotMetadata:
    return PlotMetadata(
        window=general.window,
        plot_layers=general.plot_layers,
        layer_identity=general.domain_layers,
        hidden_size=general.hidden_size,
        vocab_size=general.vocab_size,
        row_dtype=general.row_dtype,
        corpus_tokens=corpus_tokens,
        min_count=min_count,
        admission_count=admission_count,
    )


@torch.no_grad()
def _compute_rows(
    tokens: torch.Tensor,
    model: HierarchicalBert,
    dtype: torch.dtype,
    step: str,
    progress: Progress | None,
) -> torch.Tensor:
    rows = torch.empty(*tokens.shape, model.configuration.hidden_size, dtype=dtype)
    for start in range(0, len(tokens), WINDOWS_PER_BATCH):
        end = min(start + WINDOWS_PER_BATCH, len(tokens))
        rows[start:end] = model.window_states(tokens[start:end])
        if progress:
            progress(step, end, len(tokens))
    return rows
