"""Counts the n-grams of a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

import hmi_kernels
from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.plot_table import text_digest
from hmi_engine.models.packing import PackedSequences
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["CorpusCounts", "Progress", "count_corpus"]

Progress = Callable[[str, int, int | None], None]
"""Called with the name of a step, how much is done, and the total where it is known."""

TEXTS_PER_BATCH = 1024


@dataclass(frozen=True)
class CorpusCounts:
    """What a corpus holds: the windows that a table may keep, and which texts it was.

    Attributes:
        keys: int64 [N] keys of windows, ascending and distinct.
        counts: int64 [N] occurrences.
        total_occurrences: of all windows, also those that were cut: the denominator of hit mass.
        num_distinct: how many windows there were before the cut.
        num_texts: texts read.
        num_tokens: tokens read, special tokens included.
        documents: sorted int64 digests of the texts.
    """

    keys: torch.Tensor
    counts: torch.Tensor
    total_occurrences: int
    num_distinct: int
    num_texts: int
    num_tokens: int
    documents: torch.Tensor


def count_corpus(
    texts: Iterable[str],
    encoder: TextEncoder,
    *,
    window: int,
    min_count: int = 1,
    max_ngrams: int | None = None,
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
    total, num_distinct = int(counts.sum()), len(keys)
    keys, counts = _cut(keys, counts, min_count, max_ngrams)
    documents = torch.tensor(digests, dtype=torch.int64).unique()
    return CorpusCounts(keys, counts, total, num_distinct, len(digests), num_tokens, documents)


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
    keys, order = torch.sort(torch.cat([trigrams, bigrams, right]))
    return keys, torch.cat([trigram_counts, bigram_counts, bigram_counts])[order]


def _cut(
    keys: torch.Tensor, counts: torch.Tensor, min_count: int, max_ngrams: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows seen at least ``min_count`` times, the ``max_ngrams`` most frequent of them."""
    kept = counts >= min_count
    keys, counts = keys[kept], counts[kept]
    if max_ngrams is None or len(keys) <= max_ngrams:
        return keys, counts
    # Stable, so that of equal counts the smaller keys stay.
    best = torch.sort(counts, descending=True, stable=True).indices[:max_ngrams].sort().values
    return keys[best], counts[best]


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, size)):
        yield batch
