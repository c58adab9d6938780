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

__all__ = ["Cluster", "Simulated", "closed_loop", "open_loop"]

_Floats = npt.NDArray[np.float64]


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
    """What became of the requests, in simulated seconds.

    Attributes:
        outcomes: of all requests that were sent.
        times: of all engines' stages; of a closed loop without an end from the middle of the requests on.
        hits: tenants of batches that were in memory, of the same time.
        misses: those that were not.
        engines: int64 [n], which engine each request went to.
    """

    outcomes: Outcomes
    times: EngineTimes
    hits: int
    misses: int
    engines: npt.NDArray[np.int64]


class _Run:
    """One simulation: engines, who has what open, and who asks next."""

    def __init__(
        self,
        cluster: Cluster,
        workload: Workload,
        outcomes: Outcomes,
        warm_up: Callable[[Sequence[SimulatedEngine], AffinityRouter], None] | None,
    ) -> None:
        self.environment = simpy.Environment()
        self.outcomes = outcomes
        self.router = AffinityRouter(
            cluster.num_engines,
            balance=cluster.balance,
            # A batch's worth is no load that is worth while to move a tenant for.
            always=int(cluster.machine.max_batch_tokens / max(1.0, float(workload.tokens.mean()))),
        )
        self._workload = workload
        self._first = self.router.first_choices(workload.tenants)
        self._loads = [0] * cluster.num_engines
        self._total_load = 0
        self.engine_of = np.full(len(workload.tenants), -1, dtype=np.int64)
        self.on_end: Callable[[], None] | None = None
        self.engines = [
            SimulatedEngine(
                self.environment,
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
            warm_up(self.engines, self.router)

    def send(self, number: int) -> None:
        engine = 0
        if len(self.engines) > 1:
            tenant, first = int(self._workload.tenants[number]), int(self._first[number])
            engine = self.router.route(tenant, first, self._loads, self._total_load)
        self.engine_of[number] = engine
        self._loads[engine] += 1
        self._total_load += 1
        self.engines[engine].arrive(number)

    def _end(self, number: int, fate: Fate) -> None:
        self.outcomes.end(number, fate, self.environment.now)
        self._loads[int(self.engine_of[number])] -= 1
        self._total_load -= 1
        if self.on_end is not None:
            self.on_end()

    def counts(self) -> tuple[EngineTimes, int, int]:
        total = EngineTimes()
        for engine in self.engines:
            for name, value in vars(engine.times).items():
                setattr(total, name, getattr(total, name) + value)
        tiers = [engine.memory.arena for engine in self.engines]
        return total, sum(tier.hits for tier in tiers), sum(tier.misses for tier in tiers)

    def result(self, since: tuple[EngineTimes, int, int], num_sent: int) -> Simulated:
        times, hits, misses = self.counts()
        sent = np.arange(len(self.outcomes)) < num_sent
        return Simulated(
            self.outcomes.select(sent),
            times.since(since[0]),
            hits - since[1],
            misses - since[2],
            self.engine_of[sent],
        )


WarmUp = Callable[[Sequence[SimulatedEngine], AffinityRouter], None]


def open_loop(cluster: Cluster, workload: Workload, due: _Floats, warm_up: WarmUp | None = None) -> Simulated:
    """Sends request i at ``due[i]``, float64 [n] in order, and goes on until all have ended."""
    run = _Run(cluster, workload, Outcomes(due), warm_up)

    def send_all() -> Generator[simpy.Event, None, None]:
        for number, at in enumerate(due.tolist()):
            if at > run.environment.now:
                yield run.environment.timeout(at - run.environment.now)
            run.send(number)

    before = run.counts()
    run.environment.process(send_all())
    run.environment.run()
    return run.result(before, len(due))


def closed_loop(
    cluster: Cluster,
    workload: Workload,
    *,
    concurrency: int,
    seconds: float | None = None,
    warm_up: WarmUp | None = None,
) -> Simulated:
    """Keeps ``concurrency`` requests open, the next when one has ended, until the last or for ``seconds``.

    Raises:
        ValueError: a request was refused: the queue is smaller than ``concurrency``.
    """
    run = _Run(cluster, workload, Outcomes(np.zeros(len(workload.tenants))), warm_up)
    num_requests = len(workload.tenants)
    free = concurrency
    has_room = run.environment.event()
    middle = run.counts()

    def make_room() -> None:
        nonlocal free
        free += 1
        if not has_room.triggered:
            has_room.succeed()

    num_sent = 0

    def send_all() -> Generator[simpy.Event, None, None]:
        nonlocal free, has_room, num_sent, middle
        while num_sent < num_requests and (seconds is None or run.environment.now < seconds):
            if not free:
                has_room = run.environment.event()
                yield has_room
                continue
            free -= 1
            run.outcomes.due[num_sent] = run.environment.now
            num_sent += 1
            run.send(num_sent - 1)
            if run.outcomes.fates[num_sent - 1] == Fate.REFUSED:
                raise ValueError(f"the queue refuses requests, though only {concurrency} are open")
            if seconds is None and num_sent == num_requests // 2:
                middle = run.counts()

    run.on_end = make_room
    run.environment.process(send_all())
    run.environment.run()
    return run.result(middle, num_sent)
