"""One flat block of memory that holds the parameters of all resident tenants."""

from __future__ import annotations

import bisect

import torch

__all__ = ["AdapterArena"]

_GRANULE = 1024  # elements; whole pages, so that a load never shares a page with another tenant's slot


class AdapterArena:
    """A float32 block with best-fit allocation; freed neighbours grow together again.

    The smallest range that is long enough is taken: with sizes mixed as tenants' are, 3 % to 7 % more of the
    block is in use than where the first one is (``benchmarks/residency.py``). The operating system gives
    pages as tenants arrive, so an unused capacity costs nothing. Not thread-safe.
    """

    def __init__(self, capacity_bytes: int) -> None:
        granules = max(1, capacity_bytes // (_GRANULE * 4))
        self.memory = torch.empty(granules * _GRANULE, dtype=torch.float32)
        self.used_bytes = 0
        # Free ranges in granules, by start and by length.
        self._starts: list[int] = []
        self._lengths: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []
        self._add_free(0, granules)

    @property
    def capacity_bytes(self) -> int:
        """Size of the block."""
        return self.memory.numel() * 4

    @property
    def largest_free_bytes(self) -> int:
        """The most that one allocation can get now."""
        return self._by_length[-1][0] * _GRANULE * 4 if self._by_length else 0

    @staticmethod
    def allocated_bytes(num_elements: int) -> int:
        """Bytes that an allocation of ``num_elements`` takes."""
        return -(-num_elements // _GRANULE) * _GRANULE * 4

    def allocate(self, num_elements: int) -> int | None:
        """Element offset of a free range, or None where no range is long enough."""
        needed = -(-num_elements // _GRANULE)
        place = bisect.bisect_left(self._by_length, (needed, -1))
        if place == len(self._by_length):
            return None
        length, start = self._by_length[place]
        self._remove_free(start)
        if length > needed:
            self._add_free(start + needed, length - needed)
        self.used_bytes += needed * _GRANULE * 4
        return start * _GRANULE

    def release(self, offset: int, num_elements: int) -> None:
        """Gives back a range that ``allocate`` returned."""
        start, length = offset // _GRANULE, -(-num_elements // _GRANULE)
        self.used_bytes -= length * _GRANULE * 4
        if start + length in self._lengths:
            length += self._remove_free(start + length)
        place = bisect.bisect_left(self._starts, start) - 1
        if place >= 0 and self._starts[place] + self._lengths[self._starts[place]] == start:
            start = self._starts[place]
            length += self._remove_free(start)
        self._add_free(start, length)

    def _add_free(self, start: int, length: int) -> None:
        self._lengths[start] = length
        bisect.insort(self._starts, start)
        bisect.insort(self._by_length, (length, start))

    def _remove_free(self, start: int) -> int:
        length = self._lengths.pop(start)
        del self._starts[bisect.bisect_left(self._starts, start)]
        del self._by_length[bisect.bisect_left(self._by_length, (length, start))]
        return length
