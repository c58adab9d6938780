"""Requests through one simulated engine or several: at their times, or so many at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simpy

from benchmarks.load_outcomes import Fate, Outcomes
from benchmarks.simulation.engine import EngineTimes, SimulatedEngine, Workload
from benchmarks.simulation.machine import Machine
from benchmarks.simulation.routing import AffinityRouter
from hmi_engine.schedule.limits import QueueLimits

__all__ = ["Cluster", "Simulated", "Simulation", "closed_loop", "open_loop"]

_Floats = npt.NDArray[np.float64]
_Steps = Generator[simpy.Event, None, None]


@dataclass(frozen=True)
class Cluster:
    """Engines of one kind, and how tenants are spread over them.

    Attributes:
        machine: of each engine.
        num_engines: how many there are.
        limits: of each engine's queue.
        timeout: seconds after which a request need not be begun.
        is_fair: whether tenants have queues of their own.
        balance: of :class:`AffinityRouter`.
    """

    machine: Machine
    num_engines: int = 1
    limits: QueueLimits | None = None
    timeout: float | None = None
    is_fair: bool = True
    balance: float = 1.25


@dataclass(frozen=True, eq=False)
class Simulated:
    """What became of requests, in simulated seconds.

    Attributes:
        outcomes: of all requests that were sent.
        times: of all engines' stages, from the middle of the requests on.
        hits: tenants of batches that were in memory, of the same time.
        misses: those that were not.
        engines: int64 [n], which engine each request went to.
    """

    outcomes: Outcomes
    times: EngineTimes
    hits: int
    misses: int
    engines: npt.NDArray[np.int64]


WarmUp = Callable[[Sequence[SimulatedEngine], AffinityRouter], None]
_Counts = tuple[EngineTimes, int, int]


class Simulation:
    """Engines that serve one part of a workload after another; what is in memory stays from part to part."""

    def __init__(self, cluster: Cluster, workload: Workload, warm_up: WarmUp | None = None) -> None:
        """Starts the engines; ``warm_up`` may put tenants into their memories."""
        self._environment = simpy.Environment()
        self._workload = workload
        self._router = AffinityRouter(
            cluster.num_engines,
            balance=cluster.balance,
            # A batch's worth is no load that is worth while to move a tenant for.
            always=int(cluster.machine.max_batch_tokens / max(1.0, float(workload.tokens.mean()))),
        )
        count = len(workload.tenants)
        self._first = self._router.first_choices(workload.tenants).tolist()
        self._tenants = workload.tenants.tolist()
        self._loads = [0] * cluster.num_engines
        self._total_load = 0
        self._engine_of = [-1] * count
        self._ends: list[tuple[Fate, float] | None] = [None] * count
        self._on_end: Callable[[], None] | None = None
        self._next = 0
        self.engines = [
            SimulatedEngine(
                self._environment,
                cluster.machine,
                workload,
                self._end,
                limits=cluster.limits,
                timeout=cluster.timeout,
                is_fair=cluster.is_fair,
            )
            for _ in range(cluster.num_engines)
        ]
        if warm_up is not None:
            warm_up(self.engines, self._router)

    def open_loop(self, due: _Floats) -> Simulated:
        """Sends the workload's next requests at ``due``, float64 [n] in order, from now; until all ended."""
        first, start = self._take(len(due)), self._environment.now
        middle = self._counts()

        def send_all() -> _Steps:
            nonlocal middle
            for place, at in enumerate(due.tolist()):
                if start + at > self._environment.now:
                    yield self._environment.timeout(start + at - self._environment.now)
                if place == len(due) // 2:
                    middle = self._counts()
                self._send(first + place)

        self._environment.process(send_all())
        self._environment.run()
        return self._result(first, due, start, middle)

    def closed_loop(self, count: int, *, concurrency: int, seconds: float | None = None) -> Simulated:
        """Keeps ``concurrency`` of the next ``count`` requests open, for ``seconds`` or until the last.

        Raises:
            ValueError: a request was refused at once: the queue is smaller than ``concurrency``.
        """
        first, start = self._take(count), self._environment.now
        due: list[float] = []
        middle = self._counts()
        free = concurrency
        has_room = self._environment.event()

        def make_room() -> None:
            nonlocal free
            free += 1
            if not has_room.triggered:
                has_room.succeed()

        def send_all() -> _Steps:
            nonlocal free, has_room, middle
            while len(due) < count and (seconds is None or self._environment.now < start + seconds):
                if not free:
                    has_room = self._environment.event()
                    yield has_room
                    continue
                if len(due) == count // 2:
                    middle = self._counts()
                free -= 1
                number = first + len(due)
                due.append(self._environment.now - start)
                self._send(number)
                if self._ends[number] is not None:
                    raise ValueError(f"the queue refuses requests, though only {concurrency} are open")

        self._on_end = make_room
        self._environment.process(send_all())
        self._environment.run()
        self._on_end = None
        return self._result(first, np.array(due), start, middle)

    def _take(self, count: int) -> int:
        """The number of the first of the next ``count`` requests."""
        first, self._next = self._next, self._next + count
        if self._next > len(self._tenants):
            raise ValueError(f"the workload has {len(self._tenants)} requests, {self._next} are asked for")
        return first

    def _send(self, number: int) -> None:
        engine = 0
        if len(self.engines) > 1:
            engine = self._router.route(
                self._tenants[number], self._first[number], self._loads, self._total_load
            )
        self._engine_of[number] = engine
        self._loads[engine] += 1
        self._total_load += 1
        self.engines[engine].arrive(number)

    def _end(self, number: int, fate: Fate) -> None:
        if self._ends[number] is not None:
            raise RuntimeError(f"request {number} ended twice")
        self._ends[number] = fate, self._environment.now
        self._loads[self._engine_of[number]] -= 1
        self._total_load -= 1
        if self._on_end is not None:
            self._on_end()

    def _counts(self) -> _Counts:
        total = EngineTimes()
        for engine in self.engines:
            for name, value in vars(engine.times).items():
                setattr(total, name, getattr(total, name) + value)
        tiers = [engine.memory.arena for engine in self.engines]
        return total, sum(tier.hits for tier in tiers), sum(tier.misses for tier in tiers)

    def _result(self, first: int, due: _Floats, start: float, since: _Counts) -> Simulated:
        outcomes = Outcomes(due)
        for place in range(len(due)):
            end = self._ends[first + place]
            if end is not None:
                outcomes.end(place, end[0], end[1] - start)
        times, hits, misses = self._counts()
        return Simulated(
            outcomes,
            times.since(since[0]),
            hits - since[1],
            misses - since[2],
            np.array(self._engine_of[first : first + len(due)], dtype=np.int64),
        )


def open_loop(cluster: Cluster, workload: Workload, due: _Floats, warm_up: WarmUp | None = None) -> Simulated:
    """All of a workload at its times; see :class:`Simulation`."""
    return Simulation(cluster, workload, warm_up).open_loop(due)


def closed_loop(
    cluster: Cluster,
    workload: Workload,
    *,
    concurrency: int,
    seconds: float | None = None,
    warm_up: WarmUp | None = None,
) -> Simulated:
    """All of a workload, so many at a time; see :class:`Simulation`."""
    simulation = Simulation(cluster, workload, warm_up)
    return simulation.closed_loop(len(workload.tenants), concurrency=concurrency, seconds=seconds)
