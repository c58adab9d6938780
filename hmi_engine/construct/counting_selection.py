"""Counted windows as arrays: sorted, added up, and cut to the most frequent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hmi_kernels.reference import BITS_PER_SLOT

__all__ = [
    "CountedWindows",
    "Integers",
    "MergeProgress",
    "add_up",
    "right_windows",
    "select_most_frequent",
    "sort_pieces",
]

Integers = npt.NDArray[np.int64]

MergeProgress = Callable[[int, int], None]
"""Called with how many windows are done, and of how many."""


class CountedWindows(NamedTuple):
    """Keys int64 [N], ascending and distinct, counts int64 [N], and how many there were before a cut."""

    keys: Integers
    counts: Integers
    num_distinct: int


def right_windows(bigrams: Integers) -> Integers:
    """Keys of bigrams in slots 0 and 1 to those of the same tokens in slots 1 and 2; the order stays."""
    return bigrams >> BITS_PER_SLOT


def sort_pieces(pieces: Sequence[tuple[Integers, Integers]]) -> tuple[Integers, Integers]:
    """Lays pieces of keys and counts end to end and sorts them by key."""
    keys = np.concatenate([piece_keys for piece_keys, _ in pieces])
    counts = np.concatenate([piece_counts for _, piece_counts in pieces])
    order = np.argsort(keys, kind="stable")  # merges sorted runs in linear time
    return keys[order], counts[order]


def add_up(keys: Integers, counts: Integers) -> tuple[Integers, Integers]:
    """Adds up the counts of equal keys, which must stand together."""
    first = np.flatnonzero(np.diff(keys, prepend=-1))  # keys are positive
    if not len(first):
        return keys, counts
    return keys[first], np.add.reduceat(counts, first)


def select_most_frequent(
    keys: Integers, counts: Integers, max_ngrams: int | None
) -> tuple[Integers, Integers]:
    """The ``max_ngrams`` with the greatest counts, of equal ones the smaller keys; ``keys`` are ascending."""
    if max_ngrams is None or len(keys) <= max_ngrams:
        return keys, counts
    if max_ngrams == 0:
        return keys[:0], counts[:0]
    least = np.partition(counts, -max_ngrams)[-max_ngrams]
    kept = counts > least
    ties = np.flatnonzero(counts == least)
    kept[ties[: max_ngrams - np.count_nonzero(kept)]] = True
    return keys[kept], counts[kept]
