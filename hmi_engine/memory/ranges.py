"""Ranges of one block of memory: handed out by best fit, given back, and slid together."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

__all__ = ["Move", "RangeAllocator"]


class Move(NamedTuple):
    """A range that goes from ``start`` down to ``target``; the two may overlap."""

    start: int
    target: int
    length: int


class RangeAllocator:
    """Numbers from 0 on, in ranges: the smallest free one that is long enough is taken.

    What is free but lies in pieces, :meth:`slide` brings together. Not thread-safe; ``allocate`` and
    ``release`` take the time of a few bisections, ``slide`` looks at every hole.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self._taken: dict[int, int] = {}  # lengths by start
        self._free: dict[int, int] = {}
        self._free_starts: list[int] = []
        self._free_by_length: list[tuple[int, int]] = []
        if size:
            self._add_free(0, size)

    def keep_only(self, taken: Mapping[int, int]) -> None:
        """Frees all but some taken ranges, lengths by start, whatever state an exception has left."""
        self._taken, self.used = dict(taken), sum(taken.values())
        self._free, self._free_starts, self._free_by_length = {}, [], []
        end = 0
        for start, length in [*sorted(taken.items()), (self.size, 0)]:
            if end < start:
                self._add_free(end, start - end)
            end = start + length

    @property
    def free(self) -> int:
        """Length of all free ranges together."""
        return self.size - self.used

    @property
    def largest_free(self) -> int:
        """The most that one allocation can get now."""
        return self._free_by_length[-1][0] if self._free_by_length else 0

    def allocate(self, length: int) -> int | None:
        """Start of a free range of ``length`` >= 1, from now on taken, or None where none is long enough."""
        start = self._choose(length)
        if start is None:
            return None
        free = self._remove_free(start)
        if free > length:
            self._add_free(start + length, free - length)
        self._taken[start] = length
        self.used += length
        return start

    def release(self, start: int) -> None:
        """Gives back a range that ``allocate`` returned or ``slide`` moved; free neighbours become one."""
        length = self._taken.pop(start)
        self.used -= length
        if start + length in self._free:
            length += self._remove_free(start + length)
        place = bisect.bisect_left(self._free_starts, start) - 1
        if place >= 0 and self._free_starts[place] + self._free[self._free_starts[place]] == start:
            start = self._free_starts[place]
            length += self._remove_free(start)
        self._add_free(start, length)

    def slide(self, length: int, fixed: Iterable[int] = (), *, most: float = math.inf) -> list[Move] | None:
        """Makes a free range of ``length`` by sliding taken ones down into the holes before them.

        Of all runs of holes that have enough together, the one with the least between them is taken. Ranges
        that start at ``fixed`` stay where they are.

        Returns:
            The moves, to be done in this order; the ranges have their new starts already. None, and nothing
            has changed, where no run of holes without a fixed range between them is long enough, or more than
            ``most`` had to be moved.
        """
        run = self._cheapest_run(length, sorted(fixed), most)
        if run is None:
            return None
        target = run[0]
        moves = []
        for start in run[:-1]:
            position = start + self._remove_free(start)
            while position in self._taken:
                size = self._taken.pop(position)
                moves.append(Move(position, target, size))
                position, target = position + size, target + size
        end = run[-1] + self._remove_free(run[-1])
        for move in moves:
            self._taken[move.target] = move.length
        self._add_free(target, end - target)
        return moves

    def _choose(self, length: int) -> int | None:
        """Start of the free range to take from."""
        place = bisect.bisect_left(self._free_by_length, (length, -1))
        return self._free_by_length[place][1] if place < len(self._free_by_length) else None

    def _cheapest_run(self, length: int, fixed: list[int], most: float) -> list[int] | None:
        """Starts of neighbouring holes, of ``length`` together, with the least to move between them."""
        best: tuple[int, int, int] | None = None  # how much is between, first and last hole
        first = total = between = 0
        holes = self._free_starts
        for last, start in enumerate(holes):
            if last:
                previous_end = holes[last - 1] + self._free[holes[last - 1]]
                place = bisect.bisect_left(fixed, previous_end)
                if place < len(fixed) and fixed[place] < start:
                    first, total, between = last, 0, 0
                else:
                    between += start - previous_end
            total += self._free[start]
            while total - self._free[holes[first]] >= length:
                left = holes[first] + self._free[holes[first]]
                total -= self._free[holes[first]]
                first += 1
                between -= holes[first] - left
            if total >= length and between <= most and (best is None or between < best[0]):
                best = between, first, last
        return None if best is None else holes[best[1] : best[2] + 1]

    def _add_free(self, start: int, length: int) -> None:
        self._free[start] = length
        bisect.insort(self._free_starts, start)
        bisect.insort(self._free_by_length, (length, start))

    def _remove_free(self, start: int) -> int:
        length = self._free.pop(start)
        del self._free_starts[bisect.bisect_left(self._free_starts, start)]
        del self._free_by_length[bisect.bisect_left(self._free_by_length, (length, start))]
        return length
