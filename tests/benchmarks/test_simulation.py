"""The simulation against closed formulas, naive references, and what can never be otherwise."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

REASON = "the simulation needs the extra: bench"
simpy = pytest.importorskip("simpy", reason=REASON)
pytest.importorskip("psutil", reason=REASON)

from benchmarks.load_outcomes import Fate  # noqa: E402
from benchmarks.load_traffic import poisson_times  # noqa: E402
from benchmarks.residency_simulation import simulate  # noqa: E402
from benchmarks.residency_traces import draw_trace  # noqa: E402
from benchmarks.simulation.cluster import Cluster, closed_loop, open_loop  # noqa: E402
from benchmarks.simulation.cores import SharedCores  # noqa: E402
from benchmarks.simulation.engine import Workload  # noqa: E402
from benchmarks.simulation.machine import FREE, Costs, Disk, Link, Machine, Tolls, Variation  # noqa: E402
from benchmarks.simulation.memory import Tier  # noqa: E402
from benchmarks.simulation.routing import AffinityRouter  # noqa: E402
from benchmarks.simulation.scenarios import Scenario, forecast  # noqa: E402
from hmi_engine.memory.eviction import FrequencyPerByte  # noqa: E402
from hmi_engine.schedule.cost_model import StageCoefficients  # noqa: E402
from hmi_engine.schedule.limits import QueueLimits  # noqa: E402

UNLIMITED = QueueLimits(10**9, 10**9, tenant_share=None)
TENANT_BYTES = 1000


def fixed(seconds: float) -> StageCoefficients:
    return StageCoefficients(seconds, 0.0, 0.0, 0.0)


def one_of_each(count: int, *, tokens: int = 1) -> Workload:
    """Every request asks for another tenant."""
    return Workload(np.arange(count), np.full(count, tokens), np.full(count, TENANT_BYTES, dtype=np.int64))


def machine(costs: Costs, **options: object) -> Machine:
    given_options = {"arena_bytes": 10**12, "depth": 1, "max_batch_tokens": 1, "looks_ahead": False}
    return Machine(costs=costs, **{**given_options, **options})


def makespan(costs: Costs, count: int, **options: object) -> float:
    """Seconds for ``count`` batches of one request each that are there from the start."""
    cluster = Cluster(machine(costs, **options), limits=UNLIMITED)
    found = closed_loop(cluster, one_of_each(count), concurrency=count)
    assert (found.outcomes.fates == Fate.ANSWERED).all()
    return float(found.outcomes.finished.max())


@pytest.mark.parametrize(("load", "lengths"), [(0.5, [1]), (0.8, [1]), (0.6, [1, 5])])
def test_waiting_times_follow_pollaczek_and_khinchine(load: float, lengths: list[int]) -> None:
    """M/D/1 and M/G/1, first come first served: the mean wait is rate E[S^2] / (2 (1 - load))."""
    generator = np.random.default_rng(5)
    service = 0.01 * np.asarray(lengths, dtype=float)
    rate = load / service.mean()
    due = poisson_times(rate, 16_000 / rate, generator)
    tokens = generator.choice(lengths, len(due))
    workload = Workload(np.zeros(len(due), dtype=np.int64), tokens, np.array([TENANT_BYTES]))
    costs = Costs(compute=StageCoefficients(0.0, 0.01, 0.0, 0.0))
    found = open_loop(Cluster(machine(costs), limits=UNLIMITED, is_fair=False), workload, due)
    waits = found.outcomes.finished - due - 0.01 * tokens
    assert waits.min() > -1e-9
    assert waits.mean() == pytest.approx(rate * (service**2).mean() / (2 * (1 - load)), rel=0.07)


def test_batches_that_vary_wait_as_pollaczek_and_khinchine_say() -> None:
    """M/G/1 again, where it is not the requests that differ but what a batch takes."""
    generator = np.random.default_rng(6)
    variation = (0.5, 0.5, 1.0, 2.0)
    service, load = 0.01 * np.array(variation), 0.6
    rate = load / service.mean()
    due = poisson_times(rate, 16_000 / rate, generator)
    workload = Workload(
        np.zeros(len(due), dtype=np.int64), np.ones(len(due), dtype=np.int64), np.array([TENANT_BYTES])
    )
    costs = Costs(compute=fixed(0.01))
    varying = machine(costs, variation=Variation(ratios=(variation,)))
    found = open_loop(Cluster(varying, limits=UNLIMITED, is_fair=False), workload, due)
    wait = (found.outcomes.finished - due).mean() - service.mean()
    assert wait == pytest.approx(rate * (service**2).mean() / (2 * (1 - load)), rel=0.07)


def test_batches_vary_as_those_of_their_size_did() -> None:
    """Small ones take half of what their costs say, large ones that much, or twice that much."""
    small, large = [(float(size), 0.5) for size in range(10, 50)], [(500.0, 1.0), (600.0, 2.0)] * 20
    variation = Variation.of([*large, *small], group=20, quantiles=4)
    assert len(variation.tokens) == 4
    assert variation.mean(1) == variation.mean(49) == 0.5
    assert variation.mean(600) == 2.0
    generator = np.random.default_rng(0)
    assert {variation.draw(30, generator) for _ in range(50)} == {0.5}
    assert {variation.draw(550, generator) for _ in range(50)} == {1.0}
    assert Variation.of(small[:3], group=20, quantiles=1).mean(1000) == 0.5


seconds = st.floats(0, 10).map(lambda value: round(value, 3))


@settings(max_examples=50, deadline=None)
@given(seconds, seconds, seconds, seconds, seconds, st.integers(1, 12))
def test_without_prefetching_the_time_is_the_sum_of_the_stages(
    form: float, fetch: float, search: float, compute: float, respond: float, count: int
) -> None:
    costs = Costs(FREE, fixed(form), fixed(fetch), fixed(search), fixed(compute), fixed(respond))
    disk = Disk(0.5, 2000.0)  # a read of 1000 bytes takes a second
    each = form + fetch + 1.0 + search + compute + respond
    assert makespan(costs, count, disk=disk) == pytest.approx(count * each)


@settings(max_examples=60, deadline=None)
@given(seconds, seconds, seconds, st.integers(1, 10), st.integers(2, 5))
def test_a_pipeline_takes_as_long_as_its_slowest_stage(
    fetch: float, search: float, compute: float, count: int, depth: int
) -> None:
    costs = Costs(fetch=fixed(fetch), search=fixed(search), compute=fixed(compute))
    prepare = fetch + search
    expected = prepare + (count - 1) * max(prepare, compute) + compute
    assert makespan(costs, count, depth=depth) == pytest.approx(expected)


def test_infinite_bandwidth_hides_everything() -> None:
    costs, copies = Costs(compute=fixed(2.0)), {"link": Link(0.0, math.inf), "upper_layers": 3, "depth": 2}
    assert makespan(costs, 10, **copies) == pytest.approx(20.0)
    slow = {**copies, "link": Link(0.0, 1000.0)}  # a second each: only the first is waited for
    cluster = Cluster(machine(costs, **slow), limits=UNLIMITED)
    found = closed_loop(cluster, one_of_each(10), concurrency=10, seconds=1e9)
    assert found.outcomes.finished.max() == pytest.approx(20.0 + 1 / 3)  # its first layer's part
    assert found.times.hidden_share == pytest.approx(1 - (1 / 3) / 10)


@settings(max_examples=60, deadline=None)
@given(seconds, seconds, st.integers(1, 8))
def test_a_layer_waits_for_its_own_copies(compute: float, copy: float, layers: int) -> None:
    """One batch: the layer that is critical, and what follows it, decide; a formula without a recursion."""
    link = Link(0.0, TENANT_BYTES / copy) if copy else Link(0.0, math.inf)
    found = makespan(Costs(compute=fixed(compute)), 1, link=link, upper_layers=layers)
    critical = [copy * (layer + 1) / layers + compute * (layers - layer) / layers for layer in range(layers)]
    assert found == pytest.approx(max(critical))


@st.composite
def drawn_loads(draw: st.DrawFn) -> tuple[Cluster, Workload, np.ndarray]:
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    count, tenants = draw(st.integers(1, 200)), draw(st.integers(1, 20))
    sizes = generator.integers(1, 2000, tenants)
    workload = Workload(generator.integers(0, tenants, count), generator.integers(1, 30, count), sizes)
    due = np.sort(generator.random(count)) * draw(st.floats(0.1, 30))
    cost = StageCoefficients(0.01, 0.002, 0.01, 1e-6)
    drawn = Machine(
        costs=Costs(*[cost] * 6),
        arena_bytes=draw(st.integers(12_000, 40_000)),
        host_bytes=draw(st.sampled_from([None, 6_000])),
        disk=Disk(0.05, 1e5, 2),
        link=draw(st.sampled_from([None, Link(0.001, 1e5)])),
        cores=draw(st.sampled_from([1.0, 2.0, math.inf])),
        compute_cores=draw(st.sampled_from([0.0, 2.0])),
        tolls=draw(st.sampled_from([Tolls(), Tolls(batch=0.01, tenant=0.005)])),
        contention=draw(st.sampled_from([1.0, 1.4])),
        admission_contention=draw(st.sampled_from([0.7, 1.0, 1.2])),
        upper_layers=3,
        depth=draw(st.integers(1, 4)),
        max_batch_tokens=draw(st.integers(1, 200)),
        latency_target=draw(st.sampled_from([None, 0.05, 1.0])),
        looks_ahead=draw(st.booleans()),
    )
    limits = QueueLimits(
        draw(st.integers(1, 100)), draw(st.integers(1, 1000)), draw(st.sampled_from([None, 1.0]))
    )
    timeout = draw(st.sampled_from([None, 0.05, 1.0]))
    engines = draw(st.integers(1, 3))
    return Cluster(drawn, engines, limits, timeout, draw(st.booleans())), workload, due


@settings(max_examples=150, deadline=None)
@given(drawn_loads())
def test_every_request_ends_once_and_leaves_nothing(load: tuple[Cluster, Workload, np.ndarray]) -> None:
    """Outcomes refuse a second end; here: that there is a first, and that nothing is held afterwards."""
    cluster, workload, due = load
    engines = []
    found = open_loop(cluster, workload, due, lambda made, _: engines.extend(made))
    fates = found.outcomes.fates
    assert (fates != Fate.OPEN).all()
    assert (found.outcomes.finished >= due - 1e-9).all()
    assert (found.engines >= 0).all()
    statistics = [engine._scheduler.statistics for engine in engines]
    assert sum(each.totals.served for each in statistics) == (fates == Fate.ANSWERED).sum()
    assert sum(each.totals.expired for each in statistics) <= (fates == Fate.EXPIRED).sum()
    assert all(each.queued_requests == each.running_requests == 0 for each in statistics)
    served = sum(engine.times.tokens for engine in engines)
    assert served == workload.tokens[fates == Fate.ANSWERED].sum()
    for engine in engines:
        for tier in (engine.memory.arena, engine.memory.host):
            if tier is not None:
                assert tier.used_bytes <= tier.capacity
                assert not tier._users and not tier.queue._waiting
    again = open_loop(cluster, workload, due)
    assert np.array_equal(again.outcomes.finished, found.outcomes.finished)
    assert np.array_equal(again.outcomes.fates, fates)


def test_the_fair_queue_is_the_engines_own() -> None:
    """Beside a flood another's request waits for the batch that runs, or for all that came before."""
    count = 100
    tenants = np.array([0] * count + [1])
    workload = Workload(tenants, np.ones(count + 1, dtype=np.int64), np.full(2, TENANT_BYTES))
    due = np.append(np.zeros(count), 0.5)
    costs = Costs(compute=fixed(1.0))
    ends = {
        is_fair: open_loop(
            Cluster(machine(costs), limits=UNLIMITED, is_fair=is_fair), workload, due
        ).outcomes.finished[-1]
        for is_fair in (True, False)
    }
    assert ends[True] <= 3.0 + 1e-9  # and at most one of the flood, whose counter is as small
    assert ends[False] == pytest.approx(count + 1.0)


def test_timeouts_and_full_queues() -> None:
    workload, due = one_of_each(3), np.zeros(3)
    costs = Costs(compute=fixed(1.0))
    expired = open_loop(Cluster(machine(costs), limits=UNLIMITED, timeout=1.5), workload, due)
    assert expired.outcomes.fates.tolist() == [Fate.ANSWERED, Fate.ANSWERED, Fate.EXPIRED]
    refused = open_loop(Cluster(machine(costs), limits=QueueLimits(1)), workload, due)
    assert refused.outcomes.fates.tolist() == [Fate.ANSWERED, Fate.REFUSED, Fate.REFUSED]


CoreJob = tuple[float, float, float, float | None]
"""Start, seconds, cores, contention."""


def shared_naively(jobs: list[CoreJob], cores: float) -> list[float]:
    """When jobs end: rates are computed anew at each start and end."""
    left = {number: job[1] for number, job in enumerate(jobs)}
    ends = [math.nan] * len(jobs)
    now = 0.0
    while left:
        running = [number for number in left if jobs[number][0] <= now]
        starts = [jobs[number][0] for number in left if jobs[number][0] > now]
        asked = sum(jobs[number][2] for number in running)
        said = [jobs[number][3] for number in running if jobs[number][3] is not None]
        speed = min(1.0, cores / asked / max(said or [1.0])) if asked > cores else 1.0
        nearest = min((left[number] / speed for number in running), default=math.inf)
        step = min([nearest, *(start - now for start in starts)])
        now += step
        for number in running:
            left[number] -= step * speed
            if left[number] <= 1e-9:
                ends[number] = now
                del left[number]
    return ends


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 20).map(float),
            st.integers(1, 9).map(float),
            st.sampled_from([1.0, 2.0, 1.5]),
            st.sampled_from([None, None, 1.5, 1.1, 0.8, 0.1]),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([1.0, 2.0, 3.0]),
)
def test_cores_are_shared_alike(jobs: list[CoreJob], cores: float) -> None:
    environment = simpy.Environment()
    shared = SharedCores(environment, cores)
    ends = [math.nan] * len(jobs)

    def job(number: int):
        start, work, width, contention = jobs[number]
        yield environment.timeout(start)
        yield shared.work(work, width, contention=contention)
        ends[number] = environment.now

    for number in range(len(jobs)):
        environment.process(job(number))
    environment.run()
    assert ends == pytest.approx(shared_naively(jobs, cores))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 5))
def test_disks(sizes: list[int], in_flight: int) -> None:
    total = sum(sizes)
    assert Disk(0.0, 100.0, in_flight).seconds(sizes) == pytest.approx(total / 100)
    waves = math.ceil(len(sizes) / in_flight)
    assert Disk(2.0, math.inf, in_flight).seconds(sizes) == pytest.approx(2.0 * waves)
    assert Disk(2.0, 100.0, 1).seconds(sizes) == pytest.approx(2.0 * len(sizes) + total / 100)
    both = Disk(2.0, 100.0, in_flight).seconds(sizes)
    assert max(2.0 * waves, total / 100 + 2.0) <= both + 1e-9
    assert both <= 2.0 * waves + total / 100 + 1e-9
    assert Disk(2.0, 100.0, len(sizes)).seconds(sizes) == pytest.approx(total / 100 + 2.0)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_tier_misses_as_often_as_the_residency_simulation(share: float) -> None:
    trace = draw_trace("zipf_1", 300, 5_000, seed=3)
    capacity = int(share * sum(trace.sizes))
    tier = Tier(capacity, np.array(trace.sizes))
    for tenant in trace.tenants:
        tier.hold([tenant])
        tier.release([tenant])
        assert tier.used_bytes <= capacity
    assert tier.misses == simulate(trace, FrequencyPerByte(), capacity).misses
    assert tier.hits + tier.misses == len(trace.tenants)


def test_a_tier_keeps_what_is_held_or_waited_for() -> None:
    tier = Tier(30, np.array([10, 10, 10, 10]))
    tier.hold([0, 1])
    tickets = tier.queue.expect([2])
    assert tier.prefetch([2, 3]) == [2]  # there is room for one, and that one is needed
    with pytest.raises(ValueError, match="no room for tenant 3"):
        tier.hold([2, 3])
    tier = Tier(30, np.array([10, 10, 10, 10]))
    tier.hold([0, 1, 2])
    tier.release([2])
    tickets = tier.queue.expect([2])
    assert tier.prefetch([3]) == [] and 2 in tier
    tier.queue.release(tickets)
    assert tier.prefetch([3]) == [3] and 2 not in tier and 0 in tier


def test_fewer_engines_move_only_their_own_tenants() -> None:
    tenants = np.arange(20_000)
    eight, seven = (AffinityRouter(count).first_choices(tenants) for count in (8, 7))
    stays = eight < 7
    assert (eight[stays] == seven[stays]).all()
    assert set(seven[~stays]) == set(range(7))
    counts = np.bincount(eight)
    assert counts.min() > 0.9 * len(tenants) / 8 and counts.max() < 1.1 * len(tenants) / 8
    router = AffinityRouter(8)
    for tenant in range(50):
        assert router.preferences(tenant)[0] == eight[tenant]
        assert sorted(router.preferences(tenant)) == list(range(8))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([0, 3]))
def test_loads_are_bounded(seed: int, engines: int, always: int) -> None:
    generator = np.random.default_rng(seed)
    router = AffinityRouter(engines, balance=1.25, always=always)
    loads = [0] * engines
    opened: list[int] = []
    for _ in range(200):
        if opened and generator.random() < 0.3:
            loads[opened.pop(int(generator.integers(len(opened))))] -= 1
            continue
        tenant = int(generator.zipf(1.5))
        first = int(router.first_choices(np.array([tenant]))[0])
        engine = router.route(tenant, first, loads, sum(loads))
        before = router.preferences(tenant)[: router.preferences(tenant).index(engine)]
        bound = max(always, math.ceil(1.25 * (sum(loads) + 1) / engines))
        assert all(loads[each] >= bound for each in before)  # nobody who is preferred had room
        loads[engine] += 1
        opened.append(engine)
        assert loads[engine] <= bound


def host_costs() -> Costs:
    each = StageCoefficients(1e-5, 1e-8, 1e-7, 0.0)
    return Costs(*[each] * 6)


def test_forecasts_follow_their_seed_and_grow_with_the_machine() -> None:
    base = Scenario(tenants=400, gpus=1, bytes_per_second=25e9, requests=4_000, seed=1)
    first, again = (forecast(base, host_costs(), [20, 40, 60]) for _ in range(2))
    assert first == again
    other = forecast(Scenario(400, 1, 25e9, requests=4_000, seed=2), host_costs(), [20, 40, 60])
    assert other != first
    assert 0 < first.compute_share <= 1.001 and 0 <= first.miss_ratio <= 1 and first.p50 <= first.p99
    four = forecast(Scenario(400, 4, 25e9, requests=8_000, seed=1), host_costs(), [20, 40, 60])
    assert four.requests_per_second > 3 * first.requests_per_second
    assert 1 <= four.most_over_mean < 1.6


def test_a_pipeline_hides_what_a_slow_link_would_cost() -> None:
    cold = {"tenants": 2_000, "gpus": 1, "bytes_per_second": 25e9, "exponent": 0.0, "requests": 3_000}
    found = {depth: forecast(Scenario(**cold, depth=depth), host_costs(), [20, 40, 60]) for depth in (1, 3)}
    assert found[1].miss_ratio > 0.8
    assert found[3].requests_per_second > found[1].requests_per_second
    assert found[3].hidden_share > found[1].hidden_share


def test_tenants_of_the_gpus_are_of_all_kinds() -> None:
    from benchmarks.simulation.gpu import tenant_sizes

    counts = Counter(tenant_sizes(16).tolist())
    assert len(counts) == 8 and set(counts.values()) == {2}
    # LoRA of rank 4 on query and value of six layers of 768, and a head of four classes, two bytes each.
    assert tenant_sizes(1)[0] == 2 * (6 * 2 * (768 * 4 + 4 * 768) + 4 * 768)
