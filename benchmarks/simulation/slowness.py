"""How slow this machine is now, beside when its stages were measured."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from benchmarks.load_fleet import Fleet, resident_engine
from benchmarks.load_traffic import Arrivals
from benchmarks.simulation.machine import Costs
from hmi_engine.engine import Engine
from hmi_engine.request import Request
from hmi_engine.schedule.cost_model import StageCoefficients, StageWork

__all__ = ["SlownessProbe", "slowed"]

_BATCHES, _BATCH_REQUESTS = 16, 32


@dataclass(frozen=True)
class SlownessProbe:
    """The same batches each time, one by one, while nothing else runs.

    Hosts that are shared become slower or faster by a third within minutes, which no count of stolen time
    shows. The simulation is of the engine, not of its host.
    """

    engine: Engine
    batches: Sequence[Sequence[Request]]
    expected: Sequence[float]
    seconds: float

    @classmethod
    @contextmanager
    def opened(
        cls, fleet: Fleet, compute: StageCoefficients, *, variation: float, seconds: float
    ) -> Iterator[SlownessProbe]:
        """Of how ``compute`` has changed, on an engine that has all tenants of the fleet in memory.

        ``variation`` is what batches took over what it says, on average, when it was measured; ``seconds``
        are those of a measurement: such hosts change from one second to the next.
        """
        numbers = np.arange(_BATCHES * _BATCH_REQUESTS)
        drawn = Arrivals(
            numbers % len(fleet.adapter_bytes), numbers % len(fleet.texts), np.zeros(len(numbers))
        )
        requests = fleet.requests(drawn)
        tokens = np.array(fleet.num_tokens)[drawn.texts].reshape(_BATCHES, -1).sum(1).tolist()
        sizes = np.array(fleet.adapter_bytes)[drawn.tenants].reshape(_BATCHES, -1).sum(1).tolist()
        with resident_engine(fleet) as (_, engine):
            yield cls(
                engine,
                [
                    requests[first : first + _BATCH_REQUESTS]
                    for first in range(0, len(requests), _BATCH_REQUESTS)
                ],
                [
                    variation * compute.seconds(StageWork(count, _BATCH_REQUESTS, size))
                    for count, size in zip(tokens, sizes, strict=True)
                ],
                seconds,
            )

    def measure(self) -> float:
        """What batches take to compute over what they took when costs were measured, the mean."""
        self.engine.run(self.batches[0])
        before, end, expected = self.engine.stats().compute_seconds, time.perf_counter() + self.seconds, 0.0
        for number in itertools.count():
            if time.perf_counter() >= end and number >= len(self.batches):
                break
            self.engine.run(self.batches[number % len(self.batches)])
            expected += self.expected[number % len(self.batches)]
        return (self.engine.stats().compute_seconds - before) / expected


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
