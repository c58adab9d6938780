"""The PLOT baseline's search alone: a typed numba dictionary from n-gram key to row, in a compiled loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from benchmarks.peers.numba_plot import build_dictionary, find_row

__all__ = ["NumbaSearch"]

_Array = npt.NDArray[Any]


class NumbaSearch:
    """Finds the rows of a batch's windows, as ``hmi_kernels.plot_lookup`` does in one table."""

    def __init__(self, keys: _Array, *, window: int, parallel: bool) -> None:
        """``keys`` int64 [N] as HMI's; ``parallel`` shares a batch's sequences out to all threads."""
        self._table = build_dictionary(keys)
        kernel = _search_bigrams if window == 2 else _search_trigrams
        self._search: Callable[..., _Array] = numba.njit(parallel=parallel)(kernel)

    def run(self, input_ids: _Array, offsets: _Array) -> _Array:
        """input_ids int32 [T], offsets int64 [S+1] -> rows int64 [T, 1] or [T, 3], -1 where missing."""
        return self._search(self._table, input_ids, offsets)


def _search_bigrams(table: Any, input_ids: _Array, offsets: _Array) -> _Array:
    references = np.full((len(input_ids), 1), -1, dtype=np.int64)
    for sequence in numba.prange(len(offsets) - 1):
        for token in range(offsets[sequence], offsets[sequence + 1] - 1):
            references[token, 0] = find_row(table, input_ids[token], input_ids[token + 1], -1)
    return references


def _search_trigrams(table: Any, input_ids: _Array, offsets: _Array) -> _Array:
    """Rows of the trigram and, only where it is missing, of the bigrams at its left and right."""
    references = np.full((len(input_ids), 3), -1, dtype=np.int64)
    for sequence in numba.prange(len(offsets) - 1):
        start, end = offsets[sequence], offsets[sequence + 1]
        for token in range(start, end):
            a = input_ids[token - 1] if token > start else -1
            b = input_ids[token]
            c = input_ids[token + 1] if token + 1 < end else -1
            references[token, 0] = find_row(table, a, b, c)
            if references[token, 0] < 0:
                if a >= 0:
                    references[token, 1] = find_row(table, a, b, -1)
                if c >= 0:
                    references[token, 2] = find_row(table, -1, b, c)
    return references
