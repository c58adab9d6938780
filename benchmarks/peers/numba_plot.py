"""The PLOT baseline: typed numba dictionaries into float16 rows, gathered and summed in compiled loops.

This is how the published systems retrieve (a dictionary of n-grams, rows in a memory map), with its loops
compiled and, where it helps, parallel. It computes HMI's merge up to the sum of the rows; position and
LayerNorm, which HMI's merge includes, are spared it. numba has no float16 on a CPU: rows come as their bits
and are widened by integer operations, which its compiler vectorizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

__all__ = ["NumbaPlot", "build_dictionary", "find_row"]

_SLOT_BITS = 21
_Array = npt.NDArray[Any]


class NumbaPlot:
    """N-gram rows [N, W, H] and unigram rows [V, 3, H], both float16 and possibly memory-mapped."""

    def __init__(self, keys: _Array, rows: _Array, unigrams: _Array, *, window: int, parallel: bool) -> None:
        """``keys`` int64 [N] as HMI's; ``parallel`` runs the sequences of a batch on all threads."""
        self._table = build_dictionary(keys)
        self._rows = rows.view(np.uint16)
        self._unigrams = unigrams.view(np.uint16)
        kernel = _merge_bigrams if window == 2 else _merge_trigrams
        self._merge: Callable[..., None] = numba.njit(parallel=parallel, fastmath=True)(kernel)

    def run(self, input_ids: _Array, offsets: _Array) -> _Array:
        """input_ids int32 [T], offsets int64 [S+1] -> float32 [T, H], the merge before its LayerNorm."""
        output = np.empty((len(input_ids), self._unigrams.shape[2]), dtype=np.float32)
        self._merge(self._table, self._rows, self._unigrams, input_ids, offsets, output)
        return output


def build_dictionary(keys: _Array) -> Any:
    """A typed dictionary from key to row number."""
    table = numba.typed.Dict.empty(numba.int64, numba.int64)
    _fill(table, keys)
    return table


@numba.njit
def _fill(table: Any, keys: _Array) -> None:
    for row in range(len(keys)):
        table[keys[row]] = row


@numba.njit(inline="always")
def _key(a: int, b: int, c: int) -> int:
    return ((a + 1) << (2 * _SLOT_BITS)) | ((b + 1) << _SLOT_BITS) | (c + 1)


@numba.njit(inline="always")
def _widen(half: Any) -> Any:
    """The float32 value of a finite float16, from its bits (subnormals too)."""
    bits = np.uint32(half)
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * np.float32(2.0**112)
    return -magnitude if bits & np.uint32(0x8000) else magnitude


@numba.njit(inline="always")
def find_row(table: Any, a: int, b: int, c: int) -> int:
    """The row of the window with these tokens in its slots (-1: absent), or -1."""
    return int(table.get(_key(a, b, c), -1))


def _merge_bigrams(
    table: Any, rows: _Array, unigrams: _Array, input_ids: _Array, offsets: _Array, output: _Array
) -> None:
    for sequence in numba.prange(len(offsets) - 1):
        start, end = offsets[sequence], offsets[sequence + 1]
        before = -1
        for token in range(start, end):
            after = -1
            if token + 1 < end:
                after = find_row(table, input_ids[token], input_ids[token + 1], -1)
            unigram = unigrams[input_ids[token]]
            from_left = rows[before, 1] if before >= 0 else unigram[1]
            from_right = rows[after, 0] if after >= 0 else unigram[2]
            if token > start and token + 1 < end:
                for column in range(output.shape[1]):
                    brackets = _widen(from_left[column]) + _widen(from_right[column])
                    output[token, column] = brackets - _widen(unigram[0, column])
            else:  # at an end one neighbor says all, and a lone token itself
                only = from_left if token > start else from_right if token + 1 < end else unigram[0]
                for column in range(output.shape[1]):
                    output[token, column] = _widen(only[column])
            before = after


def _merge_trigrams(
    table: Any, rows: _Array, unigrams: _Array, input_ids: _Array, offsets: _Array, output: _Array
) -> None:
    for sequence in numba.prange(len(offsets) - 1):
        start, end = offsets[sequence], offsets[sequence + 1]
        output[start:end] = 0
        for token in range(start, end):
            a = input_ids[token - 1] if token > start else -1
            b = input_ids[token]
            c = input_ids[token + 1] if token + 1 < end else -1
            row = find_row(table, a, b, c)
            if row >= 0:
                for column in range(output.shape[1]):
                    output[token, column] += _widen(rows[row, 1, column])
                    if token > start:
                        output[token - 1, column] += _widen(rows[row, 0, column])
                    if token + 1 < end:
                        output[token + 1, column] += _widen(rows[row, 2, column])
                continue
            left = find_row(table, a, b, -1) if a >= 0 else -1
            right = find_row(table, -1, b, c) if c >= 0 else -1
            unigram = unigrams[b]
            for column in range(output.shape[1]):
                base = _widen(unigram[1, column])
                middle = base
                if left >= 0:
                    middle += _widen(rows[left, 1, column]) - base
                if right >= 0:
                    middle += _widen(rows[right, 1, column]) - base
                output[token, column] += middle
                if a >= 0:
                    first = rows[left, 0, column] if left >= 0 else unigrams[a, 0, column]
                    output[token - 1, column] += _widen(first)
                if c >= 0:
                    last = rows[right, 2, column] if right >= 0 else unigrams[c, 2, column]
                    output[token + 1, column] += _widen(last)
