"""What the real engine's computing loses to threads that work beside it: for arrivals, and for reads."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

import hmi_kernels
from benchmarks.load_cases import LATENCY_TARGET, run_open
from benchmarks.load_fleet import Fleet, open_engine, resident_engine
from benchmarks.load_generator import LoadGenerator
from benchmarks.load_traffic import Arrivals, draw_arrivals, zipf_popularity
from benchmarks.simulation.company import (
    batch_seconds,
    repeating,
    requests_in_turn,
    thread_seconds,
)
from benchmarks.simulation.machine import Disk, Variation
from benchmarks.simulation.slowness import SlownessProbe
from benchmarks.stage_seconds import stage_seconds
from hmi_engine.async_engine import AsyncEngine
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.memory.residency import AdapterResidency
from hmi_engine.schedule.cost_model import StageCoefficients, StageWork
from hmi_engine.serving_core import EngineStatistics
from hmi_engine.store import Store

__all__ = [
    "READ_TOGETHER",
    "ArrivalCosts",
    "LoadedRun",
    "observe_arrivals",
    "observe_reads",
    "slower_disk",
]

_LOADS = (0.3, 0.5, 0.7)
"""Over the capacity: apart enough to tell a batch's toll from an arrival's. Nearer to the capacity what is
lost is little beside what the host's own speed changes."""

_RUNS_OF_A_LOAD = 2
READ_TOGETHER = 32
"""Tenants, as of a batch."""

_BATCHES_OF_MEMORY = 4


@dataclass(frozen=True)
class LoadedRun:
    """An open loop, in seconds of the machine as fast as when the costs of the stages were measured.

    Attributes:
        seconds: that it took.
        batches: that were served.
        admissions: times that the admitting thread took what had arrived.
        requests: that arrived.
        tokens: of these.
        busy_share: of the time, that the stages worked.
        admission_seconds: processor time of the threads that send and admit.
        lost_seconds: that the stages took over what they cost alone.
    """

    seconds: float
    batches: int
    admissions: int
    requests: int
    tokens: int
    busy_share: float
    admission_seconds: float
    lost_seconds: float

    @property
    def admission_delay(self) -> float:
        """Seconds from an arrival until it is admitted, where nobody was being admitted.

        By how many requests come together: where arrivals are Poisson of rate r, admissions take s and begin
        d late when there was none, a row of them has 1 + r d + r s exp(r s) requests in exp(r s) admissions.
        """
        rate, admission = self.requests / self.seconds, self.admission_seconds / self.admissions
        together = self.requests / self.admissions
        return max(0.0, (together - rate * admission) * math.exp(rate * admission) - 1) / rate


@dataclass(frozen=True)
class ArrivalCosts:
    """What arriving costs.

    Attributes:
        fixed: seconds of the processor for an admission, beside those of its tokens.
        slower: how many times as slow computing is while the admitting thread works, which wakes up now and
            then; less than beside one that works all the time.
        batch_toll: seconds that a batch takes longer than alone, whatever arrives.
        delay: seconds until the admitting thread runs, after it has slept, while something computes.
    """

    fixed: float
    slower: float
    batch_toll: float
    delay: float

    @classmethod
    def of(cls, runs: Sequence[LoadedRun], *, per_token: float) -> ArrivalCosts:
        """Fitted to runs under several loads, whose requests come one by one and together.

        While a thread works for a second beside it, computing that is ``slower`` by s takes s seconds for
        what it did in one. So it loses s - 1 for each second of admission that falls into its own time.

        Args:
            runs: which lost something.
            per_token: seconds of admission.
        """
        seconds = sum(run.admission_seconds for run in runs)
        tokens, admissions = sum(run.tokens for run in runs), sum(run.admissions for run in runs)
        fixed = max(0.0, seconds - per_token * tokens) / admissions
        asked = [[run.busy_share * run.admission_seconds, run.batches] for run in runs]
        (more, batch_toll), _ = nnls(np.array(asked), np.array([run.lost_seconds for run in runs]))
        delay = sum(run.admission_delay for run in runs) / sum(run.busy_share for run in runs)
        return cls(fixed, 1 + float(more), float(batch_toll), delay)


def observe_arrivals(
    fleet: Fleet,
    seconds: float,
    costs: Mapping[str, StageCoefficients],
    *,
    variation: Variation,
    usual: float,
    capacity: float,
) -> list[LoadedRun]:
    """Open loops at several loads, each for ``seconds``, half of them at a time.

    Args:
        fleet: what is served.
        seconds: of each load.
        costs: of the stages alone.
        variation: what batches took alone, over what ``costs`` say.
        usual: what the probe took then, see :class:`SlownessProbe`.
        capacity: requests a second of the engine.
    """
    popularity = zipf_popularity(len(fleet.adapter_bytes), 1.0)
    each = seconds / _RUNS_OF_A_LOAD
    runs = []
    with (
        open_engine(fleet, resident=fleet.names, pipeline_depth=1, latency_target=LATENCY_TARGET) as engine,
        SlownessProbe.opened(fleet, seconds=seconds / 6, usual=usual) as probe,
    ):
        run_open(engine, fleet, popularity, rate=capacity / 4, seconds=min(2.0, seconds), seed=4)
        for seed, load in enumerate(_LOADS * _RUNS_OF_A_LOAD, 300):
            arrivals = draw_arrivals(popularity, len(fleet.texts), load * capacity, each, seed)
            runs.append(_loaded_run(engine, fleet, arrivals, costs, variation, probe))
    return runs


def _loaded_run(
    engine: AsyncEngine,
    fleet: Fleet,
    arrivals: Arrivals,
    costs: Mapping[str, StageCoefficients],
    variation: Variation,
    probe: SlownessProbe,
) -> LoadedRun:
    slowness = probe.measure()
    before, admitting, began = engine.stats(), thread_seconds("hmi-admit"), time.perf_counter()
    sent = LoadGenerator(engine).open_loop(fleet.requests(arrivals), arrivals.due)
    taken = time.perf_counter() - began
    after, admitting = engine.stats(), thread_seconds("hmi-admit") - admitting
    slowness = (slowness + probe.measure()) / 2
    num_bytes = sum(fleet.adapter_bytes[tenant] for tenant in arrivals.tenants)
    alone = _alone_seconds(after, before, num_bytes, costs, variation)
    worked = stage_seconds(after, before)
    spent = sum(worked[name] for name in costs)
    return LoadedRun(
        seconds=taken / slowness,
        batches=after.batches - before.batches,
        admissions=_admissions(after) - _admissions(before),
        requests=after.requests - before.requests,
        tokens=after.tokens - before.tokens,
        busy_share=spent / taken,
        admission_seconds=(admitting + sent.generator_seconds) / slowness,
        lost_seconds=spent / slowness - alone,
    )


def _alone_seconds(
    after: EngineStatistics,
    before: EngineStatistics,
    num_bytes: int,
    costs: Mapping[str, StageCoefficients],
    variation: Variation,
) -> float:
    """What the stages of the batches between two moments cost alone on the machine."""
    batches, tokens = after.batches - before.batches, after.tokens - before.tokens
    alone = 0.0
    for name, cost in costs.items():
        work = StageWork(tokens)
        if name == "fetch":
            work = StageWork()
        elif name == "compute":
            work = StageWork(tokens, after.requests - before.requests, num_bytes)
        seconds = cost.seconds(work) + (batches - 1) * cost.fixed
        alone += seconds * variation.mean(tokens / batches) if name == "compute" else seconds
    return alone


def _admissions(statistics: EngineStatistics) -> int:
    return int((statistics.stages or {}).get("tokenise", {}).get("batches", 0))


def observe_reads(fleet: Fleet, seconds: float, disk: Disk) -> float:
    """Seconds that computing loses for each tenant that is read from ``disk`` meanwhile, sharing and all."""
    requests = requests_in_turn(fleet)
    memory = _BATCHES_OF_MEMORY * READ_TOGETHER * sum(fleet.adapter_bytes) // len(fleet.adapter_bytes)
    lost, num_read = 0.0, 0
    with (
        resident_engine(fleet) as (store, engine),
        _reading(store, fleet, memory) as reads,
        slower_disk(disk),
    ):
        batch_seconds(engine, requests, seconds / 4)
        for _ in range(2):
            alone = batch_seconds(engine, requests, seconds / 4)
            beside, files = reads.beside(lambda: batch_seconds(engine, requests, seconds / 4))
            lost += sum(beside) - len(beside) * float(np.mean(alone))
            num_read += files
    return max(0.0, lost) / num_read if num_read else 0.0  # a quick run ends before a batch is read


class _ConstantReading:
    """Has one batch of tenants after another read, as the thread that prepares does."""

    def __init__(self, residency: AdapterResidency, tenants: Sequence[TenantInfo]) -> None:
        self._residency = residency
        self._batches = itertools.cycle(
            tenants[first : first + READ_TOGETHER] for first in range(0, len(tenants), READ_TOGETHER)
        )

    def beside(self, work: Callable[[], list[float]]) -> tuple[list[float], int]:
        """What ``work`` returns, and how many tenants were read while it ran."""
        before = self._residency.statistics.files_read
        with repeating(self._read):
            result = work()
            num_read = self._residency.statistics.files_read - before
        return result, num_read

    def read_all(self, count: int) -> None:
        """Once each, so that no beginning of a file has to be read any more."""
        for _ in range(-(-count // READ_TOGETHER)):
            self._read()

    def _read(self) -> None:
        self._residency.holding(next(self._batches)).release()


@contextmanager
def _reading(store: Store, fleet: Fleet, memory: int) -> Iterator[_ConstantReading]:
    """Of all tenants in turn, into memory that holds few of them."""
    residency = AdapterResidency(store.layout, store.catalog, store.general, memory)
    try:
        reading = _ConstantReading(residency, [store.tenants[name] for name in fleet.names])
        reading.read_all(len(fleet.names))
        yield reading
    finally:
        residency.close()


@contextmanager
def slower_disk(disk: Disk) -> Iterator[None]:
    """Has the engine read as from ``disk``."""
    hmi_kernels.set_read_latency(disk.seconds_each, disk.bytes_per_second)
    try:
        yield
    finally:
        hmi_kernels.set_read_latency(0.0)
