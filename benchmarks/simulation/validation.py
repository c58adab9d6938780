"""The simulation beside the real engine on this machine, with the same requests at the same times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import numpy as np
import numpy.typing as npt

from benchmarks.kept_steps import KeptSteps
from benchmarks.load_cases import (
    CONCURRENCY,
    DEADLINE,
    LATENCY_TARGET,
    MOST_STOLEN,
    TIMEOUT,
    draw_closed,
    queue_limits,
    run_open,
    settled,
)
from benchmarks.load_fleet import Fleet, open_engine
from benchmarks.load_generator import LoadGenerator
from benchmarks.load_outcomes import Outcomes, Sample, summarise
from benchmarks.load_traffic import Arrivals, draw_arrivals, zipf_popularity
from benchmarks.simulation.calibration import Calibration
from benchmarks.simulation.cluster import Cluster, closed_loop, open_loop
from benchmarks.simulation.company import num_cores
from benchmarks.simulation.engine import SimulatedEngine, Workload
from benchmarks.simulation.machine import Disk, Machine
from benchmarks.simulation.routing import AffinityRouter
from benchmarks.simulation.slowness import SlownessProbe, slowed
from benchmarks.simulation.tolls import slower_disk
from benchmarks.stage_seconds import hidden_share_between
from benchmarks.stolen_time import least_disturbed
from hmi_engine.async_engine import AsyncEngine
from hmi_engine.schedule.limits import QueueLimits

__all__ = ["Agreement", "Validation", "cpu_machine", "validate"]

_Floats = npt.NDArray[np.float64]
_SETTLE_SECONDS = 2.0
_ATTEMPTS = 3
_CYCLE = 8192
_FASTEST = 4000
"""Requests a second that no engine on this machine answers: as many are drawn for closed loops."""

COLD_DISK = Disk(0.005, 2e8)
COLD_BATCHES, COLD_BATCH_REQUESTS = 4, 32
"""Memory of the cold engines, as in benchmarks/pipeline.py."""


@dataclass(frozen=True)
class Agreement:
    """One figure, as it was measured and as it was predicted.

    Attributes:
        case: what was run.
        figure: of it.
        runs: the figure in each run of the same requests: they differ by what the host was doing.
        predictions: the prediction of each run.
    """

    case: str
    figure: str
    runs: Sequence[float]
    predictions: Sequence[float]

    @property
    def measured(self) -> float:
        """The median run."""
        return median(self.runs)

    @property
    def predicted(self) -> float:
        """The median prediction."""
        return median(self.predictions)

    @property
    def error(self) -> float:
        """How far off the prediction is, as a share of what was measured."""
        return self.predicted / self.measured - 1

    @property
    def is_between_runs(self) -> bool:
        """Whether the prediction is as near as one run of the engine is to another."""
        return min(self.runs) <= self.predicted <= max(self.runs)


@dataclass(frozen=True)
class Validation:
    """How it is validated.

    Attributes:
        loads: of the open loops, over the capacity that was measured.
        seconds: of each run.
        runs: of the same requests, spread over the time of the check.
    """

    loads: tuple[float, ...]
    seconds: float
    runs: int


def cpu_machine(
    calibration: Calibration, *, arena_bytes: int, depth: int, disk: Disk | None = None
) -> Machine:
    """This machine, as it was measured."""
    return Machine(
        costs=calibration.costs,
        arena_bytes=arena_bytes,
        disk=disk or Disk(),
        cores=num_cores(),
        compute_cores=calibration.compute_cores,
        contention=calibration.contention,
        admission_contention=calibration.admission_contention,
        tolls=calibration.tolls,
        admission_delay=calibration.admission_delay,
        variation=calibration.variation,
        depth=depth,
        latency_target=LATENCY_TARGET,
    )


def validate(
    fleet: Fleet, calibration: Calibration, validation: Validation, steps: KeptSteps
) -> tuple[list[Agreement], float]:
    """Measures the real engine, and predicts each figure without looking at it.

    Returns the figures, and how many times as slow the machine was at its slowest as at its fastest.

    What the prediction takes from the measured runs is the rate at which requests were sent; and from what
    the probe took before and after them, how slow the machine was.
    """
    with SlownessProbe.opened(
        fleet, seconds=validation.seconds / 2, usual=calibration.probe_seconds
    ) as probe:
        bench = _Bench(fleet, calibration, validation, steps, probe)
        agreements = [*bench.warm(), *bench.cold()]
    return agreements, max(bench.slowness) / min(bench.slowness)


@dataclass(frozen=True)
class _Measured:
    """A run of the real engine.

    Attributes:
        sample: of what it answered.
        hidden_share: of fetch and search, in its time.
        slowness: of the machine just before and after, beside when costs were measured.
    """

    sample: Sample
    hidden_share: float | None
    slowness: float


_Prediction = tuple[Sample, float | None]
"""A sample, and the hidden share."""


@dataclass(frozen=True)
class _Bench:
    fleet: Fleet
    calibration: Calibration
    validation: Validation
    steps: KeptSteps
    probe: SlownessProbe
    slowness: list[float] = field(default_factory=list)

    def warm(self) -> Iterator[Agreement]:
        """All tenants in memory: a closed loop, then open loops."""
        popularity = zipf_popularity(len(self.fleet.adapter_bytes), 1.0)
        machine = cpu_machine(self.calibration, arena_bytes=4 * sum(self.fleet.adapter_bytes), depth=2)
        options = {"latency_target": LATENCY_TARGET, "resident": self.fleet.names}
        with open_engine(self.fleet, **options) as engine:
            self._warm(engine, popularity)
            closed = partial(self._measure_closed, engine, popularity, 31)
            measured = [self._take(f"closed-{number}", closed) for number in self._runs]
        predicted = [
            self._predict_closed(_then(machine, run), popularity, 31, is_warm=True) for run in measured
        ]
        figures = ("answered", "p50", "p99")
        yield from _agreements("all in memory, closed loop", measured, predicted, figures)
        capacity = median(summarise([run.sample], DEADLINE).answered for run in measured)
        limits = queue_limits(capacity)
        with open_engine(self.fleet, limits=limits, **options) as engine:
            self._warm(engine, popularity)
            runs: dict[float, list[_Measured]] = {load: [] for load in self.validation.loads}
            for number in self._runs:
                for place, load in enumerate(runs):
                    measure = partial(self._measure_open, engine, popularity, load * capacity, 40 + place)
                    runs[load].append(self._take(f"open-{load:g}-{number}", measure))
        for place, (load, measured) in enumerate(runs.items()):
            arrivals = self._arrivals(popularity, load * capacity, 40 + place)
            predicted = [self._predict_open(_then(machine, run), limits, arrivals) for run in measured]
            figures = ("p50", "p99") if load < 1 else ("goodput", "p50", "p99")
            yield from _agreements(f"open loop, {load:.0%} of capacity", measured, predicted, figures)

    def cold(self) -> Iterator[Agreement]:
        """Every request finds its tenant cold, on a slow disk, without and with a pipeline."""
        sizes = self.fleet.adapter_bytes
        memory = COLD_BATCHES * COLD_BATCH_REQUESTS * sum(sizes) // len(sizes)
        popularity = zipf_popularity(len(sizes), 0.0)
        for depth in (1, 2):
            machine = cpu_machine(self.calibration, arena_bytes=memory, depth=depth, disk=COLD_DISK)
            with (
                slower_disk(COLD_DISK),
                open_engine(
                    self.fleet, pipeline_depth=depth, host_memory=memory, latency_target=LATENCY_TARGET
                ) as engine,
            ):
                self._warm(engine, popularity)
                closed = partial(self._measure_closed, engine, popularity, 60)
                measured = [self._take(f"cold-{depth}-{number}", closed) for number in self._runs]
            predicted = [
                self._predict_closed(_then(machine, run), popularity, 60, is_warm=False) for run in measured
            ]
            case = f"cold tenants, {depth} in flight, closed loop"
            yield from _agreements(case, measured, predicted, ("answered", "p50", "p99"))
            if depth > 1:
                shares = [run.hidden_share for run in measured], [share for _, share in predicted]
                yield Agreement(case, "hidden share", *([each or 0.0 for each in of] for of in shares))

    @property
    def _runs(self) -> range:
        return range(self.validation.runs)

    def _take(self, name: str, measure: Callable[[], _Measured]) -> _Measured:
        measured = self.steps.take(f"validate-{name}", _Measured, measure)
        self.slowness.append(measured.slowness)
        return measured

    def _measure_closed(self, engine: AsyncEngine, popularity: _Floats, seed: int) -> _Measured:
        requests = self.fleet.requests(draw_closed(popularity, len(self.fleet.texts), _CYCLE, seed))
        seconds = self.validation.seconds

        def run() -> _Measured:
            slowness, before = self.probe.measure(), engine.stats()
            closed = LoadGenerator(engine).closed_loop(requests, concurrency=CONCURRENCY, seconds=seconds)
            hidden = hidden_share_between(engine.stats(), before)
            slowness = (slowness + self.probe.measure()) / 2
            return _Measured(_closed_sample(closed.outcomes, seconds), hidden, slowness)

        return least_disturbed(run, most_stolen=MOST_STOLEN, attempts=_ATTEMPTS).value

    def _warm(self, engine: AsyncEngine, popularity: _Floats) -> None:
        """Has an engine learn what its stages cost."""
        run_open(engine, self.fleet, popularity, rate=50.0, seconds=3.0, seed=30)

    def _measure_open(self, engine: AsyncEngine, popularity: _Floats, rate: float, seed: int) -> _Measured:
        seconds = self.validation.seconds
        slowness, before = self.probe.measure(), engine.stats()
        point = run_open(engine, self.fleet, popularity, rate=rate, seconds=seconds, seed=seed)
        hidden = hidden_share_between(engine.stats(), before)
        return _Measured(point.sample, hidden, (slowness + self.probe.measure()) / 2)

    def _predict_open(self, machine: Machine, limits: QueueLimits, arrivals: Arrivals) -> _Prediction:
        cluster = Cluster(machine, limits=limits, timeout=TIMEOUT)
        found = open_loop(cluster, self._workload(arrivals), arrivals.due, self._fill)
        return settled(found.outcomes, arrivals, self.validation.seconds, None), found.times.hidden_share

    def _predict_closed(
        self, machine: Machine, popularity: _Floats, seed: int, *, is_warm: bool
    ) -> _Prediction:
        drawn = draw_closed(popularity, len(self.fleet.texts), _CYCLE, seed)
        workload = self._workload(drawn)
        count = int(_FASTEST * self.validation.seconds)
        workload = replace(
            workload, tenants=np.resize(workload.tenants, count), tokens=np.resize(workload.tokens, count)
        )
        found = closed_loop(
            Cluster(machine),
            workload,
            concurrency=CONCURRENCY,
            seconds=self.validation.seconds,
            warm_up=self._fill if is_warm else None,
        )
        return _closed_sample(found.outcomes, self.validation.seconds), found.times.hidden_share

    def _arrivals(self, popularity: _Floats, rate: float, seed: int) -> Arrivals:
        return draw_arrivals(popularity, len(self.fleet.texts), rate, self.validation.seconds, seed)

    def _workload(self, arrivals: Arrivals) -> Workload:
        tokens = np.array(self.fleet.num_tokens, dtype=np.int64)[arrivals.texts]
        return Workload(arrivals.tenants, tokens, np.array(self.fleet.adapter_bytes, dtype=np.int64))

    def _fill(self, engines: Sequence[SimulatedEngine], _: AffinityRouter) -> None:
        for engine in engines:
            engine.memory.warm_up([np.arange(len(self.fleet.adapter_bytes))], ())


def _then(machine: Machine, measured: _Measured) -> Machine:
    """The machine as slow as it was in a measured run."""
    return replace(
        machine,
        costs=slowed(machine.costs, measured.slowness),
        tolls=machine.tolls.times(measured.slowness),
    )


def _closed_sample(outcomes: Outcomes, seconds: float) -> Sample:
    """Of the answers that came in this time, after the first moments, whenever their requests were due."""
    settle = min(_SETTLE_SECONDS, seconds / 4)
    chosen = outcomes.select((outcomes.finished >= settle) & (outcomes.finished < seconds))
    sample = Sample.of(chosen, 0.0, np.inf)
    return replace(sample, seconds=seconds - settle)


def _agreements(
    case: str, measured: Sequence[_Measured], predicted: Sequence[_Prediction], figures: Sequence[str]
) -> Iterator[Agreement]:
    real = [vars(summarise([run.sample], DEADLINE)) for run in measured]
    simulated = [vars(summarise([sample], DEADLINE)) for sample, _ in predicted]
    for figure in figures:
        yield Agreement(case, figure, [run[figure] for run in real], [run[figure] for run in simulated])
