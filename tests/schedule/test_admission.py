"""A full queue refuses at once, leaves room for others, and says when to come again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_simulation import Clock, Engine, request

from hmi_engine.errors import OverloadedError
from hmi_engine.schedule.limits import NO_LIMITS, QueueLimits, TenantLimits
from hmi_engine.schedule.scheduler import Scheduler


def fill(scheduler, tenant, tokens=10, limits=NO_LIMITS):
    """Submits until refused; gives what was accepted, and the refusal."""
    accepted = []
    for _ in range(10**5):
        one = request(tenant, tokens)
        try:
            scheduler.submit(one, limits)
        except OverloadedError as error:
            return accepted, error
        accepted.append(one)
    raise AssertionError("never refused")


def serve(scheduler, clock, tokens, seconds):
    """One batch of so many tokens, which takes so long."""
    batch = scheduler.next_batch(max_tokens=tokens, max_adapter_bytes=1 << 40)
    clock.now += seconds
    scheduler.finish(batch)


@pytest.mark.parametrize(
    "limits", [QueueLimits(30, 10**6, None), QueueLimits(10**6, 300, None)], ids=["requests", "tokens"]
)
def test_a_full_queue_tells_when_there_is_room(limits):
    clock = Clock()
    scheduler = Scheduler(clock=clock, queue_limits=limits)
    accepted, error = fill(scheduler, "a")
    assert len(accepted) == 30
    assert "the queue is full: 30 requests of 300 tokens" in str(error)
    assert error.retry_after_seconds is None and "later" in str(error), "nothing was served yet"
    serve(scheduler, clock, 100, 0.5)  # 200 tokens a second
    accepted, error = fill(scheduler, "a")
    assert len(accepted) == 10
    assert error.retry_after_seconds == pytest.approx(10 / 200)
    assert "try again in 0.05 s" in str(error)


def test_the_hint_counts_the_tokens_that_must_go():
    clock = Clock()
    scheduler = Scheduler(clock=clock, queue_limits=QueueLimits(10**6, 300, None))
    fill(scheduler, "a")
    serve(scheduler, clock, 100, 0.5)
    with pytest.raises(OverloadedError) as caught:
        scheduler.submit(request("a", 250))
    assert caught.value.retry_after_seconds == pytest.approx(150 / 200)
    serve(scheduler, clock, 150, 150 / 200)
    scheduler.submit(request("a", 250))


def test_idle_time_is_not_serving_time():
    clock = Clock()
    scheduler = Scheduler(clock=clock)
    for _ in range(5):
        scheduler.submit(request("a", 50))
        serve(scheduler, clock, 100, 0.5)
        clock.now += 100
    assert scheduler.statistics.tokens_per_second == pytest.approx(100)


def test_the_measured_rate_follows():
    clock = Clock()
    scheduler = Scheduler(clock=clock)
    for seconds in [0.1] * 100 + [1.0] * 100:
        scheduler.submit(request("a", 50))
        serve(scheduler, clock, 100, seconds)
    assert scheduler.statistics.tokens_per_second == pytest.approx(50, rel=0.02)


def test_a_rate_limit_tells_exactly():
    clock = Clock()
    limits = TenantLimits(tokens_per_second=20.0, burst_tokens=100)
    scheduler = Scheduler(clock=clock)
    accepted, error = fill(scheduler, "a", 30, limits)
    assert len(accepted) == 3
    assert error.retry_after_seconds == pytest.approx((30 - 10) / 20)
    assert "tokens_per_second=20" in str(error)
    clock.now += error.retry_after_seconds
    scheduler.submit(request("a", 30), limits)
    scheduler.submit(request("b", 100), limits)


def test_a_limit_of_concurrency_estimates_by_the_tenants_share():
    clock = Clock()
    scheduler, limits = Scheduler(clock=clock), TenantLimits(max_concurrent=4)
    fill(scheduler, "a", limits=limits)
    serve(scheduler, clock, 40, 0.2)  # 200 tokens a second
    fill(scheduler, "b", limits=limits)
    _, error = fill(scheduler, "a", limits=limits)
    assert error.retry_after_seconds == pytest.approx(10 / 100), "one of its requests, at half the rate"


def test_an_empty_queue_takes_a_request_of_any_size():
    scheduler = Scheduler(clock=Clock(), queue_limits=QueueLimits(max_queued_tokens=100))
    scheduler.submit(request("a", 1000))
    with pytest.raises(OverloadedError):
        scheduler.submit(request("b", 1))


@pytest.mark.parametrize("senders", [1, 2, 9])
def test_others_find_room_however_much_some_send(senders):
    """They come one after the other, and fill their parts again after each batch."""
    clock = Clock()
    scheduler = Scheduler(clock=clock, queue_limits=QueueLimits(1000, 10**9))
    for _ in range(300):
        for number in range(senders):
            _, error = fill(scheduler, f"sender{number}")
        serve(scheduler, clock, 1000, 0.1)
    assert "while others need room" in str(error)
    assert len(scheduler) == pytest.approx(1000 * senders / (senders + 1), abs=2 + 100)
    assert len(fill(scheduler, "newcomer")[0]) >= 1000 / (senders + 1) / 2 - 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 60)), max_size=80), st.floats(0.2, 4.0))
def test_what_a_tenant_may_have_of_the_queue(arrivals, share):
    limits = QueueLimits(20, 500, share)
    scheduler = Scheduler(clock=Clock(), queue_limits=limits)
    queued = []
    for tenant, tokens in arrivals:
        own = [size for who, size in queued if who == tenant]
        free_requests, free_tokens = 20 - len(queued), 500 - sum(size for _, size in queued)
        fits = free_requests >= 1 and tokens <= free_tokens
        fair = not own or (len(own) < share * free_requests and sum(own) < share * free_tokens)
        if fits and fair:
            scheduler.submit(request(tenant, tokens))
            queued.append((tenant, tokens))
        else:
            with pytest.raises(OverloadedError):
                scheduler.submit(request(tenant, tokens))


def test_the_hint_of_a_tenant_with_its_part_is_when_it_has_less():
    clock = Clock()
    scheduler = Scheduler(clock=clock, queue_limits=QueueLimits(100, 10**9))
    fill(scheduler, "a")
    serve(scheduler, clock, 100, 1.0)
    _, error = fill(scheduler, "a")
    assert error.retry_after_seconds == pytest.approx(0.1), "one request of 10 tokens, alone"
    serve(scheduler, clock, 10, 0.1)
    scheduler.submit(request("a"))


def test_hints_under_load_lead_back_in():
    """While requests come twice as fast as they are served, room for one more is never far."""
    clock = Clock()
    scheduler = Scheduler(clock=clock, queue_limits=QueueLimits(50, 10**9, None))
    engine = Engine(scheduler, clock, max_tokens=100, seconds_per_batch=0.0, seconds_per_token=0.001)
    engine.run([(0.001 * number, request(f"t{number % 100}")) for number in range(200)])
    hints = [error.retry_after_seconds for _, error in engine.refused]
    assert engine.refused
    known = [hint for hint in hints if hint is not None]
    assert known and all(0 < hint <= 0.02 for hint in known), "one request of 10 tokens at 1000 a second"
