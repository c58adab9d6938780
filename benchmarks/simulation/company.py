"""What the stages of the real engine cost in company: beside queueing and a thread that admits."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import psutil

from benchmarks.load_fleet import Fleet, open_engine, resident_engine
from benchmarks.load_generator import LoadGenerator
from benchmarks.load_traffic import Arrivals, zipf_popularity
from benchmarks.stage_seconds import stage_seconds
from hmi_engine.engine import Engine
from hmi_engine.pipeline.admission import admit
from hmi_engine.request import Request
from hmi_engine.store import Store

__all__ = [
    "STAGES",
    "Queueing",
    "batch_seconds",
    "crowding",
    "num_cores",
    "observe_contention",
    "observe_loop",
    "repeating",
    "requests_in_turn",
    "thread_seconds",
]

STAGES = ("fetch", "search", "compute", "respond")


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def crowding(compute_cores: float) -> float:
    """How many times as slow compute is beside one busy thread, as its share of the cores alone makes it."""
    return max(1.0, (compute_cores + 1) / num_cores())


@dataclass(frozen=True)
class Queueing:
    """What a loop takes of the processor beside the stages from fetching on.

    Attributes:
        admit: seconds for each token, of the threads that send and admit, many requests at a time.
        form: seconds for each token, of the computing thread.
        requests_per_second: that were answered.
    """

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
        before, admitted = engine.stats(), thread_seconds("hmi-admit")
        began = time.perf_counter()
        run = sender.closed_loop(requests, concurrency=256, seconds=seconds)
        taken = time.perf_counter() - began
        after, admitted = engine.stats(), thread_seconds("hmi-admit") - admitted
    tokens = after.tokens - before.tokens
    num_requests = after.requests - before.requests
    worked = stage_seconds(after, before)
    return Queueing(
        admit=(admitted + run.generator_seconds) / tokens,
        form=max(0.0, taken - sum(worked[name] for name in STAGES)) / tokens,
        requests_per_second=num_requests / taken,
    )


def observe_contention(fleet: Fleet, seconds: float, compute_cores: float) -> float:
    """Batches without and beside a thread that admits requests one by one, all the time.

    The simulation slows both down alike; in truth the team of threads that computes loses more than the
    thread that admits. So what counts is what compute loses for a second of admission.
    """
    requests = requests_in_turn(fleet)
    with resident_engine(fleet) as (store, engine):
        admission = _ConstantAdmission(store, requests)
        batch_seconds(engine, requests, seconds / 4)
        alone, beside = list[float](), list[float]()
        admission_alone, admission_beside = list[float](), list[float]()
        for _ in range(2):
            alone += batch_seconds(engine, requests, seconds / 4)
            admission_alone.append(admission.seconds_of_one(lambda: time.sleep(seconds / 16)))
            admission_beside.append(
                admission.seconds_of_one(lambda: beside.extend(batch_seconds(engine, requests, seconds / 4)))
            )
    slower = float(np.median(beside) / np.median(alone))
    lost = float(np.mean(admission_beside)) * (1 - 1 / slower)
    return max(1.0, (1 + lost / float(np.mean(admission_alone))) / crowding(compute_cores))


def requests_in_turn(fleet: Fleet) -> list[Request]:
    """512 requests, tenants and texts in turn."""
    numbers = np.arange(512)
    return fleet.requests(
        Arrivals(numbers % len(fleet.names), numbers % len(fleet.texts), np.zeros(len(numbers)))
    )


@contextmanager
def repeating(work: Callable[[], None]) -> Iterator[None]:
    """A thread that does ``work`` again and again until the end of the block."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _ConstantAdmission:
    """Admits requests one by one, for as long as something else is done."""

    def __init__(self, store: Store, requests: Sequence[Request]) -> None:
        self._store, self._requests = store, itertools.cycle(requests)
        self._num_admitted = 0

    def seconds_of_one(self, meanwhile: Callable[[], None]) -> float:
        """Seconds that an admission takes while ``meanwhile`` runs."""
        before, began = self._num_admitted, time.perf_counter()
        with repeating(self._admit):
            meanwhile()
            taken = time.perf_counter() - began
        return taken / (self._num_admitted - before)

    def _admit(self) -> None:
        admit([next(self._requests)], self._store.tenants, self._store.encoder)
        self._num_admitted += 1


def batch_seconds(engine: Engine, requests: Sequence[Request], seconds: float) -> list[float]:
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


def thread_seconds(name: str) -> float:
    """Processor time of this process's threads of that name."""
    numbers = {thread.native_id for thread in threading.enumerate() if thread.name == name}
    return sum(each.user_time + each.system_time for each in psutil.Process().threads() if each.id in numbers)
