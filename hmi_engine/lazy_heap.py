"""A heap of keys that move often: who is evicted next, who is served next, what expires next."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["LazyHeap"]

Key = TypeVar("Key", bound=Hashable)
Order = TypeVar("Order", float, tuple[float, int])

_MIN_HEAP = 64


class LazyHeap(Generic[Key, Order]):
    """Keys by order, the least first; of equal orders, the one that was put first.

    What was put anew or removed leaves a stale entry inside, which goes when it comes up, or when there are
    three of them for each that counts. No stale entry refers to its key, so a removed key is free at once.
    ``put`` and ``pop`` take logarithmic time, amortized; the rest constant time, but for ``smallest``.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Order, int]] = []
        self._stamps: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._last_stamp = 0

    def __len__(self) -> int:
        """How many keys."""
        return len(self._stamps)

    def __contains__(self, key: Key) -> bool:
        """Whether ``key`` was put and not taken away since."""
        return key in self._stamps

    def put(self, key: Key, order: Order) -> None:
        """Adds ``key``, or moves it."""
        self.remove(key)
        self._last_stamp += 1
        self._stamps[key] = self._last_stamp
        self._keys[self._last_stamp] = key
        heapq.heappush(self._heap, (order, self._last_stamp))
        if len(self._heap) > max(_MIN_HEAP, 4 * len(self._keys)):
            self._heap = [entry for entry in self._heap if entry[1] in self._keys]
            heapq.heapify(self._heap)

    def remove(self, key: Key) -> None:
        """Takes ``key`` away; does nothing if it is not there."""
        stamp = self._stamps.pop(key, None)
        if stamp is not None:
            del self._keys[stamp]

    def first(self) -> Key | None:
        """The key of the least order, which stays; None if there is none."""
        while self._heap:
            stamp = self._heap[0][1]
            if stamp in self._keys:
                return self._keys[stamp]
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Key | None:
        """Takes the key of the least order; None if there is none."""
        key = self.first()
        if key is not None:
            heapq.heappop(self._heap)
            self.remove(key)
        return key

    def smallest(self, limit: int) -> list[Key]:
        """The first ``limit`` keys in order, which stay.

        Walks the heap from its top, so its time is that of the keys it gives and of stale entries among them.
        """
        found: list[Key] = []
        frontier = [(entry, 0) for entry in self._heap[:1]]
        while frontier and len(found) < limit:
            (_, stamp), index = heapq.heappop(frontier)
            if stamp in self._keys:
                found.append(self._keys[stamp])
            for child in range(2 * index + 1, min(2 * index + 3, len(self._heap))):
                heapq.heappush(frontier, (self._heap[child], child))
        return found
