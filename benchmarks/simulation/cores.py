"""Processor cores that several threads share."""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import simpy

__all__ = ["SharedCores"]


class _Job(NamedTuple):
    cores: float
    contention: float | None
    event: simpy.Event


class SharedCores:
    """Cores under processor sharing: where threads ask for more than there are, all slow down alike.

    All run equally fast at any moment, at 1 or less; virtual time is the integral of that. A job that comes
    at virtual time v and takes s alone ends at virtual time v + s. Method: virtual time as for generalised
    processor sharing (Parekh and Gallager, "A generalized processor sharing approach to flow control in
    integrated services networks", IEEE/ACM Transactions on Networking 1993). Real threads lose more than
    that, as a team waits for the one of its threads that has to share a core, and all for Python's lock; or
    less, where the team has threads to spare. Each job can say how many times as slow all are where it shares
    (``contention``); of several that do, the largest counts.
    """

    def __init__(self, environment: simpy.Environment, cores: float = math.inf) -> None:
        """Nothing runs.

        Raises:
            ValueError: ``cores`` is not above 0.
        """
        if not cores > 0:
            raise ValueError(f"cores is {cores}, must be above 0")
        self._environment = environment
        self._cores = cores
        self._virtual = 0.0
        self._since = environment.now
        self._asked = 0.0  # cores, by all jobs
        self._jobs: list[tuple[float, int, _Job]] = []  # by virtual end and number
        self._num_jobs = 0
        self._turn = 0

    def work(self, seconds: float, cores: float = 1.0, *, contention: float | None = None) -> simpy.Event:
        """An event after ``seconds`` on as many ``cores``, or later where they are shared.

        Raises:
            ValueError: ``contention`` is not above 0.
        """
        if contention is not None and not contention > 0:
            raise ValueError(f"contention is {contention}, must be above 0")
        if math.isinf(self._cores) or seconds <= 0:
            return self._environment.timeout(max(0.0, seconds))
        self._advance()
        event = self._environment.event()
        self._num_jobs += 1
        heapq.heappush(self._jobs, (self._virtual + seconds, self._num_jobs, _Job(cores, contention, event)))
        self._asked += cores
        self._await_next()
        return event

    @property
    def _speed(self) -> float:
        if self._asked <= self._cores:
            return 1.0
        said = [job.contention for _, _, job in self._jobs if job.contention is not None]
        return min(1.0, self._cores / (self._asked * max(said, default=1.0)))

    def _advance(self) -> None:
        if self._jobs:
            self._virtual += (self._environment.now - self._since) * self._speed
        self._since = self._environment.now

    def _await_next(self) -> None:
        self._turn += 1
        turn = self._turn
        pause = max(0.0, self._jobs[0][0] - self._virtual) / self._speed
        timeout = self._environment.timeout(pause)
        timeout.callbacks.append(lambda _: self._end(turn))

    def _end(self, turn: int) -> None:
        if turn != self._turn:
            return  # a job has come since, and another timeout with it
        self._since = self._environment.now
        self._virtual = self._jobs[0][0]
        while self._jobs and self._jobs[0][0] <= self._virtual:
            _, _, job = heapq.heappop(self._jobs)
            self._asked -= job.cores
            job.event.succeed()
        if self._jobs:
            self._await_next()
        else:
            self._asked = 0.0
