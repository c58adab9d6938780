"""Other ways to decide which tenant leaves memory, as simulations over numbered tenants.

Every request's tenant must be in memory when it runs, so none of them may refuse to admit one; policies that
do elsewhere (W-TinyLFU) decide between the newcomers of before and the others.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol

__all__ = [
    "Belady",
    "LeastFrequentlyUsed",
    "LeastRecentlyUsed",
    "Policy",
    "S3Fifo",
    "WTinyLfu",
]


class Policy(Protocol):
    """What a simulation asks; the keys are numbers of tenants."""

    def used(self, key: int, num_bytes: int) -> None:
        """A request came for ``key``, whether it is in memory or not."""

    def offer(self, key: int) -> None:
        """``key`` is in memory from now on and may be evicted."""

    def evict(self) -> int | None:
        """Takes a key that leaves; None if none was offered."""


class LeastRecentlyUsed:
    """The one that was not asked for the longest goes."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def used(self, key: int, num_bytes: int) -> None:
        """Moves it to the end."""
        if key in self._order:
            self._order.move_to_end(key)

    def offer(self, key: int) -> None:
        """Puts it at the end."""
        self._order[key] = None

    def evict(self) -> int | None:
        """Takes the first."""
        return self._order.popitem(last=False)[0] if self._order else None


class LeastFrequentlyUsed:
    """The one with the fewest requests ever goes, of equals the one asked for longest ago. Nothing ages."""

    def __init__(self) -> None:
        self._heap = _Heap()
        self._counts: dict[int, int] = {}
        self._clock = 0

    def used(self, key: int, num_bytes: int) -> None:
        """Counts, also for those that are not in memory."""
        self._clock += 1
        self._counts[key] = self._counts.get(key, 0) + 1
        if key in self._heap:
            self.offer(key)

    def offer(self, key: int) -> None:
        """Orders it by count, then by time."""
        self._heap.put(key, (self._counts[key], self._clock))

    def evict(self) -> int | None:
        """Takes the least."""
        return self._heap.pop()


class S3Fifo:
    """Three FIFO queues: newcomers (a tenth of the bytes), those asked for again, and names of the evicted.

    Yang, Zhang, Qiu, Yue and Vigfusson, "FIFO queues are all you need for cache eviction", SOSP 2023.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._small_bytes = capacity_bytes // 10
        self._ghost_bytes = capacity_bytes - self._small_bytes
        self._small, self._main, self._ghosts = _Fifo(), _Fifo(), _Fifo()
        self._sizes: dict[int, int] = {}
        self._uses: dict[int, int] = {}

    def used(self, key: int, num_bytes: int) -> None:
        """Counts up to three."""
        self._sizes[key] = num_bytes
        if key in self._uses:
            self._uses[key] = min(3, self._uses[key] + 1)

    def offer(self, key: int) -> None:
        """To the newcomers, or to the others if it was evicted from the newcomers lately."""
        self._uses[key] = 0
        (self._main if self._ghosts.remove(key) else self._small).append(key, self._sizes[key])

    def evict(self) -> int | None:
        """From the newcomers, if they have more than their share, else from the others."""
        while self._small.keys or self._main.keys:
            if self._small.num_bytes > self._small_bytes or not self._main.keys:
                key = self._small.popleft()
                if self._uses[key] > 1:
                    self._uses[key] = 0
                    self._main.append(key, self._sizes[key])
                    continue
                self._remember(key)
            else:
                key = self._main.popleft()
                if self._uses[key] > 0:
                    self._uses[key] -= 1
                    self._main.append(key, self._sizes[key])
                    continue
            del self._uses[key]
            return key
        return None

    def _remember(self, key: int) -> None:
        self._ghosts.append(key, self._sizes[key])
        while self._ghosts.num_bytes > self._ghost_bytes:
            self._ghosts.popleft()


class WTinyLfu:
    """A window of recent ones (1 % of the bytes) before a segmented LRU that the more frequent enter.

    Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ACM TOS 2017. Counts
    are exact here, in place of a sketch, and halved after ten requests for each tenant that was seen.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._window_bytes = capacity_bytes // 100
        self._protected_bytes = (capacity_bytes - self._window_bytes) * 4 // 5
        self._window, self._probation, self._protected = _Fifo(), _Fifo(), _Fifo()
        self._sizes: dict[int, int] = {}
        self._candidates: list[int] = []
        self._counts: dict[int, int] = {}
        self._sample = 0

    def used(self, key: int, num_bytes: int) -> None:
        """Counts and moves it within its segment, or to the protected."""
        self._sizes[key] = num_bytes
        self._count(key)
        if self._window.remove(key):
            self._window.append(key, num_bytes)
        elif self._protected.remove(key) or self._probation.remove(key):
            self._protected.append(key, num_bytes)
            while self._protected.num_bytes > self._protected_bytes:
                demoted = self._protected.popleft()
                self._probation.append(demoted, self._sizes[demoted])

    def offer(self, key: int) -> None:
        """To the window; what it has too much of moves on and has to stand its trial."""
        self._window.append(key, self._sizes[key])
        while self._window.num_bytes > self._window_bytes and len(self._window.keys) > 1:
            moved = self._window.popleft()
            self._probation.append(moved, self._sizes[moved])
            self._candidates.append(moved)

    def evict(self) -> int | None:
        """The rarer of who left the window last and the oldest of the others; without a trial the oldest."""
        while self._candidates:
            candidate = self._candidates.pop()
            victim = self._probation.first()
            if victim is None or candidate not in self._probation.keys:
                continue
            rarer = victim if self._counts[candidate] > self._counts[victim] else candidate
            self._probation.remove(rarer)
            return rarer
        for segment in (self._probation, self._protected, self._window):
            if segment.keys:
                return segment.popleft()
        return None

    def _count(self, key: int) -> None:
        self._counts[key] = self._counts.get(key, 0) + 1
        self._sample += 1
        if self._sample > 10 * len(self._counts):
            self._counts = {known: count // 2 for known, count in self._counts.items()}
            self._sample //= 2


class Belady:
    """Knows the future: the one needed farthest from now goes, those never needed again first.

    The optimum where all are equally large; where they are not, a policy that prefers many small ones to few
    large ones can miss less often, as finding the optimum is NP-hard (Chrobak, Woeginger, Makino and Xu,
    "Caching is hard - even in the fault model", Algorithmica 2012).
    """

    def __init__(self, tenants: Sequence[int]) -> None:
        self._uses: dict[int, deque[int]] = {}
        for time, key in enumerate(tenants):
            self._uses.setdefault(key, deque()).append(time)
        self._heap = _Heap()

    def used(self, key: int, num_bytes: int) -> None:
        """Goes on to the next use."""
        self._uses[key].popleft()
        if key in self._heap:
            self.offer(key)

    def offer(self, key: int) -> None:
        """Orders it by its next use."""
        uses = self._uses[key]
        self._heap.put(key, (-uses[0] if uses else -(1 << 60), 0))

    def evict(self) -> int | None:
        """Takes the one that is needed last."""
        return self._heap.pop()


class _Heap:
    """Keys by order; an entry that was put anew is skipped when its old place comes up."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], int]] = []
        self._orders: dict[int, tuple[int, int]] = {}

    def __contains__(self, key: int) -> bool:
        return key in self._orders

    def put(self, key: int, order: tuple[int, int]) -> None:
        self._orders[key] = order
        heapq.heappush(self._heap, (order, key))

    def pop(self) -> int | None:
        while self._heap:
            order, key = heapq.heappop(self._heap)
            if self._orders.get(key) == order:
                del self._orders[key]
                return key
        return None


class _Fifo:
    """A queue of keys that knows its bytes."""

    def __init__(self) -> None:
        self.keys: OrderedDict[int, int] = OrderedDict()
        self.num_bytes = 0

    def append(self, key: int, num_bytes: int) -> None:
        self.keys[key] = num_bytes
        self.num_bytes += num_bytes

    def first(self) -> int | None:
        return next(iter(self.keys), None)

    def popleft(self) -> int:
        key, num_bytes = self.keys.popitem(last=False)
        self.num_bytes -= num_bytes
        return key

    def remove(self, key: int) -> bool:
        num_bytes = self.keys.pop(key, None)
        self.num_bytes -= num_bytes or 0
        return num_bytes is not None
