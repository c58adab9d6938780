"""Fits find what made the figures, and sizes follow from fits."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from hmi_engine.schedule import cost_model
from hmi_engine.schedule.cost_model import BatchSizer, StageCoefficients, StageCosts, StageWork

TRUTH = StageCoefficients(fixed=0.004, per_token=2e-5, per_tenant=3e-4, per_byte=1e-9)


def some_work(generator):
    tokens = generator.randint(50, 4000)
    return StageWork(tokens, generator.randint(1, 1 + tokens // 50), generator.randint(0, 5_000_000))


def fitted(truth, count, *, noise=0.0, seed=0, stall=None, costs=None):
    """Costs after observations of ``truth``; every twentieth is ``stall`` times as long."""
    generator = random.Random(seed)
    costs = costs or StageCosts()
    for number in range(count):
        work = some_work(generator)
        seconds = truth.seconds(work) * generator.lognormvariate(0, noise)
        costs.observe(work, seconds * (stall if stall and number % 20 == 19 else 1))
    return costs


def off_by(costs, truth, seed=1):
    """The median share by which predictions are off."""
    generator = random.Random(seed)
    works = [some_work(generator) for _ in range(101)]
    return sorted(abs(costs.seconds(work) / truth.seconds(work) - 1) for work in works)[50]


@settings(max_examples=50, deadline=None)
@given(
    fixed=st.sampled_from([0, 0.001, 0.1]),
    per_token=st.sampled_from([1e-6, 1e-4]),
    per_tenant=st.sampled_from([0, 1e-3]),
    per_byte=st.sampled_from([0, 1e-9, 1e-7]),
    seed=st.integers(0, 1000),
)
def test_finds_what_made_the_figures(fixed, per_token, per_tenant, per_byte, seed):
    truth = StageCoefficients(fixed, per_token, per_tenant, per_byte)
    costs = fitted(truth, 200, seed=seed)
    assert off_by(costs, truth) < 0.02
    found = costs.coefficients
    assert min(found.fixed, found.per_token, found.per_tenant, found.per_byte) >= 0


def test_noise_averages_out():
    assert off_by(fitted(TRUTH, 400, noise=0.2), TRUTH) < 0.05


@pytest.mark.parametrize("stall", [0.01, 10, 1000])
def test_a_stall_now_and_then_moves_it_little(stall):
    assert off_by(fitted(TRUTH, 400, noise=0.05, stall=stall), TRUTH) < 0.05


def test_follows_a_lasting_change():
    slower = StageCoefficients(0.02, 6e-5, 0, 3e-9)
    costs = fitted(slower, 500, noise=0.05, costs=fitted(TRUTH, 500, noise=0.05))
    assert off_by(costs, slower) < 0.05


def test_predicts_by_proportion_from_the_first():
    costs = StageCosts()
    assert costs.seconds(StageWork(100)) is None and costs.coefficients is None
    costs.observe(StageWork(1000, 10, 5000), 0.5)
    assert costs.seconds(StageWork(2000, 20, 10_000)) == pytest.approx(1.0, rel=0.01)
    fetch = StageCosts(driven_by="bytes")
    fetch.observe(StageWork(1000, 10, 5000), 0.5)
    assert fetch.seconds(StageWork(1, 1, 10_000)) == pytest.approx(1.0, rel=0.01)


def test_equal_batches_are_predicted_and_the_rest_by_proportion():
    costs = StageCosts()
    for _ in range(300):
        costs.observe(StageWork(1000, 10), 0.5)
    assert costs.seconds(StageWork(1000, 10)) == pytest.approx(0.5, rel=1e-3)
    assert costs.seconds(StageWork(500, 5)) == pytest.approx(0.25, rel=0.02)


def test_a_stage_that_takes_no_time():
    costs = StageCosts()
    for _ in range(50):
        costs.observe(StageWork(100, 1), 0.0)
    assert costs.seconds(StageWork(1000, 1)) == 0
    assert costs.within(1.0, "tokens") == math.inf
    for _ in range(600):
        costs.observe(StageWork(100, 1), 1e-3)
    assert costs.seconds(StageWork(100, 1)) == pytest.approx(1e-3, rel=0.05)


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_the_least_squares_without_negatives_are_scipys(seed, size):
    generator = np.random.default_rng(seed)
    left, right = generator.normal(size=(12, size)), generator.normal(size=12)
    found = cost_model._nonnegative_minimum((left.T @ left).tolist(), (left.T @ right).tolist())
    assert found == pytest.approx(nnls(left, right)[0], abs=1e-6)


def test_within_is_the_inverse_of_seconds():
    costs = fitted(TRUTH, 300)
    for seconds in (0.02, 0.1, 1.0):
        tokens = costs.within(seconds, "tokens")
        assert costs.seconds(costs.typical(tokens)) == pytest.approx(seconds)
    assert costs.within(0.0, "tokens") == 0


def sizer(compute=TRUTH, fetch=None, **options):
    stages = {"compute": StageCosts(), "fetch": StageCosts(driven_by="bytes")}
    if compute:
        fitted(compute, 300, costs=stages["compute"])
    if fetch:
        fitted(fetch, 300, costs=stages["fetch"])
    return BatchSizer(stages, **{"max_batch_tokens": 8192, "latency_target": 0.2, **options}), stages


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("target", [0.1, 0.5, 2.0])
def test_batches_are_as_large_as_the_target_allows(target, depth):
    sized, stages = sizer(latency_target=target, max_batch_tokens=10**6)
    tokens = sized.batch_tokens(depth)
    compute = stages["compute"]
    allowed = target / (depth + 1)
    assert compute.seconds(compute.typical(tokens)) <= allowed < compute.seconds(compute.typical(tokens + 1))


def test_the_slowest_stage_decides():
    slow = StageCoefficients(0, 1e-3, 0, 0)
    sized, _ = sizer(fetch=slow, latency_target=0.2)
    assert sized.batch_tokens(1) == pytest.approx(100, rel=0.05)


def test_a_target_that_cannot_be_met_does_not_make_crumbs():
    sized, _ = sizer(compute=StageCoefficients(0.05, 1e-4, 0, 0), latency_target=0.01)
    assert sized.batch_tokens(1) == pytest.approx(500, rel=0.05), "as long as the fixed part"
    tiny, _ = sizer(compute=StageCoefficients(0, 1.0, 0, 0), latency_target=0.01)
    assert tiny.batch_tokens(1) == 1


def test_without_a_target_or_figures():
    assert sizer(latency_target=None)[0].batch_tokens(3) == 8192
    assert sizer(compute=None)[0].batch_tokens(3) == cost_model.FIRST_BATCH_TOKENS
    assert sizer(compute=None, max_batch_tokens=100)[0].batch_tokens(3) == 100
    assert sizer(compute=None)[0].cold_bytes([], batch_tokens=100) is None
    assert sizer()[0].cold_bytes([], batch_tokens=100) is None, "nothing was fetched yet"


def test_cold_bytes_are_what_arrives_behind_compute():
    """Compute takes 0.1 ms a token, bytes come at 10 MB/s after 5 ms."""
    compute, fetch = StageCoefficients(0, 1e-4, 0, 0), StageCoefficients(0.005, 0, 0, 1e-7)
    sized, _ = sizer(compute=compute, fetch=fetch, latency_target=None)
    in_flight = [StageWork(1000), StageWork(500)]
    assert sized.cold_bytes(in_flight, batch_tokens=100) == pytest.approx((0.150 - 0.005) / 1e-7, rel=0.02)
    assert sized.cold_bytes([], batch_tokens=100) == pytest.approx((0.010 - 0.005) / 1e-7, rel=0.05)
    assert sized.cold_bytes([], batch_tokens=10) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageCosts(driven_by="time"), "driven_by is 'time', must be one of tokens, tenants, bytes"),
        (lambda: StageCosts(memory=0), "memory is 0"),
        (lambda: StageCosts().observe(StageWork(-1), 1.0), "must be finite and not negative"),
        (lambda: StageCosts().observe(StageWork(1), math.nan), "must be finite and not negative"),
        (lambda: sizer(max_batch_tokens=0), "max_batch_tokens is 0"),
        (lambda: sizer(latency_target=0), "latency_target is 0"),
        (lambda: sizer(compute=None, fetch=None)[0].batch_tokens(0), "depth is 0"),
        (lambda: BatchSizer({"compute": StageCosts()}, max_batch_tokens=1), "'fetch' is no stage"),
    ],
)
def test_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sizes_fall_with_depth_and_rise_with_the_target():
    sized = {
        (target, depth): sizer(latency_target=target)[0].batch_tokens(depth)
        for target, depth in itertools.product([0.05, 0.2, 0.8], [1, 2, 3, 4])
    }
    for (target, depth), tokens in sized.items():
        assert tokens >= sized.get((target, depth + 1), 0)
        assert tokens <= sized.get((target * 4, depth), 8192)
