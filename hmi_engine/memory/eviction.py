"""Which tenant leaves memory when another needs its room."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable
from typing import Generic, Protocol, TypeVar

from hmi_engine.lazy_heap import LazyHeap

__all__ = ["DemandQueue", "EvictionPolicy", "FrequencyPerByte", "Tickets"]

Key = TypeVar("Key", bound=Hashable)
_Key_contra = TypeVar("_Key_contra", bound=Hashable, contravariant=True)

Tickets = list[tuple[int, Key]]
"""Requests that wait: their number in the order of arrival, and what they need."""

FIXED_COST_BYTES = 800_000
HALF_LIFE_TURNOVERS = 1.0


class EvictionPolicy(Protocol[_Key_contra]):
    """Orders what may be evicted. A key is offered or it is not; only offered ones are evicted.

    Calls are not thread-safe; every one takes logarithmic time at most, amortized.
    """

    def used(self, key: _Key_contra, num_bytes: int) -> None:
        """A request came for ``key``, of so many bytes, whether it is in memory or not."""

    def offer(self, key: _Key_contra) -> None:
        """``key``, which was ``used``, is in memory and may be evicted."""

    def withdraw(self, key: _Key_contra) -> None:
        """``key`` must stay from now on; does nothing for one that was not offered."""


class FrequencyPerByte(Generic[Key]):
    """Evicts what costs least to be without: decayed frequency times the cost of a miss, per byte held.

    A miss costs a fixed part and one by bytes. Frequencies halve after as many evictions as there are
    tenants in memory, so that memory which turns over fast forgets fast, and they outlive eviction in a
    bounded table: a tenant that comes back is known. All decay together, so the order of two tenants
    changes only when one is used, and a heap of logarithms, counted from a fixed origin, needs no ageing.

    Method: GreedyDual-Size-Frequency (Cherkasova, HP Labs 1998) with the exponential decay of LRFU (Lee et
    al., "LRFU: a spectrum of policies", IEEE Trans. Computers 2001) in place of its inflation value. Chosen,
    with its two constants, by ``benchmarks/residency.py``.
    """

    def __init__(
        self,
        max_known: int = 1 << 16,
        *,
        fixed_cost_bytes: float = FIXED_COST_BYTES,
        half_life: float = HALF_LIFE_TURNOVERS,
    ) -> None:
        """Knows nobody yet.

        Args:
            max_known: most tenants whose frequencies are remembered, or twice those in memory.
            fixed_cost_bytes: how many bytes take as long to load as a load takes beside its bytes.
            half_life: of frequencies, in evictions of as many tenants as are in memory.
        """
        self._max_known = max_known
        self._fixed_cost_bytes = fixed_cost_bytes
        self._half_life = half_life
        self._now = 0.0  # half-lives
        self._frequencies: dict[Key, float] = {}  # log2 of the frequency, of the origin's worth
        self._worth: dict[Key, float] = {}  # log2 of the miss's cost per byte
        self._heap = LazyHeap[Key, float]()

    def __len__(self) -> int:
        """How many may be evicted."""
        return len(self._heap)

    def used(self, key: Key, num_bytes: int) -> None:
        """Counts; see :class:`EvictionPolicy`."""
        before = self._frequencies.get(key)
        if before is None:
            self._forget_some()
            self._worth[key] = math.log2((self._fixed_cost_bytes + num_bytes) / max(1, num_bytes))
            self._frequencies[key] = self._now
        else:
            self._frequencies[key] = self._now + math.log2(1 + 2.0 ** (before - self._now))
        if key in self._heap:
            self.offer(key)

    def offer(self, key: Key) -> None:
        """Lets it go; see :class:`EvictionPolicy`."""
        frequency = self._frequencies.setdefault(key, self._now)  # it may have been forgotten while in use
        self._heap.put(key, frequency + self._worth.get(key, 0.0))

    def withdraw(self, key: Key) -> None:
        """Keeps it; see :class:`EvictionPolicy`."""
        self._heap.remove(key)

    def evict(self) -> Key | None:
        """Takes the key of the least worth; None if none was offered."""
        if not len(self._heap):
            return None
        self._now += 1 / (self._half_life * len(self._heap))
        return self._heap.pop()

    def forget(self, key: Key) -> None:
        """Nobody will ask for ``key`` again."""
        self._heap.remove(key)
        self._frequencies.pop(key, None)
        self._worth.pop(key, None)

    def _forget_some(self) -> None:
        """Keeps the table bounded: a quarter of it, the least frequent that are not in memory, goes."""
        bound = max(self._max_known, 2 * len(self._heap))
        if len(self._frequencies) < bound:
            return
        absent = [key for key in self._frequencies if key not in self._heap]
        for key in heapq.nsmallest(bound // 4 + 1, absent, key=self._frequencies.__getitem__):
            self.forget(key)


class DemandQueue(Generic[Key]):
    """Lets a policy evict only what no queued request needs; if all are needed, the one needed last goes.

    Evicting what is needed farthest in the future is Belady's rule ("A study of replacement algorithms for a
    virtual-storage computer", IBM Systems Journal 1966); a queue is a piece of the future that is known.
    Not thread-safe; calls take logarithmic time, amortized.
    """

    def __init__(self, policy: FrequencyPerByte[Key]) -> None:
        """``policy`` decides among those that nobody waits for."""
        self._policy = policy
        self._offered: set[Key] = set()
        self._needed = LazyHeap[Key, float]()  # of those offered, by next need, the last first
        self._waiting: dict[Key, list[int]] = {}  # heaps of numbers
        self._fulfilled: set[int] = set()
        self._next_number = 0

    def expect(self, keys: Iterable[Key]) -> Tickets[Key]:
        """Notes requests, in the order in which they will run, after all that were noted before."""
        tickets: Tickets[Key] = []
        for key in keys:
            tickets.append((self._next_number, key))
            heapq.heappush(self._waiting.setdefault(key, []), self._next_number)
            self._next_number += 1
            self._place(key)
        return tickets

    def release(self, tickets: Tickets[Key]) -> None:
        """Forgets requests that have run or will not."""
        for number, key in tickets:
            waiting = self._waiting[key]
            self._fulfilled.add(number)
            while waiting and waiting[0] in self._fulfilled:
                self._fulfilled.discard(heapq.heappop(waiting))
            if not waiting:
                del self._waiting[key]
            self._place(key)

    def forget_from(self, number: int) -> None:
        """Forgets the requests from a ticket's number on, though an exception came while they were noted."""
        for key, waiting in list(self._waiting.items()):
            if left := [each for each in waiting if each < number]:
                heapq.heapify(left)
                self._waiting[key] = left
            else:
                del self._waiting[key]
            self._place(key)

    def used(self, key: Key, num_bytes: int) -> None:
        """A request for ``key`` runs."""
        self._policy.used(key, num_bytes)

    def offer(self, key: Key) -> None:
        """``key`` is in memory and not in use."""
        self._offered.add(key)
        self._place(key)

    def withdraw(self, key: Key) -> None:
        """``key`` is in use, or not in memory any more."""
        self._offered.discard(key)
        self._needed.remove(key)
        self._policy.withdraw(key)

    def evict(self, *, spare_needed: bool = False) -> Key | None:
        """Takes a key that leaves; None if all are in use, or with ``spare_needed`` in use or needed."""
        key = self._policy.evict()
        if key is None and not spare_needed:
            key = self._needed.pop()
        if key is not None:
            self._offered.discard(key)
        return key

    @property
    def next_number(self) -> int:
        """Of the ticket that will be noted next."""
        return self._next_number

    def is_needed(self, key: Key, *, before: float = math.inf) -> bool:
        """Whether a queued request waits for ``key``, one whose ticket's number is less than ``before``."""
        waiting = self._waiting.get(key)
        return waiting is not None and waiting[0] < before

    def forget(self, key: Key) -> None:
        """``key`` is gone from memory and nobody will ask for it again."""
        self.withdraw(key)
        self._policy.forget(key)

    def _place(self, key: Key) -> None:
        if key not in self._offered:
            return
        waiting = self._waiting.get(key)
        if waiting:
            self._policy.withdraw(key)
            self._needed.put(key, -waiting[0])
        else:
            self._needed.remove(key)
            self._policy.offer(key)
