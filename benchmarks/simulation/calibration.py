"""What the stages of the real engine cost on this machine, alone: the simulation's numbers for a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from benchmarks.load_fleet import Fleet
from benchmarks.simulation.company import (
    STAGES,
    crowding,
    num_cores,
    observe_contention,
    observe_loop,
)
from benchmarks.simulation.machine import Costs, Disk, Tolls, Variation
from benchmarks.simulation.slowness import SlownessProbe
from benchmarks.simulation.tolls import READ_TOGETHER, ArrivalCosts, observe_arrivals, observe_reads
from benchmarks.stage_seconds import stage_seconds
from benchmarks.tenant_fleet import tenant_name
from hmi_engine.engine import Engine
from hmi_engine.frozen_heap import FrozenHeap
from hmi_engine.request import Request
from hmi_engine.schedule.cost_model import StageCoefficients, StageCosts, StageWork
from hmi_engine.store import Store

__all__ = ["Calibration", "calibrate"]

_DRIVERS = {"fetch": "tenants"}
_REMEMBER_ALL = 1e9
_QUANTILES, _BATCHES_ALIKE = 64, 48
_COLD_BATCHES = 4  # that memory for the cold engine holds


@dataclass(frozen=True)
class Calibration:
    """Costs, and how much of the processor compute asks for.

    Attributes:
        costs: of the stages.
        compute_cores: that compute keeps busy.
        admission_delay: seconds until the admitting thread runs that has slept, while something computes.
        variation: what batches took to compute, over what ``costs`` say.
        contention: how many times as slow compute is, beside a thread that works all the time, as its share
            of the cores alone would make it.
        admission_contention: the same beside the thread that admits, which wakes up now and then.
        tolls: that compute pays to threads which wake up beside it, over its share of the cores.
        requests_per_second: of the engine without a pipeline that the costs of queueing were taken from.
        probe_seconds: of a token of the batches that tell how slow the machine is, while costs were measured.
    """

    costs: Costs
    compute_cores: float
    contention: float
    admission_contention: float
    tolls: Tolls
    admission_delay: float
    variation: Variation
    requests_per_second: float
    probe_seconds: float


def calibrate(fleet: Fleet, *, rounds: int, seconds: float, disk: Disk) -> Calibration:
    """Measures batches of many sizes, one by one, ``rounds`` times, and then loops of ``seconds`` each.

    The first tell what each stage costs while nothing else runs. A loop without a pipeline that has always
    enough to do tells what queueing, forming batches and the generator cost, which is what is left of its
    time; loops with less to do what computing loses to arrivals, and one beside reads from ``disk`` what it
    loses to them.
    """
    with SlownessProbe.opened(fleet, seconds=seconds / 6) as probe:
        observed = _observe_batches(fleet, rounds, probe)
    probed, compute_cores = float(np.mean(observed.probed)), observed.compute_cores
    fits = {name: costs.coefficients for name, costs in observed.stages.items()}
    assert all(fit is not None for fit in fits.values())
    known = {name: fit for name, fit in fits.items() if fit is not None}
    queueing = observe_loop(fleet, seconds)
    contention = observe_contention(fleet, seconds, compute_cores)
    variation = _variation(known["compute"], observed.computed)
    arriving = ArrivalCosts.of(
        observe_arrivals(
            fleet,
            seconds,
            known,
            variation=variation,
            usual=probed,
            capacity=queueing.requests_per_second,
        ),
        per_token=queueing.admit,
    )
    shared = (contention * crowding(compute_cores) - 1) * _seconds_of_a_read(known["fetch"], fleet)
    tolls = Tolls(batch=arriving.batch_toll, tenant=max(0.0, observe_reads(fleet, seconds, disk) - shared))
    return Calibration(
        costs=Costs(
            admit=StageCoefficients(arriving.fixed, queueing.admit, 0.0, 0.0),
            form=StageCoefficients(0.0, queueing.form, 0.0, 0.0),
            fetch=known["fetch"],
            search=known["search"],
            compute=known["compute"],
            respond=known["respond"],
        ),
        compute_cores=compute_cores,
        contention=contention,
        admission_contention=arriving.slower / crowding(compute_cores),
        tolls=tolls,
        admission_delay=arriving.delay,
        variation=variation,
        requests_per_second=queueing.requests_per_second,
        probe_seconds=probed,
    )


def _seconds_of_a_read(fetch: StageCoefficients, fleet: Fleet) -> float:
    """Of the processor for each tenant, as reads are observed beside computing."""
    mean_bytes = sum(fleet.adapter_bytes) / len(fleet.adapter_bytes)
    return fetch.seconds(StageWork(0, READ_TOGETHER, READ_TOGETHER * mean_bytes)) / READ_TOGETHER


def _variation(costs: StageCoefficients, observed: Sequence[tuple[StageWork, float]]) -> Variation:
    ratios = [(work.tokens, seconds / costs.seconds(work)) for work, seconds in observed]
    return Variation.of(ratios, group=_BATCHES_ALIKE, quantiles=_QUANTILES)


@dataclass(frozen=True)
class _Case:
    """A batch: whom it asks for, by number, and with which texts."""

    tenants: Sequence[int]
    texts: Sequence[int]
    is_cold: bool


def _cases(fleet: Fleet, rounds: int) -> Iterator[list[_Case]]:
    """Rounds of batches of many sizes, of one tenant or many, in random order; every text is another one.

    More of the small ones: they are what is served below the capacity, their texts differ more, and they take
    little time.
    """
    generator = np.random.default_rng(0)
    num_tenants, num_texts = len(fleet.adapter_bytes), len(fleet.texts)
    next_text = next_cold = 0
    shapes = [
        (size, distinct, is_cold)
        for size in (1, 2, 4, 8, 16, 32, 48, 64)
        for distinct, is_cold in ((1, False), (max(1, size // 2), False), (size, False), (size, True))
        if distinct <= num_tenants
        for _ in range(max(1, 8 // size))
    ]
    for _ in range(rounds):
        cases = []
        for place in generator.permutation(len(shapes)).tolist():
            size, distinct, is_cold = shapes[place]
            if is_cold:  # in turn of all, so that each was evicted since it came last
                chosen = [(next_cold + step) % num_tenants for step in range(distinct)]
                next_cold += distinct
            else:
                chosen = generator.choice(num_tenants, distinct, replace=False).tolist()
            texts = [(next_text + step) % num_texts for step in range(size)]
            next_text += size
            cases.append(_Case([chosen[step % distinct] for step in range(size)], texts, is_cold))
        yield cases


@dataclass
class _Observations:
    """Of batches that run one by one.

    Attributes:
        stages: what each stage took.
        computed: work and seconds of each batch that was computed.
        busy: seconds of the processor, of larger batches in memory.
        wall: seconds of the same.
        probed: what the probe found between them.
    """

    stages: dict[str, StageCosts]
    computed: list[tuple[StageWork, float]] = field(default_factory=list)
    busy: float = 0.0
    wall: float = 0.0
    probed: list[float] = field(default_factory=list)

    @property
    def compute_cores(self) -> float:
        """The cores that compute keeps busy."""
        return max(1.0, min(float(num_cores()), self.busy / self.wall))

    def observe(self, fleet: Fleet, case: _Case, engine: Engine) -> None:
        """Has an engine run a batch."""
        requests = [
            Request(tenant_name(tenant), fleet.texts[text])
            for tenant, text in zip(case.tenants, case.texts, strict=True)
        ]
        before = engine.stats()
        processor, began = time.process_time(), time.perf_counter()
        for response in engine.run(requests):
            if response.error is not None:
                raise response.error
        processor, taken = time.process_time() - processor, time.perf_counter() - began
        if len(requests) >= 32 and not case.is_cold:
            self.busy, self.wall = self.busy + processor, self.wall + taken
        worked = stage_seconds(engine.stats(), before)
        for name, costs in self.stages.items():
            costs.observe(_work(fleet, case, name), worked[name])
        self.computed.append((_work(fleet, case, "compute"), worked["compute"]))


def _observe_batches(fleet: Fleet, rounds: int, probe: SlownessProbe) -> _Observations:
    """All rounds as they come: a stolen moment is one of many observations, and outliers weigh little.

    Garbage is collected as in an engine that serves.
    """
    observed = _Observations(
        {name: StageCosts(driven_by=_DRIVERS.get(name, "tokens"), memory=_REMEMBER_ALL) for name in STAGES}
    )
    mean_bytes = sum(fleet.adapter_bytes) / len(fleet.adapter_bytes)
    common = {"pipeline_depth": 1, "record_traffic": False, "max_batch_tokens": 1 << 20}
    with (
        Store.open(fleet.store, read_only=True) as store,
        Engine(store, host_memory=4 * sum(fleet.adapter_bytes) + (64 << 20), **common) as warm,
        Engine(store, host_memory=int(_COLD_BATCHES * 64 * mean_bytes), **common) as cold,
        ExitStack() as heap,
    ):
        warm.prefetch(fleet.names)
        for engine in (warm, cold):  # every layout is known, every path has been taken
            for first in range(0, len(fleet.names), 64):
                engine.run([Request(name, fleet.texts[0]) for name in fleet.names[first : first + 64]])
        heap.callback(FrozenHeap().thaw)
        for cases in _cases(fleet, rounds):
            observed.probed.append(probe.measure())
            for case in cases:
                observed.observe(fleet, case, cold if case.is_cold else warm)
        observed.probed.append(probe.measure())
    return observed


def _work(fleet: Fleet, case: _Case, stage: str) -> StageWork:
    distinct = set(case.tenants)
    num_bytes = sum(fleet.adapter_bytes[tenant] for tenant in distinct)
    if stage == "fetch":
        return StageWork(0, len(distinct), num_bytes) if case.is_cold else StageWork()
    tokens = sum(fleet.num_tokens[text] for text in case.texts)
    if stage == "compute":
        return StageWork(tokens, len(distinct), num_bytes)
    return StageWork(tokens)
