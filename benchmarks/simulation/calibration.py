"""What the stages of the real engine cost on this machine, alone: the simulation's numbers for a CPU."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil

from benchmarks.load_cases import LATENCY_TARGET, run_open
from benchmarks.load_fleet import Fleet, open_engine, resident_engine
from benchmarks.load_generator import LoadGenerator
from benchmarks.load_traffic import Arrivals, draw_arrivals, zipf_popularity
from benchmarks.simulation.machine import Costs
from benchmarks.simulation.slowness import SlownessProbe
from benchmarks.tenant_fleet import tenant_name
from hmi_engine.engine import Engine
from hmi_engine.pipeline.admission import admit
from hmi_engine.request import Request
from hmi_engine.schedule.cost_model import StageCoefficients, StageCosts, StageWork
from hmi_engine.serving_core import EngineStatistics
from hmi_engine.store import Store

__all__ = ["Calibration", "calibrate", "num_cores"]

_STAGES = ("fetch", "search", "compute", "respond")
_DRIVERS = {"fetch": "tenants"}
_REMEMBER_ALL = 1e9
_SERVED_TOKENS = 128  # of a small batch under load
_QUANTILES = 64
_COLD_BATCHES = 4  # that memory for the cold engine holds
_ADMISSIONS, _ADMITTED_TOGETHER = 100, 64


@dataclass(frozen=True)
class Calibration:
    """Costs, and how much of the processor compute asks for.

    Attributes:
        costs: of the stages.
        compute_cores: that compute keeps busy.
        variation: quantiles, all as far apart, of what batches took to compute over what ``costs`` say. Costs
            are fitted so that stalls count for little; queues behind them are what latency is made of.
        contention: how many times as slow compute is, beside a thread that admits requests, as its share of
            the cores alone would make it.
        requests_per_second: of the engine without a pipeline that the costs of queueing were taken from.
    """

    costs: Costs
    compute_cores: float
    contention: float
    variation: tuple[float, ...]
    requests_per_second: float


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def calibrate(fleet: Fleet, *, rounds: int, seconds: float) -> Calibration:
    """Measures batches of many sizes, one by one, ``rounds`` times, and a loop of requests for ``seconds``.

    The first tell what each stage costs while nothing else runs; the second what queueing, forming batches
    and the generator cost, which is what is left of the time of an engine without a pipeline.
    """
    stages = {
        name: StageCosts(driven_by=_DRIVERS.get(name, "tokens"), memory=_REMEMBER_ALL) for name in _STAGES
    }
    # With all rounds as they come: a stolen moment is one of many observations, and outliers weigh little.
    compute_cores, observed = _observe_batches(fleet, stages, rounds)
    fits = {name: costs.coefficients for name, costs in stages.items()}
    assert all(fit is not None for fit in fits.values())
    known = {name: fit for name, fit in fits.items() if fit is not None}
    queueing = _observe_loop(fleet, seconds)
    contention = _observe_contention(fleet, seconds, compute_cores)
    variation = _variation(known["compute"], observed)
    per_token = _observe_admission(fleet, rounds) + queueing.admit
    lost = _observe_arrivals(fleet, seconds, known, float(np.mean(variation)), queueing.requests_per_second)
    # As much admission as makes computing lose that, beside it.
    slower = contention * max(1.0, (compute_cores + 1) / num_cores())
    single = lost / (slower - 1) if slower > 1 else 0.0
    fixed = max(0.0, single - per_token * float(np.mean(fleet.num_tokens)))
    return Calibration(
        costs=Costs(
            admit=StageCoefficients(fixed, per_token, 0.0, 0.0),
            form=StageCoefficients(0.0, queueing.form, 0.0, 0.0),
            fetch=known["fetch"],
            search=known["search"],
            compute=known["compute"],
            respond=known["respond"],
        ),
        compute_cores=compute_cores,
        contention=contention,
        variation=variation,
        requests_per_second=queueing.requests_per_second,
    )


def _variation(costs: StageCoefficients, observed: Sequence[tuple[StageWork, float]]) -> tuple[float, ...]:
    """Quantiles of seconds over those that ``costs`` say, by batches that take long enough to be served."""
    long = [(work, seconds) for work, seconds in observed if work.tokens >= _SERVED_TOKENS] or observed
    ratios = [seconds / costs.seconds(work) for work, seconds in long]
    places = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    return tuple(np.quantile(ratios, places).tolist())


@dataclass(frozen=True)
class _Case:
    """A batch: whom it asks for, by number, and with which texts."""

    tenants: Sequence[int]
    texts: Sequence[int]
    is_cold: bool


def _cases(fleet: Fleet, rounds: int) -> Iterator[_Case]:
    """Batches of many sizes, of one tenant or many, in random order; every text is another one."""
    generator = np.random.default_rng(0)
    num_tenants, num_texts = len(fleet.adapter_bytes), len(fleet.texts)
    next_text = next_cold = 0
    shapes = [
        (size, distinct, is_cold)
        for size in (1, 2, 4, 8, 16, 32, 48, 64)
        for distinct, is_cold in ((1, False), (max(1, size // 2), False), (size, False), (size, True))
        if distinct <= num_tenants
    ]
    for _ in range(rounds):
        for place in generator.permutation(len(shapes)).tolist():
            size, distinct, is_cold = shapes[place]
            if is_cold:  # in turn of all, so that each was evicted since it came last
                chosen = [(next_cold + step) % num_tenants for step in range(distinct)]
                next_cold += distinct
            else:
                chosen = generator.choice(num_tenants, distinct, replace=False).tolist()
            texts = [(next_text + step) % num_texts for step in range(size)]
            next_text += size
            yield _Case([chosen[step % distinct] for step in range(size)], texts, is_cold)


def _observe_batches(
    fleet: Fleet, stages: dict[str, StageCosts], rounds: int
) -> tuple[float, list[tuple[StageWork, float]]]:
    """Observes; returns the cores that compute keeps busy, and what each batch took to compute."""
    computed: list[tuple[StageWork, float]] = []
    mean_bytes = sum(fleet.adapter_bytes) / len(fleet.adapter_bytes)
    common = {"pipeline_depth": 1, "record_traffic": False, "max_batch_tokens": 1 << 20}
    busy = wall = 0.0
    with (
        Store.open(fleet.store, read_only=True) as store,
        Engine(store, host_memory=4 * sum(fleet.adapter_bytes) + (64 << 20), **common) as warm,
        Engine(store, host_memory=int(_COLD_BATCHES * 64 * mean_bytes), **common) as cold,
    ):
        warm.prefetch(fleet.names)
        for engine in (warm, cold):  # every layout is known, every path has been taken
            for first in range(0, len(fleet.names), 64):
                engine.run([Request(name, fleet.texts[0]) for name in fleet.names[first : first + 64]])
        for case in _cases(fleet, rounds):
            engine = cold if case.is_cold else warm
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
            worked = _stage_seconds(engine.stats(), before)
            if len(requests) >= 32 and not case.is_cold:
                busy, wall = busy + processor, wall + taken
            for name, costs in stages.items():
                work, spent = _work(fleet, case, name), worked[name]
                costs.observe(work, spent)
                if name == "compute":
                    computed.append((work, spent))
    return max(1.0, min(float(num_cores()), busy / wall)), computed


def _stage_seconds(after: EngineStatistics, before: EngineStatistics) -> dict[str, float]:
    """What each stage worked from one moment to another."""
    started = before.stages or {}
    return {
        name: float(times["busy_seconds"]) - float(started.get(name, {}).get("busy_seconds", 0.0))
        for name, times in (after.stages or {}).items()
    }


def _work(fleet: Fleet, case: _Case, stage: str) -> StageWork:
    distinct = set(case.tenants)
    num_bytes = sum(fleet.adapter_bytes[tenant] for tenant in distinct)
    if stage == "fetch":
        return StageWork(0, len(distinct), num_bytes) if case.is_cold else StageWork()
    tokens = sum(fleet.num_tokens[text] for text in case.texts)
    if stage == "compute":
        return StageWork(tokens, len(distinct), num_bytes)
    return StageWork(tokens)


@dataclass(frozen=True)
class _Queueing:
    """Seconds for each token: of the admitting thread beside tokenising, and of the computing one."""

    admit: float
    form: float
    requests_per_second: float


def _observe_loop(fleet: Fleet, seconds: float) -> _Queueing:
    """An engine without a pipeline, with always enough to do: what its stages do not account for."""
    popularity = zipf_popularity(len(fleet.adapter_bytes), 1.0)
    generator = np.random.default_rng(1)
    count = 4096
    tenants = generator.choice(len(popularity), count, p=popularity)
    texts = np.arange(count) % len(fleet.texts)
    requests = fleet.requests(Arrivals(tenants, texts, np.zeros(count)))
    with open_engine(fleet, resident=fleet.names, pipeline_depth=1, max_batch_tokens=2048) as engine:
        sender = LoadGenerator(engine)
        sender.closed_loop(requests, concurrency=256, seconds=min(2.0, seconds))
        before, admitted = engine.stats(), _thread_seconds("hmi-admit")
        began = time.perf_counter()
        run = sender.closed_loop(requests, concurrency=256, seconds=seconds)
        taken = time.perf_counter() - began
        after, admitted = engine.stats(), _thread_seconds("hmi-admit") - admitted
    tokens = after.tokens - before.tokens
    num_requests = after.requests - before.requests
    worked = _stage_seconds(after, before)
    return _Queueing(
        admit=(max(0.0, admitted - worked["tokenise"]) + run.generator_seconds) / tokens,
        form=max(0.0, taken - sum(worked[name] for name in _STAGES)) / tokens,
        requests_per_second=num_requests / taken,
    )


def _observe_admission(fleet: Fleet, rounds: int) -> float:
    """Seconds for each token of requests that are admitted many at once, while nothing else runs."""
    generator = np.random.default_rng(2)
    taken, tokens = [], 0
    with Store.open(fleet.store, read_only=True) as store:
        for _ in range(rounds * _ADMISSIONS):
            tenants = generator.integers(len(fleet.adapter_bytes), size=_ADMITTED_TOGETHER)
            texts = generator.integers(len(fleet.texts), size=_ADMITTED_TOGETHER)
            requests = fleet.requests(Arrivals(tenants, texts, np.zeros(_ADMITTED_TOGETHER)))
            began = time.perf_counter()
            admit(requests, store.tenants, store.encoder)
            taken.append(time.perf_counter() - began)
            tokens += sum(fleet.num_tokens[text] for text in texts.tolist())
    return float(np.median(taken)) * len(taken) / tokens


def _observe_arrivals(
    fleet: Fleet, seconds: float, costs: Mapping[str, StageCoefficients], variation: float, capacity: float
) -> float:
    """Seconds that computing loses for each request that arrives meanwhile, in an open loop at half capacity.

    Far more than admitting takes: two threads wake up, and the team that computes waits for the one of its
    threads whose core they take. It is what the stages took over what they cost alone.
    """
    popularity = zipf_popularity(len(fleet.adapter_bytes), 1.0)
    arrivals = draw_arrivals(popularity, len(fleet.texts), capacity / 2, seconds, 3)
    with (
        open_engine(fleet, resident=fleet.names, pipeline_depth=1, latency_target=LATENCY_TARGET) as engine,
        SlownessProbe.opened(fleet, costs["compute"]) as probe,
    ):
        run_open(engine, fleet, popularity, rate=capacity / 4, seconds=min(2.0, seconds), seed=4)
        slowness = probe.measure()
        before = engine.stats()
        run = LoadGenerator(engine).open_loop(fleet.requests(arrivals), arrivals.due)
        after = engine.stats()
        slowness = (slowness + probe.measure()) / 2
    batches, requests = after.batches - before.batches, after.requests - before.requests
    work = StageWork(
        after.tokens - before.tokens, requests, sum(fleet.adapter_bytes[each] for each in arrivals.tenants)
    )
    alone = 0.0
    for name, cost in costs.items():
        done = StageWork() if name == "fetch" else work if name == "compute" else StageWork(work.tokens)
        alone += (cost.seconds(done) + (batches - 1) * cost.fixed) * (variation if name == "compute" else 1.0)
    worked = _stage_seconds(after, before)
    spent = sum(worked[name] for name in costs)
    lost = max(0.0, spent / slowness - alone)
    return lost / (requests * spent / run.seconds)


def _observe_contention(fleet: Fleet, seconds: float, compute_cores: float) -> float:
    """Batches without and beside a thread that admits requests one by one, all the time.

    The simulation slows both down alike; in truth the team of threads that computes loses more than the
    thread that admits. So what counts is what compute loses for a second of admission.
    """
    requests = fleet.requests(
        Arrivals(np.arange(512) % len(fleet.names), np.arange(512) % len(fleet.texts), np.zeros(512))
    )
    with resident_engine(fleet) as (store, engine):
        stop = threading.Event()
        num_admitted = 0

        def admit_all_the_time() -> None:
            nonlocal num_admitted
            for request in itertools.cycle(requests):
                if stop.is_set():
                    return
                admit([request], store.tenants, store.encoder)
                num_admitted += 1

        def seconds_of_an_admission(meanwhile: Callable[[], None]) -> float:
            thread, before = threading.Thread(target=admit_all_the_time), num_admitted
            stop.clear()
            began = time.perf_counter()
            thread.start()
            meanwhile()
            stop.set()
            taken = time.perf_counter() - began
            thread.join()
            return taken / (num_admitted - before)

        def batch_seconds() -> list[float]:
            before, end = engine.stats().compute_seconds, time.perf_counter() + seconds / 4
            taken: list[float] = []
            for first in itertools.cycle(range(0, len(requests), 16)):
                if time.perf_counter() >= end:
                    return taken
                engine.run(requests[first : first + 16])
                after = engine.stats().compute_seconds
                taken.append(after - before)
                before = after
            raise AssertionError  # cycles do not end

        batch_seconds()
        alone, beside = list[float](), list[float]()
        admission_alone, admission_beside = list[float](), list[float]()
        for _ in range(2):
            alone += batch_seconds()
            admission_alone.append(seconds_of_an_admission(lambda: time.sleep(seconds / 16)))
            admission_beside.append(seconds_of_an_admission(lambda: beside.extend(batch_seconds())))
    slower = float(np.median(beside) / np.median(alone))
    lost = float(np.mean(admission_beside)) * (1 - 1 / slower)
    return max(
        1.0, (1 + lost / float(np.mean(admission_alone))) / max(1.0, (compute_cores + 1) / num_cores())
    )


def _thread_seconds(name: str) -> float:
    """Processor time of this process's threads of that name."""
    numbers = {thread.native_id for thread in threading.enumerate() if thread.name == name}
    return sum(each.user_time + each.system_time for each in psutil.Process().threads() if each.id in numbers)
