"""Runs of the load benchmark: how much an engine serves, and what it does under a given load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.load_fleet import Fleet
from benchmarks.load_generator import LoadGenerator, Run
from benchmarks.load_outcomes import Outcomes, Sample
from benchmarks.load_traffic import Arrivals, draw_arrivals
from benchmarks.stolen_time import least_disturbed
from hmi_engine.async_engine import AsyncEngine
from hmi_engine.schedule.limits import QueueLimits

__all__ = [
    "CONCURRENCY",
    "DEADLINE",
    "LATENCY_TARGET",
    "MOST_STOLEN",
    "TIMEOUT",
    "GeneratorCost",
    "LoadPoint",
    "capacity_of",
    "draw_closed",
    "queue_limits",
    "run_open",
    "settled",
]

DEADLINE = 1.0
"""Seconds within which an answer is good."""

LATENCY_TARGET = 0.25
"""Seconds, by which the engine sizes its batches."""

TIMEOUT = 0.7
"""Seconds after which a request need not be begun: the engine is given the rest of the deadline for it."""

QUEUE_SECONDS = 0.3
"""Of serving, that may be queued."""

CONCURRENCY = 256

MOST_STOLEN = 0.02
"""Of the processors' time: a run whose host took more is run again."""

_ATTEMPTS = 3

_Floats = npt.NDArray[np.float64]
_SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class GeneratorCost:
    """What sending took.

    Attributes:
        requests: sent.
        seconds: for which it sent.
        thread_seconds: of processor time.
        late_p50: seconds by which requests were handed over too late, median.
        late_p99: the same, 99th percentile.
    """

    requests: int
    seconds: float
    thread_seconds: float
    late_p50: float
    late_p99: float

    @classmethod
    def of(cls, run: Run) -> GeneratorCost:
        """Of one run."""
        late = np.quantile(run.lateness, [0.5, 0.99]) if len(run.lateness) else [0.0, 0.0]
        return cls(len(run.outcomes), run.seconds, run.generator_seconds, float(late[0]), float(late[1]))


@dataclass(frozen=True)
class LoadPoint:
    """One open-loop run.

    Attributes:
        rate: requests a second that were drawn for.
        sample: what is looked at.
        generator: what sending took.
        stolen: share of the processors' time that the host took meanwhile.
        attempts: runs of which this one lost the least.
    """

    rate: float
    sample: Sample
    generator: GeneratorCost
    stolen: float = 0.0
    attempts: int = 1


def queue_limits(capacity: float) -> QueueLimits:
    """What may be queued at an engine that answers ``capacity`` requests a second."""
    return QueueLimits(max_queued_requests=max(8, int(QUEUE_SECONDS * capacity)))


def draw_closed(popularity: _Floats, num_texts: int, count: int, seed: int) -> Arrivals:
    """Requests without times, of which a closed loop takes one after another."""
    generator = np.random.default_rng(seed)
    tenants = generator.choice(len(popularity), count, p=popularity)
    first = int(generator.integers(num_texts))
    return Arrivals(tenants, (first + np.arange(count)) % num_texts, np.zeros(count))


def capacity_of(
    engine: AsyncEngine, fleet: Fleet, popularity: _Floats, *, seconds: float, seed: int
) -> float:
    """Requests answered per second while there are always enough of them."""
    requests = fleet.requests(draw_closed(popularity, len(fleet.texts), 8192, seed))
    settle = min(_SETTLE_SECONDS, seconds / 4)
    run = least_disturbed(
        lambda: LoadGenerator(engine).closed_loop(requests, concurrency=CONCURRENCY, seconds=seconds),
        most_stolen=MOST_STOLEN,
        attempts=_ATTEMPTS,
    )
    return run.value.outcomes.finish_rate(settle, seconds)


def run_open(
    engine: AsyncEngine,
    fleet: Fleet,
    popularity: _Floats,
    *,
    rate: float,
    seconds: float,
    seed: int,
    of: Sequence[int] | None = None,
) -> LoadPoint:
    """Sends Poisson arrivals, and looks at those after the first moments; again where the host disturbs.

    Args:
        engine: answers.
        fleet: whose tenants are asked for.
        popularity: shares of the tenants, by number.
        rate: requests a second.
        seconds: to send for.
        seed: of the draw.
        of: tenants whose requests are looked at; None for all.
    """
    arrivals = draw_arrivals(popularity, len(fleet.texts), rate, seconds, seed)
    requests = fleet.requests(arrivals)
    found = least_disturbed(
        lambda: LoadGenerator(engine, timeout=TIMEOUT).open_loop(requests, arrivals.due),
        most_stolen=MOST_STOLEN,
        attempts=_ATTEMPTS,
    )
    run = found.value
    sample = settled(run.outcomes, arrivals, seconds, of)
    return LoadPoint(rate, sample, GeneratorCost.of(run), found.stolen, found.attempts)


def settled(outcomes: Outcomes, arrivals: Arrivals, seconds: float, of: Sequence[int] | None) -> Sample:
    """Of a run of ``seconds`` all but the first moments, of the tenants ``of`` or of all."""
    chosen = outcomes if of is None else outcomes.select(np.isin(arrivals.tenants, list(of)))
    return Sample.of(chosen, min(_SETTLE_SECONDS, seconds / 4), seconds)
