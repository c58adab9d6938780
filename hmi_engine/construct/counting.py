"""Counts the n-grams of a corpus of any size in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hmi_engine.construct.counting_batches import tokenized_batches
from hmi_engine.construct.counting_selection import Integers, add_up, select_most_frequent, sort_pieces
from hmi_engine.construct.counting_windows import WindowCounter
from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.corpus_report import CorpusReport
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["CorpusCounts", "Progress", "count_corpus", "cut_counts", "merge_counts"]

Progress = Callable[[str, int, int | None], None]
"""Called with the name of a step, how much is done, and the total where it is known."""

_MERGING = "adding up counts (n-grams)"


@dataclass(frozen=True, eq=False)
class CorpusCounts:
    """What a corpus holds: the windows that a table may keep, and which texts it was.

    Attributes:
        keys: int64 [N] keys of windows, ascending and distinct.
        counts: int64 [N] occurrences.
        total_occurrences: of all windows, also those that were cut: the denominator of hit mass.
        num_distinct: how many windows there were before the cut.
        num_texts: texts read.
        num_tokens: tokens read, special tokens included.
        documents: sorted int64 digests of the texts, each once.
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
    is_causal: bool = False,
    min_count: int = 1,
    memory_bytes: int = 1 << 30,
    max_ngrams: int | None = None,
    scratch: Path | None = None,
    progress: Progress | None = None,
    report: CorpusReport | None = None,
    total_bytes: int | None = None,
) -> CorpusCounts:
    """Counts the windows of a corpus in one pass; exact, whatever the limits.

    ``window=2``: bigrams. ``window=3``: trigrams, and the bigrams at both sides of a missing neighbour, which
    are the windows at a sequence's ends and what back-off composes a missing trigram from. ``is_causal``, for
    a decoder: each bigram once, as the window of a sequence's second token and what stands for a trigram.

    Args:
        texts: the corpus; read while the texts before are tokenised and counted.
        encoder: the tokenizer; all of a text counts, also what the model has no positions for.
        window: 2 or 3 tokens.
        is_causal: whether windows are those of a decoder.
        min_count: windows seen less often are left out of the result.
        memory_bytes: what the counts may take; beyond it they go to disk and are added up there. The result
            comes on top (16 bytes for each window), so do the tokenizer's words and batches (about 200 MiB),
            and once on disk DuckDB takes at least 128 MiB.
        max_ngrams: the result holds at most so many, the most frequent; of equal ones the smaller keys.
        scratch: folder for counts on disk, removed at the end; default: the system's temporary folder.
        progress: told about the work: bytes where ``report`` and ``total_bytes`` are given, else texts.
        report: what the stream of ``texts`` tells, see :func:`~hmi_engine.knowledge.corpus.stream_texts`.
        total_bytes: of the corpus.

    Raises:
        CorpusError: the corpus holds no text or cannot be read, or ``scratch`` is no folder.
        StoreFullError: ``scratch`` has no room.
        ValueError: ``window`` or a limit is out of range.
    """
    _check_limits(min_count, max_ngrams)
    digests: list[Integers] = []
    num_texts = num_tokens = 0
    with WindowCounter(window, memory_bytes, scratch, is_causal=is_causal) as counter:
        with closing(tokenized_batches(texts, encoder)) as batches:
            for batch in batches:
                counter.add(batch.input_ids, batch.offsets)
                digests.append(batch.digests)
                num_texts += len(batch.digests)
                num_tokens += len(batch.input_ids)
                if progress:
                    _tell(progress, num_texts, report, total_bytes)
        if not digests:
            raise CorpusError(
                "the corpus holds no text; check the paths and, for JSON lines, the field `text`"
            )
        keys, counts, num_distinct = counter.take(
            min_count, max_ngrams, progress and partial(progress, _MERGING)
        )
    return CorpusCounts(
        keys=torch.from_numpy(keys),
        counts=torch.from_numpy(counts),
        total_occurrences=counter.total_occurrences,
        num_distinct=num_distinct,
        num_texts=num_texts,
        num_tokens=num_tokens,
        documents=torch.from_numpy(np.unique(np.concatenate(digests))),
    )


def merge_counts(one: CorpusCounts, other: CorpusCounts) -> CorpusCounts:
    """The counts of two corpora as if they were one: associative and commutative.

    Both must be whole (``min_count=1`` and no ``max_ngrams``): what is rare in each may be frequent in both.
    Cut the last one with :func:`cut_counts`.

    Raises:
        ValueError: one of them was cut.
    """
    for counts in (one, other):
        if len(counts.keys) != counts.num_distinct:
            raise ValueError(
                f"only whole counts can be merged, but of {counts.num_distinct} windows "
                f"{len(counts.keys)} are left; count with min_count=1 and without max_ngrams"
            )
    pieces = [(counts.keys.numpy(), counts.counts.numpy()) for counts in (one, other)]
    keys, added = add_up(*sort_pieces(pieces))
    return CorpusCounts(
        keys=torch.from_numpy(keys),
        counts=torch.from_numpy(added),
        total_occurrences=one.total_occurrences + other.total_occurrences,
        num_distinct=len(keys),
        num_texts=one.num_texts + other.num_texts,
        num_tokens=one.num_tokens + other.num_tokens,
        documents=torch.from_numpy(np.union1d(one.documents.numpy(), other.documents.numpy())),
    )


def cut_counts(counts: CorpusCounts, *, min_count: int = 1, max_ngrams: int | None = None) -> CorpusCounts:
    """What :func:`count_corpus` with these limits gives on the same corpus.

    Raises:
        ValueError: a limit is out of range.
    """
    _check_limits(min_count, max_ngrams)
    kept = counts.counts >= min_count
    keys, left = select_most_frequent(counts.keys[kept].numpy(), counts.counts[kept].numpy(), max_ngrams)
    return replace(counts, keys=torch.from_numpy(keys), counts=torch.from_numpy(left))


def _check_limits(min_count: int, max_ngrams: int | None) -> None:
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, not {min_count}")
    if max_ngrams is not None and max_ngrams < 0:
        raise ValueError(f"max_ngrams must not be negative, but is {max_ngrams}")


def _tell(progress: Progress, num_texts: int, report: CorpusReport | None, total_bytes: int | None) -> None:
    if report is None or total_bytes is None:
        progress("counting n-grams (texts)", num_texts, None)
    else:
        progress("counting n-grams (bytes)", min(report.bytes, total_bytes), total_bytes)
