"""What does another thread of the same process cost an engine that computes on the processor?"""

from __future__ import annotations

import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.arguments import Arguments, read_arguments
from benchmarks.load_fleet import Fleet, build_fleet
from benchmarks.load_traffic import Arrivals
from benchmarks.result import BenchmarkResult, Table
from hmi_engine.engine import Engine
from hmi_engine.pipeline.admission import admit
from hmi_engine.request import Request
from hmi_engine.store import Store

__all__ = ["main", "measure"]

NAME = "neighbours"
QUESTION = "What does another thread of the same process cost an engine that computes on the processor?"
NOTES = (
    "An engine computes batches of {batch} texts, one after another, while a thread does something else; and "
    "without it, in turn. Compute alone is timed, medians over batches.",
    "A product of matrices holds no lock of Python's, so it takes a core and nothing else: with all cores in "
    "the engine's team, whose threads wait for each other, that is more than a core's share. A loop in "
    "Python makes the engine wait for the lock at every kernel, up to `sys.getswitchinterval()` (5 ms by "
    "default).",
    "At the pace of a loaded engine: {paced} requests a second are checked, found and tokenised, one by one "
    "or in bursts, as `AsyncEngine`'s own thread does.",
)
BATCH = 16
PACED = 200
BURST = 32
WAIT = 5e-3
"""Python's own interval, in seconds."""
MATRIX = 256


@dataclass(frozen=True)
class _Plan:
    tenants: int
    plot_bytes: int
    seconds: float
    rounds: int


QUICK = _Plan(8, 1 << 20, 0.2, 1)
FULL = _Plan(80, 8 << 20, 2.0, 3)

Work = Callable[[], None]
"""One piece of what the other thread does."""


@dataclass(frozen=True)
class _Neighbour:
    """A thread: its work, seconds between two pieces, and Python's switch interval meanwhile."""

    name: str
    work: Work
    pause: float = 0.0
    switch_interval: float = WAIT


def _neighbours(store: Store, requests: Sequence[Request]) -> list[_Neighbour]:
    groups = itertools.cycle(range(0, len(requests) - BURST + 1, BURST))
    singles = itertools.cycle(requests)
    matrix = torch.randn(MATRIX, MATRIX)

    def admit_one() -> None:
        admit([next(singles)], store.tenants, store.encoder, vocab_size=store.general.vocab_size)

    def admit_burst() -> None:
        first = next(groups)
        burst = requests[first : first + BURST]
        admit(burst, store.tenants, store.encoder, vocab_size=store.general.vocab_size)

    def multiply() -> None:
        torch.mm(matrix, matrix)

    return [
        _Neighbour(f"admits {PACED} requests a second, one by one", admit_one, pause=1 / PACED),
        _Neighbour(f"admits {PACED} requests a second, {BURST} at once", admit_burst, pause=BURST / PACED),
        _Neighbour("admits all the time, one by one", admit_one),
        _Neighbour(f"admits all the time, {BURST} at once", admit_burst),
        _Neighbour("multiplies matrices on one core", multiply),
        _Neighbour("runs Python", _run_python),
        _Neighbour("runs Python, switch interval 0.5 ms", _run_python, switch_interval=5e-4),
    ]


def _run_python() -> None:
    """About a tenth of a millisecond that never lets the lock go by itself."""
    total = 0
    for number in range(2000):
        total += number


@contextmanager
def _beside(neighbour: _Neighbour) -> Iterator[None]:
    """The thread runs in the block."""
    stop = threading.Event()

    def run() -> None:
        torch.set_num_threads(1)
        while not stop.is_set():
            neighbour.work()
            if neighbour.pause:
                time.sleep(neighbour.pause)

    before, num_threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(neighbour.switch_interval)
    thread = threading.Thread(target=run, name="neighbour")
    thread.start()
    try:
        torch.set_num_threads(num_threads)
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)


def _batch_seconds(engine: Engine, requests: Sequence[Request], seconds: float) -> list[float]:
    """What batches took to compute, for so long; at least one."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    before = engine.stats().compute_seconds
    for first in itertools.cycle(range(0, len(requests), BATCH)):
        engine.run(requests[first : first + BATCH])
        after = engine.stats().compute_seconds
        taken.append(after - before)
        before = after
        if time.perf_counter() >= end:
            break
    return taken


def _table(fleet: Fleet, plan: _Plan) -> Table:
    count = np.arange(512)
    requests = fleet.requests(
        Arrivals(count % len(fleet.names), count % len(fleet.texts), np.zeros(len(count)))
    )
    rows = []
    with (
        Store.open(fleet.store, read_only=True) as store,
        Engine(store, pipeline_depth=1, record_traffic=False) as engine,
    ):
        engine.prefetch(fleet.names)
        _batch_seconds(engine, requests, plan.seconds)
        for neighbour in _neighbours(store, requests):
            alone: list[float] = []
            beside: list[float] = []
            for _ in range(plan.rounds):
                alone += _batch_seconds(engine, requests, plan.seconds)
                with _beside(neighbour):
                    beside += _batch_seconds(engine, requests, plan.seconds)
            of_alone, of_beside = float(np.median(alone)), float(np.median(beside))
            rows.append((neighbour.name, 1e3 * of_alone, 1e3 * of_beside, of_beside / of_alone))
    return Table(
        title="An engine beside another thread",
        columns=("the other thread", "a batch alone, ms", "beside it, ms", "times"),
        rows=tuple(rows),
    )


def measure(arguments: Arguments) -> BenchmarkResult:
    """Measures all of them."""
    plan = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        fleet = build_fleet(arguments, Path(folder), num_tenants=plan.tenants, plot_bytes=plan.plot_bytes)
        table = _table(fleet, plan)
    return BenchmarkResult.of(
        arguments,
        NAME,
        QUESTION,
        settings={**fleet.settings, "torch_threads": torch.get_num_threads()},
        notes=tuple(note.format(batch=BATCH, paced=PACED) for note in NOTES),
        tables=(table,),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments(NAME, QUESTION, argv)
    result = measure(arguments)
    result.write(arguments.out)
    for row in result.tables[0].rows:
        print(*(f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row), sep="  ")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
