"""Counts of a table's windows: kept in memory while they fit a limit, and on disk beyond it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

import hmi_kernels
from hmi_engine.construct.counting_selection import (
    CountedWindows,
    Integers,
    MergeProgress,
    right_windows,
    select_most_frequent,
    sort_pieces,
)

if TYPE_CHECKING:
    from hmi_engine.construct.counting_spill import SpilledCounts

__all__ = ["WindowCounter"]

TOKENS_AT_ONCE = 1 << 20
"""So many are counted between two looks at the memory: a single text may be larger than any batch."""

_BYTES_PER_SLOT = 16  # of a counter's table: a key and a count


class WindowCounter:
    """Counts windows of 2 or 3 tokens in about ``memory_bytes`` of memory.

    ``window=2``: bigrams. ``window=3``: trigrams, and each bigram twice: in slots 0 and 1, and in 1 and 2;
    with ``is_causal``, for a decoder, in slots 0 and 1 alone.
    Use as a context manager: what it wrote into ``scratch`` (default: the system's temporary folder) is
    removed at its end.
    """

    def __init__(
        self, window: int, memory_bytes: int, scratch: Path | None, *, is_causal: bool = False
    ) -> None:
        """Raises ValueError for another window."""
        if window not in (2, 3):
            raise ValueError(f"window must be 2 or 3, not {window}")
        self._has_right_windows = window == 3 and not is_causal
        self._counters = [hmi_kernels.NgramCounter(order) for order in range(2, window + 1)]
        self._memory_bytes = memory_bytes
        self._scratch = scratch
        self._spilled: SpilledCounts | None = None

    def __enter__(self) -> WindowCounter:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes what was written to disk."""
        if self._spilled:
            self._spilled.close()

    @property
    def total_occurrences(self) -> int:
        """Of all windows so far."""
        bigrams, *trigrams = (counter.total for counter in self._counters)
        return bigrams * (2 if self._has_right_windows else 1) + sum(trigrams)

    def add(self, input_ids: torch.Tensor, offsets: torch.Tensor) -> None:
        """Counts a batch as :func:`hmi_kernels.count_ngrams` takes it.

        Raises:
            StoreFullError: the scratch folder has no room.
        """
        for start in range(0, len(input_ids), TOKENS_AT_ONCE):
            self._make_room(min(TOKENS_AT_ONCE, len(input_ids) - start))
            for counter in self._counters:
                # With the tokens that the last n-grams of the piece go on with, and no n-gram more.
                end = start + TOKENS_AT_ONCE + counter.order - 1
                counter.add(input_ids[start:end], offsets.clamp(start, end) - start)

    def _make_room(self, num_tokens: int) -> None:
        limit = self._memory_bytes - self._database_bytes
        if any(map(len, self._counters)) and self._memory_after(num_tokens) > limit:
            self._spill()

    def take(
        self, min_count: int, max_ngrams: int | None, progress: MergeProgress | None = None
    ) -> CountedWindows:
        """What was seen at least ``min_count`` times, the ``max_ngrams`` most frequent of it (ties by key).

        The counter is empty afterwards. ``progress`` is told how many windows were read back from disk, and
        of how many.

        Raises:
            StoreFullError: the scratch folder has no room.
        """
        if not self._spilled:
            return self._take_from_memory(min_count, max_ngrams)
        self._spill()
        return self._spilled.take(
            has_right_windows=self._has_right_windows,
            min_count=min_count,
            max_ngrams=max_ngrams,
            memory_bytes=self._memory_bytes,
            progress=progress,
        )

    @property
    def _database_bytes(self) -> int:
        """What the database may take beside the counters."""
        return self._memory_bytes // 4

    def _memory_after(self, num_tokens: int) -> int:
        """The counters' memory if so many n-grams were new: a table doubles when it is half full."""
        sizes = [len(counter) + num_tokens for counter in self._counters]
        grown = [_BYTES_PER_SLOT << (2 * size - 1).bit_length() for size in sizes]
        return sum(
            max(counter.memory_bytes, after) for counter, after in zip(self._counters, grown, strict=True)
        )

    def _spill(self) -> None:
        if not self._spilled:
            # Imports DuckDB, a quarter of a second that most corpora need not wait.
            from hmi_engine.construct.counting_spill import SpilledCounts

            self._spilled = SpilledCounts(self._scratch, self._database_bytes)
        for counter in self._counters:
            for keys, counts in counter.drain():
                self._spilled.append(keys.numpy(), counts.numpy())

    def _take_from_memory(self, min_count: int, max_ngrams: int | None) -> CountedWindows:
        pieces: list[tuple[Integers, Integers]] = []
        num_distinct = 0
        for counter in self._counters:
            for all_keys, all_counts in counter.drain():
                kept = all_counts >= min_count
                keys, counts = all_keys[kept].numpy(), all_counts[kept].numpy()
                pieces.append((keys, counts))
                num_distinct += len(all_keys)
                if self._has_right_windows and counter.order == 2:
                    pieces.append((right_windows(keys), counts))
                    num_distinct += len(all_keys)
        return CountedWindows(*select_most_frequent(*sort_pieces(pieces), max_ngrams), num_distinct)
