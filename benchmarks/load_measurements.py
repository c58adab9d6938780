"""The runs of the load benchmark: open loops below and beyond the capacity, and beside one tenant's flood."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from benchmarks.kept_steps import KeptSteps
from benchmarks.load_cases import (
    DEADLINE,
    LATENCY_TARGET,
    LoadPoint,
    capacity_of,
    queue_limits,
    run_open,
)
from benchmarks.load_fleet import Fleet, open_engine
from benchmarks.load_outcomes import Summary, summarise
from benchmarks.load_traffic import heavy_popularity, zipf_popularity
from hmi_engine.async_engine import AsyncEngine
from hmi_engine.schedule.limits import QueueLimits

__all__ = [
    "EQUAL",
    "FLOOD",
    "HEAVY_TIMES",
    "UNFAIR",
    "LoadBench",
    "LoadPlan",
    "OpenLoop",
    "measure_mixed",
    "measure_open",
]

HEAVY_TIMES = 100
EQUAL = "all send alike"
FLOOD = f"one sends {HEAVY_TIMES} times as much as each of the others"
UNFAIR = f"{FLOOD}, first come first served"


@dataclass(frozen=True)
class LoadPlan:
    """Sizes of a run; seconds are those of one run of one round (open loop) or repetition (flood)."""

    tenants: int
    loads: tuple[float, ...]
    mixed_tenants: int
    mixed_loads: tuple[float, ...]
    capacity_seconds: float
    open_seconds: float
    mixed_seconds: float
    rounds: int
    repetitions: int
    plot_bytes: int


@dataclass
class LoadBench:
    """What is measured with, and what was found."""

    plan: LoadPlan
    fleet: Fleet
    steps: KeptSteps
    stack: ExitStack

    def open(self, limits: QueueLimits | None = None, *, is_fair: bool = True) -> AsyncEngine:
        """An engine with all tenants in memory, until the end of the stack."""
        return self.stack.enter_context(
            open_engine(
                self.fleet,
                limits=limits,
                is_fair=is_fair,
                resident=self.fleet.names,
                latency_target=LATENCY_TARGET,
            )
        )

    def warm(self, engine: AsyncEngine, popularity: npt.NDArray[np.float64]) -> float:
        """Has an engine learn what its stages cost; returns about how many requests a second it answers."""
        seconds = min(2.0, self.plan.capacity_seconds)
        return capacity_of(engine, self.fleet, popularity, seconds=seconds, seed=900)

    def capacity(
        self, name: str, engine: AsyncEngine, popularity: npt.NDArray[np.float64], seed: int
    ) -> float:
        """Requests a second, of a step of its own."""

        def work() -> float:
            return capacity_of(engine, self.fleet, popularity, seconds=self.plan.capacity_seconds, seed=seed)

        return self.steps.take(name, float, work)


@dataclass(frozen=True)
class OpenLoop:
    """The capacity of each round, in requests a second, and its points by load."""

    capacities: list[float]
    points: dict[float, list[LoadPoint]]

    def summary(self, load: float) -> Summary:
        """Of all repetitions."""
        return summarise([point.sample for point in self.points[load]], DEADLINE)

    def goodputs(self, load: float) -> list[float]:
        """Of each round, over its capacity."""
        return [
            summarise([point.sample], DEADLINE).goodput / capacity
            for point, capacity in zip(self.points[load], self.capacities, strict=True)
        ]

    def goodput(self, load: float) -> float:
        """Over capacity, the mean of the rounds."""
        return float(np.mean(self.goodputs(load)))

    def kept_beyond_capacity(self) -> tuple[float, float, float]:
        """The least goodput beyond capacity over the peak of all loads, and its 95 % bootstrap interval."""
        by_load = np.array([self.goodputs(load) for load in self.points])
        is_beyond = np.array(list(self.points)) > 1

        def kept(rounds: npt.NDArray[np.int64]) -> float:
            means = by_load[:, rounds].mean(axis=1)
            return float(means[is_beyond].min() / means.max())

        count = by_load.shape[1]
        drawn = np.random.default_rng(0).integers(count, size=(2_000, count))
        low, high = np.quantile([kept(rounds) for rounds in drawn], [0.025, 0.975])
        return kept(np.arange(count)), float(low), float(high)


def measure_open(bench: LoadBench) -> OpenLoop:
    """Rounds: the capacity, then all loads, in another order each time."""
    plan = bench.plan
    popularity = zipf_popularity(plan.tenants, 1.0)
    free = bench.open()
    found = OpenLoop([], {load: [] for load in plan.loads})
    capacity = bench.warm(free, popularity)
    limited = bench.open(queue_limits(capacity))
    run_open(limited, bench.fleet, popularity, rate=capacity / 2, seconds=2.0, seed=901)
    for number in range(plan.rounds):
        capacity = bench.capacity(f"open-{number}-capacity", free, popularity, 1000 + number)
        found.capacities.append(capacity)
        for place in np.random.default_rng(number).permutation(len(plan.loads)).tolist():
            load = plan.loads[place]
            work = partial(
                run_open,
                limited,
                bench.fleet,
                popularity,
                rate=load * capacity,
                seconds=plan.open_seconds,
                seed=100 * number + place,
            )
            found.points[load].append(bench.steps.take(f"open-{number}-{load:g}", LoadPoint, work))
    return found


def measure_mixed(bench: LoadBench) -> dict[tuple[float, str], list[LoadPoint]]:
    """The others beside one that sends much, and without it, at each load."""
    plan = bench.plan
    count = plan.mixed_tenants
    equal, flood = (heavy_popularity(count, times) for times in (1, HEAVY_TIMES))
    others = range(1, count)
    free = bench.open()
    capacity = bench.warm(free, equal)
    engines = {
        EQUAL: bench.open(queue_limits(capacity)),
        UNFAIR: bench.open(
            QueueLimits(queue_limits(capacity).max_queued_requests, tenant_share=None), is_fair=False
        ),
    }
    for engine in engines.values():
        run_open(engine, bench.fleet, equal, rate=capacity / 2, seconds=2.0, seed=901)
    engines[FLOOD] = engines[EQUAL]
    found: dict[tuple[float, str], list[LoadPoint]] = {
        (load, name): [] for load in plan.mixed_loads for name in (EQUAL, FLOOD, UNFAIR)
    }
    for repetition in range(plan.repetitions):
        capacity = bench.capacity(f"mixed-{repetition}-capacity", free, equal, 2000 + repetition)
        for place in np.random.default_rng(repetition).permutation(len(found)).tolist():
            load, name = list(found)[place]
            work = partial(
                run_open,
                engines[name],
                bench.fleet,
                equal if name == EQUAL else flood,
                rate=load * capacity,
                seconds=plan.mixed_seconds,
                seed=5000 + 100 * repetition + place,
                of=others,
            )
            step = f"mixed-{repetition}-{load:g}-{(EQUAL, FLOOD, UNFAIR).index(name)}"
            found[load, name].append(bench.steps.take(step, LoadPoint, work))
    return found
