"""What computing pays to threads that wake up beside it: simulated as solved by hand, and found again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
A_SECOND = Costs(compute=StageCoefficients(1.0, 0.0, 0.0, 0.0))


def one_by_one(tolls: Tolls, **options: object) -> Machine:
    """Batches of one request, a second each, on cores enough for all."""
    given_options = {"cores": 4.0, "compute_cores": 2.0, "depth": 1, "looks_ahead": False}
    return Machine(A_SECOND, 10**12, max_batch_tokens=1, tolls=tolls, **{**given_options, **options})


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


def ends_naively(due: list[float], compute: float, tolls: Tolls) -> list[float]:
    """When batches of one request end, each of which those pay for that come while it computes."""
    ends: list[float] = []
    for at in due:
        start = max([at, *ends[-1:]])
        end, paid = start + compute + tolls.batch, 0
        while (came := sum(start < other < end for other in due)) > paid:
            end, paid = end + (came - paid) * tolls.admission, came
        ends.append(end)
    return ends


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 20_000), min_size=1, max_size=12, unique=True),
    st.sampled_from([0.0, 0.31]),
    st.sampled_from([0.0, 0.17, 1.3]),
)
def test_computing_pays_for_what_arrives_meanwhile(
    milliseconds: list[int], batch: float, admission: float
) -> None:
    # Other digits for each, so that none comes at the moment of an end.
    due = [each / 1000 + number * 1e-5 for number, each in enumerate(sorted(milliseconds))]
    tolls = Tolls(batch=batch, admission=admission)
    cluster = Cluster(one_by_one(tolls), limits=UNLIMITED, is_fair=False)
    found = open_loop(cluster, requests(len(due), tenants=1), np.array(due))
    assert found.outcomes.finished.tolist() == pytest.approx(ends_naively(due, 1.0, tolls))


@pytest.mark.parametrize(("depth", "expected"), [(1, 5 * (1.0 + 0.1)), (2, 0.1 + 5 * 1.0 + 4 * 0.5)])
def test_computing_pays_for_what_is_read_beside_it(depth: int, expected: float) -> None:
    """Every tenant is read, each in 0.1 s; all but the first batch's while the one before computes."""
    machine = one_by_one(Tolls(tenant=0.5), depth=depth, disk=Disk(0.1))
    assert makespan(machine, 5) == pytest.approx(expected)


def test_a_device_pays_no_tolls() -> None:
    tolls = Tolls(batch=1.0, admission=1.0, tenant=1.0)
    assert makespan(one_by_one(tolls, compute_cores=0.0), 5) == pytest.approx(5.0)
    assert tolls.times(2.0) == Tolls(2.0, 2.0, 2.0)


@pytest.mark.parametrize(("admission_toll", "batch_toll"), [(0.0004, 0.0007), (0.0, 0.001), (0.0008, 0.0)])
def test_costs_of_arriving_are_found_again(admission_toll: float, batch_toll: float) -> None:
    """Loads under which requests come one by one, in pairs, and many at a time."""
    fixed_seconds, per_token, slower = 0.0005, 1e-6, 1.8
    runs = []
    for batches, admissions, requests, busy_share in [
        (900, 950, 1000, 0.4),
        (400, 900, 1600, 0.7),
        (90, 800, 2400, 0.9),
    ]:
        worked = fixed_seconds * admissions + per_token * 40 * requests
        lost = busy_share * (worked * (slower - 1) + admission_toll * admissions) + batch_toll * batches
        runs.append(LoadedRun(4.0, batches, admissions, requests, 40 * requests, busy_share, worked, lost))
    found = ArrivalCosts.of(runs, per_token=per_token, slower=slower)
    assert (found.fixed, found.admission_toll, found.batch_toll) == pytest.approx(
        (fixed_seconds, admission_toll, batch_toll)
    )


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
    admit = StageCoefficients(0.1, 0.0, 0.0, 0.0)
    machine = one_by_one(Tolls(admission=0.25), admission_delay=0.5)
    machine = replace(machine, costs=replace(machine.costs, admit=admit))
    due = np.array([0.0, 0.3, 0.7])
    cluster = Cluster(machine, limits=UNLIMITED, is_fair=False)
    found = open_loop(cluster, requests(3, tenants=1), due)
    # The first computes from 0.1 on and pays for one admission, of the other two together at 0.8.
    assert found.outcomes.finished.tolist() == pytest.approx([1.35, 2.35, 3.35])
