"""Rates hold over every interval, hints are exact, and what is out of range is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmi_engine.schedule.limits import QueueLimits, RateLimiter, TenantLimits

LIMITS = TenantLimits(tokens_per_second=10.0, burst_tokens=50.0)
ARRIVALS = st.lists(st.tuples(st.floats(0, 20), st.integers(1, 80)), min_size=1, max_size=60)


def admitted(limits, arrivals):
    """Times and sizes of what passes."""
    rates, now, passed = RateLimiter(), 0.0, []
    for pause, tokens in arrivals:
        now += pause
        if rates.seconds_until("tenant", limits, tokens, now) == 0:
            rates.take("tenant", limits, tokens, now)
            passed.append((now, tokens))
    return passed


@given(ARRIVALS)
def test_no_interval_has_more_than_the_burst_and_the_rate(arrivals):
    passed = admitted(LIMITS, arrivals)
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            tokens = sum(size for _, size in passed[first : last + 1])
            seconds = passed[last][0] - passed[first][0]
            largest = max(0, passed[last][1] - 50)  # beyond the bucket, paid back afterwards
            assert tokens <= 50 + 10 * seconds + largest + 1e-6


@given(ARRIVALS)
def test_nothing_is_refused_that_a_bucket_has_room_for(arrivals):
    """A bucket stepped through time, filled where it lies."""
    level, now, expected = 50.0, 0.0, []
    for pause, tokens in arrivals:
        now, level = now + pause, min(50.0, level + 10 * pause)
        if level >= min(50, tokens) - 1e-7:
            level -= tokens
            expected.append((now, tokens))
    assert admitted(LIMITS, arrivals) == expected


@given(ARRIVALS, st.integers(1, 80), st.floats(0.01, 0.99))
def test_the_hint_is_exact(arrivals, tokens, share):
    rates, now = RateLimiter(), 0.0
    for pause, size in arrivals:
        now += pause
        rates.take("tenant", LIMITS, size, now)
    wait = rates.seconds_until("tenant", LIMITS, tokens, now)
    if wait > 1e-3:
        assert rates.seconds_until("tenant", LIMITS, tokens, now + share * wait) > 0
    assert rates.seconds_until("tenant", LIMITS, tokens, now + wait) == 0


def test_tokens_given_back_can_be_taken_again():
    rates = RateLimiter()
    rates.take("tenant", LIMITS, 50, 0.0)
    assert rates.seconds_until("tenant", LIMITS, 20, 0.0) == pytest.approx(2.0)
    rates.give_back("tenant", LIMITS, 30, 0.0)
    assert rates.seconds_until("tenant", LIMITS, 20, 0.0) == 0
    rates.give_back("tenant", LIMITS, 1000, 0.0)
    assert rates.seconds_until("tenant", LIMITS, 50, 0.0) == 0
    rates.take("tenant", LIMITS, 50, 0.0)
    assert rates.seconds_until("tenant", LIMITS, 1, 0.0) > 0, "a bucket is never more than full"


def test_full_buckets_are_forgotten():
    rates = RateLimiter()
    for number in range(1000):
        now = number * 1.0
        rates.take(f"tenant{number}", LIMITS, 30, now)  # full again after 3 s
        rates.seconds_until("somebody", LIMITS, 1, now)
        assert len(rates) <= 4


def test_without_a_rate_everything_passes():
    rates = RateLimiter()
    rates.take("tenant", TenantLimits(), 10**9, 0.0)
    assert rates.seconds_until("tenant", TenantLimits(), 10**9, 0.0) == 0
    assert len(rates) == 0


@pytest.mark.parametrize(
    ("limits", "options", "message"),
    [
        (TenantLimits, {"weight": 0}, "weight is 0, must be a finite number above 0"),
        (TenantLimits, {"weight": math.nan}, "weight is nan"),
        (TenantLimits, {"weight": math.inf}, "weight is inf"),
        (TenantLimits, {"tokens_per_second": -1.0}, "tokens_per_second is -1.0"),
        (TenantLimits, {"tokens_per_second": 1.0, "burst_tokens": 0.0}, "burst_tokens is 0.0"),
        (TenantLimits, {"burst_tokens": 5.0}, "means nothing without tokens_per_second"),
        (TenantLimits, {"max_concurrent": 0}, "max_concurrent is 0"),
        (QueueLimits, {"max_queued_requests": 0}, "max_queued_requests is 0"),
        (QueueLimits, {"max_queued_tokens": 0}, "max_queued_tokens is 0"),
        (QueueLimits, {"tenant_share": 0.0}, "tenant_share is 0.0"),
    ],
)
def test_limits_out_of_range(limits, options, message):
    with pytest.raises(ValueError, match=message):
        limits(**options)
