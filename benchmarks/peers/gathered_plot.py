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
    """N-gram rows [N, W, H] and unigram rows [V, 3, H], both float16 and possibly memory-mapped."""

    def __init__(self, keys: _Array, rows: _Array, unigrams: _Array, *, window: int) -> None:
        """``keys`` int64 [N] as HMI's."""
        self._search = NumbaSearch(keys, window=window, parallel=False)
        self._rows = rows
        self._unigrams = unigrams
        self._merge = self._merge_bigrams if window == 2 else self._merge_trigrams

    def run(self, input_ids: _Array, offsets: _Array) -> _Array:
        """input_ids int32 [T], offsets int64 [S+1] -> float32 [T, H], the merge before its LayerNorm."""
        has_before, has_after = np.ones((2, len(input_ids)), dtype=bool)
        has_before[offsets[:-1]] = False
        has_after[offsets[1:] - 1] = False
        return self._merge(input_ids, offsets, has_before, has_after)

    def _unigram(self, tokens: _Array, slot: int) -> _Array:
        return self._unigrams[tokens, slot].astype(np.float32)

    def _gather(self, references: _Array) -> tuple[_Array, _Array]:
        """Tokens whose reference is no miss, and their rows in float32."""
        tokens = np.flatnonzero(references >= 0)
        return tokens, self._rows[references[tokens]].astype(np.float32)

    def _merge_bigrams(
        self, input_ids: _Array, offsets: _Array, has_before: _Array, has_after: _Array
    ) -> _Array:
        references = self._search.run(input_ids, offsets)[:, 0]
        tokens, rows = self._gather(references)
        lone, begun = np.flatnonzero(has_after & (references < 0)), np.zeros(len(input_ids), dtype=bool)
        begun[tokens + 1] = True
        ended = np.flatnonzero(has_before & ~begun)
        # Brackets around the lone token: as many as it has neighbors.
        merged = self._unigram(input_ids, 0) * (1.0 - has_before - has_after)[:, None].astype(np.float32)
        merged[tokens] += rows[:, 0]
        merged[tokens + 1] += rows[:, 1]
        merged[lone] += self._unigram(input_ids[lone], 2)
        merged[ended] += self._unigram(input_ids[ended], 1)
        return merged

    def _merge_trigrams(
        self, input_ids: _Array, offsets: _Array, has_before: _Array, has_after: _Array
    ) -> _Array:
        references = self._search.run(input_ids, offsets)
        whole, whole_rows = self._gather(references[:, 0])
        left, left_rows = self._gather(references[:, 1])
        right, right_rows = self._gather(references[:, 2])
        middle = self._unigram(input_ids, 1)
        merged = middle.copy()
        merged[whole] = whole_rows[:, 1]
        merged[left] += left_rows[:, 1] - middle[left]
        merged[right] += right_rows[:, 1] - middle[right]
        told_before, told_after = ~has_before, ~has_after  # what the windows beside a token say of it
        inner = has_before[whole]
        merged[whole[inner] - 1] += whole_rows[inner, 0]
        told_after[whole[inner] - 1] = True
        inner = has_after[whole]
        merged[whole[inner] + 1] += whole_rows[inner, 2]
        told_before[whole[inner] + 1] = True
        merged[left - 1] += left_rows[:, 0]
        told_after[left - 1] = True
        merged[right + 1] += right_rows[:, 2]
        told_before[right + 1] = True
        for untold, slot in ((np.flatnonzero(~told_before), 2), (np.flatnonzero(~told_after), 0)):
            merged[untold] += self._unigram(input_ids[untold], slot)
        return merged
