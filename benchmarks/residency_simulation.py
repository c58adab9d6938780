"""Memory as a simulation: which requests find their tenant, under a policy, a budget and a trace."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.residency_policies import Policy
from benchmarks.residency_traces import Trace
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.memory.eviction import DemandQueue, FrequencyPerByte, Tickets
from hmi_engine.memory.ranges import Move, RangeAllocator

__all__ = [
    "FirstFit",
    "Outcome",
    "QueueKnown",
    "in_bytes",
    "in_granules",
    "simulate",
    "simulate_arena",
]

_GRANULE_BYTES = AdapterArena.allocated_bytes(1)


@dataclass
class Outcome:
    """What a trace cost.

    Attributes:
        requests: of the trace.
        misses: requests whose tenant was not in memory.
        bytes_read: to bring them in.
        moves: tenants that were moved within the arena.
        bytes_moved: by that.
        used_share: of the arena, on average over the misses; 0 where there is no arena.
    """

    requests: int = 0
    misses: int = 0
    bytes_read: int = 0
    moves: int = 0
    bytes_moved: int = 0
    used_share: float = 0.0


class QueueKnown:
    """The engine's policy with knowledge of the next ``length`` requests of a trace; a ``Policy``."""

    def __init__(self, tenants: Sequence[int], length: int) -> None:
        self._queue = DemandQueue[int](FrequencyPerByte())
        self._future: Iterator[int] = iter(tenants)
        self._tickets: deque[Tickets[int]] = deque()
        for _ in range(length):
            self._expect_next()

    def _expect_next(self) -> None:
        key = next(self._future, None)
        self._tickets.append(self._queue.expect([] if key is None else [key]))

    def used(self, key: int, num_bytes: int) -> None:
        """The request at the head of the queue runs, and one more is known."""
        self._queue.used(key, num_bytes)
        self._queue.release(self._tickets.popleft())
        self._expect_next()

    def offer(self, key: int) -> None:
        """As the engine does when a batch has run."""
        self._queue.offer(key)

    def evict(self) -> int | None:
        """As the engine does when it needs room."""
        return self._queue.evict()


def simulate(trace: Trace, policy: Policy, capacity: int) -> Outcome:
    """One request after another over a memory without fragments, of ``capacity`` bytes."""
    outcome = Outcome(requests=len(trace.tenants))
    sizes = trace.sizes
    resident: set[int] = set()
    free = capacity
    for key in trace.tenants:
        size = sizes[key]
        policy.used(key, size)
        if key in resident:
            continue
        outcome.misses += 1
        outcome.bytes_read += size
        while size > free:
            victim = policy.evict()
            if victim is None:
                raise ValueError(f"a tenant of {size} bytes is larger than the memory of {capacity}")
            resident.remove(victim)
            free += sizes[victim]
        free -= size
        resident.add(key)
        policy.offer(key)
    return outcome


class FirstFit(RangeAllocator):
    """Takes the first range that is long enough, not the smallest."""

    def _choose(self, length: int) -> int | None:
        return next((start for start in self._free_starts if self._free[start] >= length), None)


def simulate_arena(trace: Trace, policy: Policy, ranges: RangeAllocator, *, most_moved: float) -> Outcome:
    """The same over an arena, whose numbers are granules.

    Where what is free lies in pieces, tenants are moved together, if ``most_moved`` of the size that is
    needed is enough, or else more of them are evicted.
    """
    outcome = Outcome(requests=len(trace.tenants))
    starts: dict[int, int] = {}
    owners: dict[int, int] = {}
    used = 0.0
    for key in trace.tenants:
        policy.used(key, trace.sizes[key])
        if key in starts:
            continue
        outcome.misses += 1
        outcome.bytes_read += trace.sizes[key]
        length = in_granules(trace.sizes[key])
        while (start := ranges.allocate(length)) is None:
            moves = ranges.slide(length, most=most_moved * length) if ranges.free >= length else None
            if moves is not None:
                _follow(moves, starts, owners, outcome)
                continue
            victim = policy.evict()
            if victim is None:
                raise ValueError("a tenant is larger than the arena")
            del owners[starts[victim]]
            ranges.release(starts.pop(victim))
        starts[key], owners[start] = start, key
        policy.offer(key)
        used += ranges.used / ranges.size
    outcome.used_share = used / max(1, outcome.misses)
    return outcome


def in_bytes(granules: int) -> int:
    """Bytes of so many granules."""
    return granules * _GRANULE_BYTES


def in_granules(num_bytes: int) -> int:
    """Granules that a tenant takes of an arena."""
    return AdapterArena.allocated_bytes(num_bytes // 4) // _GRANULE_BYTES


def _follow(moves: Sequence[Move], starts: dict[int, int], owners: dict[int, int], outcome: Outcome) -> None:
    for move in moves:
        key = owners.pop(move.start)
        starts[key], owners[move.target] = move.target, key
        outcome.moves += 1
        outcome.bytes_moved += move.length * _GRANULE_BYTES
