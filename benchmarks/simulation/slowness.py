"""How slow this machine is now, beside when its stages were measured."""

from __future__ import annotations

import atexit
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from benchmarks.load_fleet import Fleet, resident_engine
from benchmarks.load_traffic import Arrivals
from benchmarks.simulation.machine import Costs
from hmi_engine.engine import Engine
from hmi_engine.request import Request
from hmi_engine.schedule.cost_model import StageCoefficients

__all__ = ["SlownessProbe", "slowed"]

_BATCHES, _BATCH_REQUESTS = 16, 32


@dataclass(frozen=True)
class SlownessProbe:
    """The same batches each time, one by one, while nothing else runs.

    Hosts that are shared become slower or faster by a third within minutes, which no count of stolen time
    shows. The simulation is of the engine, not of its host. The batches are computed in a process of their
    own: beside an engine in the same process there would be two teams of threads, each of which makes the
    other slower by a third even while it has nothing to do.

    Attributes:
        process: that computes.
        seconds: of a measurement; hosts change from one second to the next.
        usual: seconds of a token when costs were measured.
    """

    process: ProcessPoolExecutor
    seconds: float
    usual: float

    @classmethod
    @contextmanager
    def opened(cls, fleet: Fleet, *, seconds: float, usual: float = 1.0) -> Iterator[SlownessProbe]:
        """One of the fleet's engine; without ``usual`` it measures seconds of a token."""
        with ProcessPoolExecutor(1, get_context("spawn"), _Batches.open, (fleet,)) as process:
            probe = cls(process, seconds, usual)
            process.submit(_Batches.seconds_of_a_token, 0.0).result()  # no product is of a size that is new
            yield probe

    def measure(self) -> float:
        """How many times as long as usual a token takes to compute, on average."""
        return self.process.submit(_Batches.seconds_of_a_token, self.seconds).result() / self.usual


class _Batches:
    """What the probe's process computes, again and again.

    Much of it is found in the caches, so what it takes can only be compared with itself.
    """

    _opened: _Batches

    def __init__(self, engine: Engine, batches: Sequence[Sequence[Request]]) -> None:
        self._engine = engine
        self._batches = batches

    @classmethod
    def open(cls, fleet: Fleet) -> None:
        """For as long as the process lives."""
        numbers = np.arange(_BATCHES * _BATCH_REQUESTS)
        requests = fleet.requests(
            Arrivals(numbers % len(fleet.adapter_bytes), numbers % len(fleet.texts), np.zeros(len(numbers)))
        )
        batches = [
            requests[first : first + _BATCH_REQUESTS] for first in range(0, len(requests), _BATCH_REQUESTS)
        ]
        stack = ExitStack()
        _, engine = stack.enter_context(resident_engine(fleet))
        atexit.register(stack.close)
        cls._opened = cls(engine, batches)

    @classmethod
    def seconds_of_a_token(cls, seconds: float) -> float:
        """Of all batches in turn for so long, and of each at least once."""
        return cls._opened._measure(seconds)

    def _measure(self, seconds: float) -> float:
        self._engine.run(self._batches[0])
        before, end = self._engine.stats(), time.perf_counter() + seconds
        for number in itertools.count():
            if time.perf_counter() >= end and number >= len(self._batches):
                break
            self._engine.run(self._batches[number % len(self._batches)])
        after = self._engine.stats()
        return (after.compute_seconds - before.compute_seconds) / (after.tokens - before.tokens)


def slowed(costs: Costs, slowness: float) -> Costs:
    """What all stages cost on a machine that is so many times as slow."""
    return Costs(
        **{
            name: StageCoefficients(
                slowness * cost.fixed,
                slowness * cost.per_token,
                slowness * cost.per_tenant,
                slowness * cost.per_byte,
            )
            for name, cost in vars(costs).items()
        }
    )
