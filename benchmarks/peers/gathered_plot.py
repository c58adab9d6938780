"""The PLOT baseline as published: numba searches a dictionary, numpy gathers whole rows and adds them up.

Like :mod:`benchmarks.peers.numba_plot` it is spared position and LayerNorm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.peers.numba_search import NumbaSearch

__all__ = ["GatheredPlot"]

_Array = npt.NDArray[Any]


class GatheredPlot:
    """N-gram rows [N, W, H] and unigram rows [V, H], both float16 and possibly memory-mapped."""

    def __init__(self, keys: _Array, rows: _Array, unigrams: _Array, *, window: int) -> None:
        """``keys`` int64 [N] as HMI's."""
        self._search = NumbaSearch(keys, window=window, parallel=False)
        self._rows = rows
        self._unigrams = unigrams
        self._merge = self._merge_bigrams if window == 2 else self._merge_trigrams

    def run(self, input_ids: _Array, offsets: _Array) -> _Array:
        """input_ids int32 [T], offsets int64 [S+1] -> float32 [T, H], the merge before its LayerNorm."""
        return self._merge(input_ids, offsets, self._unigrams[input_ids].astype(np.float32))

    def _gather(self, references: _Array) -> tuple[_Array, _Array]:
        """Tokens whose reference is no miss, and their rows in float32."""
        tokens = np.flatnonzero(references >= 0)
        return tokens, self._rows[references[tokens]].astype(np.float32)

    def _merge_bigrams(self, input_ids: _Array, offsets: _Array, unigrams: _Array) -> _Array:
        tokens, rows = self._gather(self._search.run(input_ids, offsets)[:, 0])
        merged = unigrams.copy()
        merged[tokens] += rows[:, 0] - unigrams[tokens]
        merged[tokens + 1] += rows[:, 1] - unigrams[tokens + 1]
        return merged

    def _merge_trigrams(self, input_ids: _Array, offsets: _Array, unigrams: _Array) -> _Array:
        references = self._search.run(input_ids, offsets)
        whole, whole_rows = self._gather(references[:, 0])
        left, left_rows = self._gather(references[:, 1])
        right, right_rows = self._gather(references[:, 2])
        merged = unigrams.copy()
        merged[whole] = whole_rows[:, 1]
        merged[left] += left_rows[:, 1] - unigrams[left]
        merged[right] += right_rows[:, 1] - unigrams[right]
        has_before, has_after = np.ones((2, len(input_ids)), dtype=bool)
        has_before[offsets[:-1]] = False
        has_after[offsets[1:] - 1] = False
        inner = has_before[whole]
        merged[whole[inner] - 1] += whole_rows[inner, 0]
        inner = has_after[whole]
        merged[whole[inner] + 1] += whole_rows[inner, 2]
        merged[left - 1] += left_rows[:, 0]
        merged[right + 1] += right_rows[:, 2]
        return merged
