"""What computing pays to threads that wake up beside it: simulated as solved by hand, and found again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

REASON = "the simulation needs the extra: bench"
pytest.importorskip("simpy", reason=REASON)
pytest.importorskip("psutil", reason=REASON)

from benchmarks.simulation.cluster import Cluster, closed_loop, open_loop  # noqa: E402
from benchmarks.simulation.engine import Workload  # noqa: E402
from benchmarks.simulation.machine import Costs, Disk, Machine, Tolls  # noqa: E402
from benchmarks.simulation.tolls import ArrivalCosts, LoadedRun  # noqa: E402
from hmi_engine.schedule.cost_model import StageCoefficients  # noqa: E402
from hmi_engine.schedule.limits import QueueLimits  # noqa: E402

UNLIMITED = QueueLimits(10**9, 10**9, tenant_share=None)


def fixed(seconds: float) -> StageCoefficients:
    return StageCoefficients(seconds, 0.0, 0.0, 0.0)


A_SECOND = Costs(compute=fixed(1.0))


def one_by_one(tolls: Tolls, *, costs: Costs = A_SECOND, **options: object) -> Machine:
    """Batches of one request, a second each, on cores enough for all."""
    given_options = {"cores": 4.0, "compute_cores": 2.0, "depth": 1, "looks_ahead": False}
    return Machine(costs, 10**12, max_batch_tokens=1, tolls=tolls, **{**given_options, **options})


def requests(count: int, *, tenants: int) -> Workload:
    return Workload(
        np.arange(count) % tenants, np.ones(count, dtype=np.int64), np.full(tenants, 1000, dtype=np.int64)
    )


def makespan(machine: Machine, count: int) -> float:
    """Seconds for requests of as many tenants that are there from the start."""
    cluster = Cluster(machine, limits=UNLIMITED)
    return float(
        closed_loop(cluster, requests(count, tenants=count), concurrency=count).outcomes.finished.max()
    )


@pytest.mark.parametrize("contention", [0.8, 1.0, 1.5])
@pytest.mark.parametrize("batch", [0.0, 0.31])
def test_computing_is_slower_while_requests_are_admitted(batch: float, contention: float) -> None:
    """The first computes while three more come, one after another, each of which takes 0.1 s alone."""
    machine = one_by_one(
        Tolls(batch=batch),
        cores=2.0,
        admission_contention=contention,
        costs=replace(A_SECOND, admit=fixed(0.1)),
    )
    due = [0.0, 0.3, 0.55, 0.8]
    found = open_loop(
        Cluster(machine, limits=UNLIMITED, is_fair=False), requests(4, tenants=1), np.array(due)
    )
    assert found.outcomes.finished[0] == pytest.approx(0.1 + 1 + batch + 3 * 0.1 * (1.5 * contention - 1))
    # Nothing comes any more while the others are computed.
    assert np.diff(found.outcomes.finished).tolist() == pytest.approx([1 + batch] * 3)


@pytest.mark.parametrize(("depth", "expected"), [(1, 5 * (1.0 + 0.1)), (2, 0.1 + 5 * 1.0 + 4 * 0.5)])
def test_computing_pays_for_what_is_read_beside_it(depth: int, expected: float) -> None:
    """Every tenant is read, each in 0.1 s; all but the first batch's while the one before computes."""
    machine = one_by_one(Tolls(tenant=0.5), depth=depth, disk=Disk(0.1))
    assert makespan(machine, 5) == pytest.approx(expected)


def test_a_device_pays_no_tolls() -> None:
    tolls = Tolls(batch=1.0, tenant=1.0)
    assert makespan(one_by_one(tolls, compute_cores=0.0), 5) == pytest.approx(5.0)
    assert tolls.times(2.0) == Tolls(2.0, 2.0)


@pytest.mark.parametrize(("slower", "batch_toll"), [(1.8, 0.0007), (1.0, 0.001), (1.3, 0.0)])
def test_costs_of_arriving_are_found_again(slower: float, batch_toll: float) -> None:
    """Loads under which requests come one by one, in pairs, and many at a time."""
    fixed_seconds, per_token = 0.0005, 1e-6
    runs = []
    for batches, admissions, requests, busy_share in [
        (900, 950, 1000, 0.4),
        (400, 900, 1600, 0.7),
        (90, 800, 2400, 0.9),
    ]:
        worked = fixed_seconds * admissions + per_token * 40 * requests
        lost = busy_share * worked * (slower - 1) + batch_toll * batches
        runs.append(LoadedRun(4.0, batches, admissions, requests, 40 * requests, busy_share, worked, lost))
    found = ArrivalCosts.of(runs, per_token=per_token)
    assert (found.fixed, found.slower, found.batch_toll) == pytest.approx((fixed_seconds, slower, batch_toll))


def admissions_one_by_one(due: list[float], admission: float, delay: float) -> int:
    """How often a thread admits what has arrived, each time for so long, and so late if it has slept."""
    count, free_at, first = 0, 0.0, 0
    while first < len(due):
        has_slept = due[first] > free_at
        begins = due[first] + delay if has_slept else free_at
        while first < len(due) and due[first] <= begins:
            first += 1
        count, free_at = count + 1, begins + admission
    return count


@pytest.mark.parametrize("delay", [0.0, 0.0003, 0.001])
@pytest.mark.parametrize("rate", [100.0, 400.0])
@pytest.mark.parametrize("admission", [0.0002, 0.0008])
def test_the_delay_is_found_by_how_many_come_together(rate: float, admission: float, delay: float) -> None:
    requests = 400_000
    due = np.cumsum(np.random.default_rng(0).exponential(1 / rate, requests))
    count = admissions_one_by_one(due.tolist(), admission, delay)
    run = LoadedRun(float(due[-1]), 1, count, requests, 1, 1.0, count * admission, 0.0)
    assert run.admission_delay == pytest.approx(delay, rel=0.02, abs=2e-5)


def test_what_arrives_while_the_admitting_thread_sleeps_is_admitted_together() -> None:
    """The second comes while the thread is still asleep; nothing computes yet when the first is admitted."""
    machine = one_by_one(
        Tolls(), costs=replace(A_SECOND, admit=fixed(0.25)), cores=2.0, compute_cores=2.0, admission_delay=0.5
    )
    due = np.array([0.0, 0.3, 0.7])
    cluster = Cluster(machine, limits=UNLIMITED, is_fair=False)
    found = open_loop(cluster, requests(3, tenants=1), due)
    # The first computes from 0.25 on and is slowed down by one admission, of the other two together at 0.8.
    first = 0.25 + 1 + 0.25 * (1.5 - 1)
    assert found.outcomes.finished.tolist() == pytest.approx([first, first + 1, first + 2])
