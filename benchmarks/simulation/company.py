"""What the stages of the real engine cost in company: beside queueing, arrivals and a thread that admits."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil

from benchmarks.load_cases import LATENCY_TARGET, run_open
from benchmarks.load_fleet import Fleet, open_engine, resident_engine
from benchmarks.load_generator import LoadGenerator
from benchmarks.load_traffic import Arrivals, draw_arrivals, zipf_popularity
from benchmarks.simulation.slowness import SlownessProbe
from hmi_engine.engine import Engine
from hmi_engine.pipeline.admission import admit
from hmi_engine.request import Request
from hmi_engine.schedule.cost_model import StageCoefficients, StageWork
from hmi_engine.serving_core import EngineStatistics
from hmi_engine.store import Store

__all__ = [
    "STAGES",
    "Queueing",
    "crowding",
    "num_cores",
    "observe_admission",
    "observe_arrivals",
    "observe_contention",
    "observe_loop",
    "stage_seconds",
]

STAGES = ("fetch", "search", "compute", "respond")
_ADMISSIONS, _ADMITTED_TOGETHER = 100, 64


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def crowding(compute_cores: float) -> float:
    """How many times as slow compute is beside one busy thread, as its share of the cores alone makes it."""
    return max(1.0, (compute_cores + 1) / num_cores())


def stage_seconds(after: EngineStatistics, before: EngineStatistics) -> dict[str, float]:
    """What each stage worked from one moment to another."""
    started = before.stages or {}
    return {
        name: float(times["busy_seconds"]) - float(started.get(name, {}).get("busy_seconds", 0.0))
        for name, times in (after.stages or {}).items()
    }


@dataclass(frozen=True)
class Queueing:
    """Seconds for each token: of the admitting thread beside tokenising, and of the computing one."""

    admit: float
    form: float
    requests_per_second: float


def observe_loop(fleet: Fleet, seconds: float) -> Queueing:
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
    worked = stage_seconds(after, before)
    return Queueing(
        admit=(max(0.0, admitted - worked["tokenise"]) + run.generator_seconds) / tokens,
        form=max(0.0, taken - sum(worked[name] for name in STAGES)) / tokens,
        requests_per_second=num_requests / taken,
    )


def observe_admission(fleet: Fleet, rounds: int) -> float:
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


def observe_arrivals(
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
        SlownessProbe.opened(fleet, costs["compute"], variation=variation, seconds=seconds / 3) as probe,
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
    worked = stage_seconds(after, before)
    spent = sum(worked[name] for name in costs)
    lost = max(0.0, spent / slowness - alone)
    return lost / (requests * spent / run.seconds)


def observe_contention(fleet: Fleet, seconds: float, compute_cores: float) -> float:
    """Batches without and beside a thread that admits requests one by one, all the time.

    The simulation slows both down alike; in truth the team of threads that computes loses more than the
    thread that admits. So what counts is what compute loses for a second of admission.
    """
    requests = fleet.requests(
        Arrivals(np.arange(512) % len(fleet.names), np.arange(512) % len(fleet.texts), np.zeros(512))
    )
    with resident_engine(fleet) as (store, engine):
        admission = _ConstantAdmission(store, requests)
        _batch_seconds(engine, requests, seconds / 4)
        alone, beside = list[float](), list[float]()
        admission_alone, admission_beside = list[float](), list[float]()
        for _ in range(2):
            alone += _batch_seconds(engine, requests, seconds / 4)
            admission_alone.append(admission.seconds_of_one(lambda: time.sleep(seconds / 16)))
            admission_beside.append(
                admission.seconds_of_one(lambda: beside.extend(_batch_seconds(engine, requests, seconds / 4)))
            )
    slower = float(np.median(beside) / np.median(alone))
    lost = float(np.mean(admission_beside)) * (1 - 1 / slower)
    return max(1.0, (1 + lost / float(np.mean(admission_alone))) / crowding(compute_cores))


class _ConstantAdmission:
    """A thread that admits requests one by one, for as long as something else is done."""

    def __init__(self, store: Store, requests: Sequence[Request]) -> None:
        self._store, self._requests = store, requests
        self._stop = threading.Event()
        self._num_admitted = 0

    def seconds_of_one(self, meanwhile: Callable[[], None]) -> float:
        """Seconds that an admission takes while ``meanwhile`` runs."""
        thread, before = threading.Thread(target=self._admit), self._num_admitted
        self._stop.clear()
        began = time.perf_counter()
        thread.start()
        meanwhile()
        self._stop.set()
        taken = time.perf_counter() - began
        thread.join()
        return taken / (self._num_admitted - before)

    def _admit(self) -> None:
        for request in itertools.cycle(self._requests):
            if self._stop.is_set():
                return
            admit([request], self._store.tenants, self._store.encoder)
            self._num_admitted += 1


def _batch_seconds(engine: Engine, requests: Sequence[Request], seconds: float) -> list[float]:
    """What batches of sixteen take to compute, one after another for so long."""
    before, end = engine.stats().compute_seconds, time.perf_counter() + seconds
    taken: list[float] = []
    for first in itertools.cycle(range(0, len(requests), 16)):
        if time.perf_counter() >= end:
            break
        engine.run(requests[first : first + 16])
        after = engine.stats().compute_seconds
        taken.append(after - before)
        before = after
    return taken


def _thread_seconds(name: str) -> float:
    """Processor time of this process's threads of that name."""
    numbers = {thread.native_id for thread in threading.enumerate() if thread.name == name}
    return sum(each.user_time + each.system_time for each in psutil.Process().threads() if each.id in numbers)
