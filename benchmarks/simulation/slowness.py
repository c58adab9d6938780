"""How slow this machine is now, beside when its stages were measured."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

import hmi_kernels
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
    shows. The simulation is of the engine, not of its host.

    Attributes:
        engine: that has all tenants of the fleet in memory.
        batches: what it computes, again and again: much of it is found in the caches, so what that takes can
            only be compared with itself.
        seconds: of a measurement; hosts change from one second to the next.
        usual: seconds of a token when costs were measured.
    """

    engine: Engine
    batches: Sequence[Sequence[Request]]
    seconds: float
    usual: float

    @classmethod
    @contextmanager
    def opened(cls, fleet: Fleet, *, seconds: float, usual: float = 1.0) -> Iterator[SlownessProbe]:
        """One of the fleet's engine; without ``usual`` it measures seconds of a token."""
        numbers = np.arange(_BATCHES * _BATCH_REQUESTS)
        requests = fleet.requests(
            Arrivals(numbers % len(fleet.adapter_bytes), numbers % len(fleet.texts), np.zeros(len(numbers)))
        )
        batches = [
            requests[first : first + _BATCH_REQUESTS] for first in range(0, len(requests), _BATCH_REQUESTS)
        ]
        with resident_engine(fleet) as (_, engine):
            for batch in batches:  # no product is of a size that is new
                engine.run(batch)
            hmi_kernels.release_team()  # a second one would slow down the engine that is measured
            yield cls(engine, batches, seconds, usual)

    def measure(self) -> float:
        """How many times as long as usual a token takes to compute, on average."""
        self.engine.run(self.batches[0])
        before, end = self.engine.stats(), time.perf_counter() + self.seconds
        for number in itertools.count():
            if time.perf_counter() >= end and number >= len(self.batches):
                break
            self.engine.run(self.batches[number % len(self.batches)])
        after = self.engine.stats()
        hmi_kernels.release_team()
        return (after.compute_seconds - before.compute_seconds) / (after.tokens - before.tokens) / self.usual


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
