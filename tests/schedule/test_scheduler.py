"""What each call of the scheduler promises."""

import gc
import weakref

import pytest
from scheduler_simulation import Clock, request

from hmi_engine.errors import DeadlineExceededError, OverloadedError
from hmi_engine.schedule.limits import NO_LIMITS, QueueLimits, TenantLimits
from hmi_engine.schedule.queued_request import RequestState
from hmi_engine.schedule.scheduler import Scheduler

ROOMY = {"max_tokens": 10_000, "max_adapter_bytes": 1 << 40}


@pytest.fixture
def clock():
    return Clock()


def submitted(scheduler, *requests, limits=NO_LIMITS):
    for one in requests:
        scheduler.submit(one, limits)
    return list(requests)


def test_inside_a_tenant_by_priority_then_arrival(clock):
    scheduler = Scheduler(clock=clock)
    requests = [request("a", priority=priority) for priority in (0, 2, 1, 2, -1)]
    first, second, third, fourth, fifth = submitted(scheduler, *requests)
    assert scheduler.next_batch(**ROOMY) == [second, fourth, third, first, fifth]


def test_priority_does_not_move_a_tenant_past_another(clock):
    def order(priority):
        scheduler = Scheduler(clock=clock)
        submitted(scheduler, *(request("quiet") for _ in range(3)))
        submitted(scheduler, *(request("loud", priority=priority) for _ in range(3)))
        batches = [scheduler.next_batch(max_tokens=10, max_adapter_bytes=100) for _ in range(6)]
        return [one.tenant for (one,) in batches]

    assert order(10**9) == order(0) == ["quiet", "loud"] * 3


def test_weight_is_the_share(clock):
    limits = {"double": TenantLimits(weight=2.0), "single": TenantLimits()}
    scheduler = Scheduler(clock=clock)
    for tenant, own in limits.items():
        submitted(scheduler, *(request(tenant) for _ in range(60)), limits=own)
    served = [scheduler.next_batch(max_tokens=10, max_adapter_bytes=100)[0].tenant for _ in range(60)]
    assert served.count("double") == 40


def test_a_larger_request_than_any_batch_is_served_alone(clock):
    scheduler = Scheduler(clock=clock)
    small, large, other = submitted(scheduler, request("a", 10), request("b", 500), request("c", 10))
    assert scheduler.next_batch(max_tokens=100, max_adapter_bytes=1000) == [small, other]
    assert scheduler.next_batch(max_tokens=100, max_adapter_bytes=1000) == [large]


def test_larger_weights_than_any_batch_may_have_are_served_alone(clock):
    scheduler = Scheduler(clock=clock)
    large, small = submitted(scheduler, request("a", adapter_bytes=5000), request("b", adapter_bytes=10))
    assert scheduler.next_batch(max_tokens=100, max_adapter_bytes=1000) == [large]
    assert scheduler.next_batch(max_tokens=100, max_adapter_bytes=1000) == [small]


def test_generations_of_a_tenant_are_segments_of_their_own(clock):
    scheduler = Scheduler(clock=clock)
    old, new = ("id", 1), ("id", 2)
    a, b, c = submitted(scheduler, request("a", key=old), request("a", key=new), request("a", key=old))
    assert scheduler.next_batch(**ROOMY) == [a, c, b]


def test_cold_tenants_take_no_more_than_their_part(clock):
    scheduler = Scheduler(clock=clock)
    cold = submitted(scheduler, *(request(f"cold{number}") for number in range(5)))
    warm = submitted(scheduler, request("warm"))
    batch = scheduler.next_batch(**ROOMY, is_resident=lambda key: key == "warm", max_cold_bytes=250)
    assert batch == [*cold[:2], *warm]
    batch = scheduler.next_batch(**ROOMY, is_resident=lambda key: False, max_cold_bytes=250)
    assert batch == cold[2:4], "who was passed over is first"


def test_without_anybody_resident_the_first_is_served(clock):
    scheduler = Scheduler(clock=clock)
    cold = submitted(scheduler, *(request(f"cold{number}") for number in range(3)))
    for one in cold:
        assert scheduler.next_batch(**ROOMY, is_resident=lambda key: False, max_cold_bytes=0) == [one]


@pytest.mark.parametrize("passings", [1, 3, 8])
def test_a_cold_tenant_is_passed_over_so_often_and_no_more(clock, passings):
    scheduler = Scheduler(clock=clock, max_lead_tokens=1e9, max_passings=passings)
    submitted(scheduler, *(request("warm") for _ in range(100)))
    (cold,) = submitted(scheduler, request("cold"))
    for number in range(passings + 1):
        batch = scheduler.next_batch(
            max_tokens=30, max_adapter_bytes=1000, is_resident=lambda key: key == "warm", max_cold_bytes=0
        )
        assert (cold in batch) == (number == passings)


def test_nobody_is_farther_ahead_of_a_cold_tenant_than_the_lead(clock):
    scheduler = Scheduler(clock=clock, max_lead_tokens=55, max_passings=1000)
    (cold,) = submitted(scheduler, request("cold"))
    warm = submitted(scheduler, *(request("warm") for _ in range(100)))
    batch = scheduler.next_batch(**ROOMY, is_resident=lambda key: key == "warm", max_cold_bytes=0)
    assert batch == warm[:6], "the sixth begins 50 ahead"
    batch = scheduler.next_batch(**ROOMY, is_resident=lambda key: key == "warm", max_cold_bytes=0)
    assert batch[0] is cold


def test_a_due_tenant_that_does_not_fit_closes_the_batch(clock):
    """A batch has room for a large tenant and a small one, until a large one has been passed over twice."""
    scheduler = Scheduler(clock=clock, max_lead_tokens=1e9, max_passings=2)
    small = submitted(scheduler, *(request("small", 5) for _ in range(10)))
    large = submitted(scheduler, *(request(f"large{number}", 95) for number in range(5)))
    batches = [scheduler.next_batch(max_tokens=100, max_adapter_bytes=1000) for _ in range(5)]
    assert batches == [
        [small[0], large[0]],
        [large[1], small[1]],
        [large[2], small[2]],
        [large[3]],  # the fifth has been passed over in two batches
        [large[4], small[3]],
    ]


def test_few_tenants_are_tried_for_what_is_left_of_a_batch(clock):
    scheduler = Scheduler(clock=clock)
    large = submitted(scheduler, *(request(f"large{number}", 95) for number in range(100)))
    submitted(scheduler, request("small", 5))
    assert scheduler.next_batch(max_tokens=100, max_adapter_bytes=1000) == large[:1]
    assert scheduler.statistics.totals.passed_over == 32


def test_looks_at_few_of_many_cold_tenants(clock):
    """Ten thousand tenants that wait for their weights do not make each batch slow."""
    scheduler = Scheduler(clock=clock, max_passings=10**6)
    looks = []

    def is_resident(key):
        looks.append(key)
        return key.startswith("warm")

    submitted(scheduler, *(request(f"cold{number}") for number in range(10_000)))
    submitted(scheduler, *(request(f"warm{number}") for number in range(500)))
    budgets = {"max_tokens": 100, "max_adapter_bytes": 1 << 40, "is_resident": is_resident}
    scheduler.next_batch(**budgets, max_cold_bytes=0)
    assert len(looks) >= 10_000
    for _ in range(10):
        looks.clear()
        batch = scheduler.next_batch(**budgets, max_cold_bytes=0)
        assert len(batch) == 10 and all(one.tenant.startswith("warm") for one in batch)
        assert len(looks) <= 128 + 10


def test_weights_that_arrived_are_seen(clock):
    scheduler = Scheduler(clock=clock)
    first, second = submitted(scheduler, request("first"), request("second"))
    warm = submitted(scheduler, *(request("warm", 5) for _ in range(20)))
    resident = {"warm"}
    budgets = {"max_tokens": 10, "max_adapter_bytes": 1000, "is_resident": resident.__contains__}
    assert scheduler.next_batch(**budgets, max_cold_bytes=0) == warm[:2]
    resident.add("second")
    assert scheduler.next_batch(**budgets, max_cold_bytes=0) == [second]
    resident.add("first")
    assert scheduler.next_batch(**budgets, max_cold_bytes=0) == [first]


def test_another_first_request_is_looked_at_though_the_tenant_was_cold(clock):
    scheduler = Scheduler(clock=clock, max_passings=10**6)
    submitted(scheduler, *(request(f"cold{number}") for number in range(200)))
    old = request("tenant", key="old")
    submitted(scheduler, old)
    submitted(scheduler, *(request("warm", key="new") for _ in range(10)))
    budgets = {"max_tokens": 10, "max_adapter_bytes": 1000, "is_resident": {"new"}.__contains__}
    assert scheduler.next_batch(**budgets, max_cold_bytes=0)[0].tenant == "warm"
    (urgent,) = submitted(scheduler, request("tenant", key="new", priority=1))
    assert scheduler.next_batch(**budgets, max_cold_bytes=0) == [urgent]
    (behind,) = submitted(scheduler, request("tenant", key="new"))
    for _ in range(2):  # the tenant is found to be cold again
        assert scheduler.next_batch(**budgets, max_cold_bytes=0)[0].tenant == "warm"
    scheduler.cancel(old)
    assert scheduler.next_batch(**budgets, max_cold_bytes=0) == [behind]


def test_a_due_tenant_is_not_hidden_behind_many_cold_ones(clock):
    """150 come after it, with smaller counters, and wait for their weights."""
    scheduler = Scheduler(clock=clock, max_lead_tokens=1e9, max_passings=4)
    budgets = {"max_tokens": 10, "max_adapter_bytes": 1000, "max_cold_bytes": 0}

    def next_batch(*resident):
        return scheduler.next_batch(**budgets, is_resident=resident.__contains__)

    first, once, due = submitted(scheduler, request("first"), request("due"), request("due"))
    assert next_batch("due") == [once]
    submitted(scheduler, *(request("warm") for _ in range(10)))
    assert next_batch("warm")[0].tenant == "warm"
    assert next_batch("warm")[0].tenant == "warm", "passes it for the first time"
    submitted(scheduler, *(request(f"later{number}") for number in range(150)))
    assert next_batch("warm")[0].tenant == "warm"
    assert next_batch("warm") == [first], "passed over in the four batches before"
    assert next_batch("warm")[0].tenant == "warm"
    assert next_batch("warm") == [due]


def test_a_tenant_that_left_is_not_due_when_it_returns(clock):
    scheduler = Scheduler(clock=clock, max_lead_tokens=1e9, max_passings=2)
    budgets = {"max_tokens": 10, "max_adapter_bytes": 1000, "max_cold_bytes": 0}
    submitted(scheduler, *(request("warm") for _ in range(10)))
    running, cancelled = submitted(scheduler, request("leaves"), request("leaves"))
    batches = [scheduler.next_batch(**budgets) for _ in range(2)]
    assert batches[1] == [running], "so the tenant is known while it has nothing queued"
    for _ in range(2):
        assert scheduler.next_batch(**budgets, is_resident={"warm"}.__contains__)[0].tenant == "warm"
    scheduler.cancel(cancelled)
    (back,) = submitted(scheduler, request("leaves"))
    for _ in range(3):
        assert scheduler.next_batch(**budgets, is_resident={"warm"}.__contains__)[0].tenant == "warm"
    assert scheduler.next_batch(**budgets, is_resident={"warm"}.__contains__) == [back]


def test_peek_tells_whose_weights_are_needed_soonest(clock):
    scheduler = Scheduler(clock=clock)
    a, _, b, c = submitted(scheduler, request("a"), request("a"), request("b"), request("c"))
    assert scheduler.peek(2) == [a, b]
    scheduler.next_batch(**ROOMY, is_resident=lambda key: key == "a", max_cold_bytes=0)
    assert scheduler.peek(5) == [b, c], "passed over, so first"


def test_concurrency_is_of_queued_and_running(clock):
    scheduler, limits = Scheduler(clock=clock), TenantLimits(max_concurrent=2)
    first, second = submitted(scheduler, request("a"), request("a"), limits=limits)
    with pytest.raises(OverloadedError, match="max_concurrent=2"):
        scheduler.submit(request("a"), limits)
    scheduler.submit(request("b"), limits)
    scheduler.next_batch(max_tokens=30, max_adapter_bytes=1000)
    with pytest.raises(OverloadedError):
        scheduler.submit(request("a"), limits)
    assert scheduler.cancel(first)
    with pytest.raises(OverloadedError):
        scheduler.submit(request("a"), limits)
    assert first.state is RequestState.CANCELLED
    scheduler.finish([first])
    assert first.state is RequestState.CANCELLED and second.state is RequestState.RUNNING
    scheduler.submit(request("a"), limits)


def test_what_was_cancelled_or_is_late_frees_its_place(clock):
    scheduler = Scheduler(clock=clock, queue_limits=QueueLimits(max_queued_requests=1))
    limits = TenantLimits(max_concurrent=1, tokens_per_second=1.0, burst_tokens=10)
    (cancelled,), late = submitted(scheduler, request("a"), limits=limits), request("a", deadline=5.0)
    assert scheduler.cancel(cancelled)
    scheduler.submit(late, limits)
    with pytest.raises(OverloadedError):
        scheduler.submit(request("b"), limits)
    clock.now = 5.0
    scheduler.submit(request("b"), limits)
    assert scheduler.has_untold and len(scheduler) == 1
    assert scheduler.expire() == [late] and scheduler.expire() == []
    assert not scheduler.has_untold
    assert not scheduler.cancel(late) and not scheduler.cancel(cancelled)


def test_late_requests_are_refused_and_never_served(clock):
    scheduler = Scheduler(clock=clock)
    clock.now = 10.0
    with pytest.raises(DeadlineExceededError, match="tenant 'a'"):
        scheduler.submit(request("a", deadline=10.0))
    soon, later, never = submitted(
        scheduler, request("a", deadline=11.0), request("b", deadline=12.0), request("c")
    )
    clock.now = 11.5
    assert scheduler.next_batch(**ROOMY) == [later, never]
    clock.now = 13.0
    assert scheduler.expire() == [soon], "one that runs is not late"


def test_each_request_once(clock):
    scheduler = Scheduler(clock=clock)
    (one,) = submitted(scheduler, request("a"))
    with pytest.raises(ValueError, match="is queued: submit each request once"):
        scheduler.submit(one)
    with pytest.raises(ValueError, match="not running"):
        scheduler.finish([one])
    scheduler.next_batch(**ROOMY)
    with pytest.raises(ValueError, match="not running"):
        scheduler.finish([one, one])
    scheduler.finish([one])
    with pytest.raises(ValueError, match="not running"):
        scheduler.finish([one])
    with pytest.raises(ValueError, match="is done"):
        scheduler.submit(one)
    assert not scheduler.cancel(one)


def test_who_was_refused_may_come_again(clock):
    scheduler = Scheduler(clock=clock, queue_limits=QueueLimits(max_queued_requests=1))
    submitted(scheduler, request("a"))
    refused = request("b")
    with pytest.raises(OverloadedError):
        scheduler.submit(refused)
    assert refused.state is RequestState.NEW
    scheduler.next_batch(**ROOMY)
    scheduler.submit(refused)


def test_keeps_nothing_of_what_has_left(clock):
    class Payload:
        pass

    scheduler = Scheduler(clock=clock)
    watched = []
    for how in ("served", "cancelled", "late"):
        one = request("a", payload=Payload(), deadline=1.0 if how == "late" else None)
        watched.append(weakref.ref(one.payload))
        scheduler.submit(one)
        if how == "served":
            scheduler.finish(scheduler.next_batch(**ROOMY))
        elif how == "cancelled":
            scheduler.cancel(one)
        else:
            clock.now = 2.0
            scheduler.expire()
    del one
    gc.collect()
    assert [reference() for reference in watched] == [None] * 3
    for number in range(1000):
        submitted(scheduler, request(f"tenant{number}"))
        scheduler.finish(scheduler.next_batch(**ROOMY))
    assert scheduler.statistics.remembered_counters <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_lead_tokens": -1}, "max_lead_tokens is -1"),
        ({"max_passings": 0}, "max_passings is 0"),
    ],
)
def test_options_out_of_range(clock, options, message):
    with pytest.raises(ValueError, match=message):
        Scheduler(clock=clock, **options)


@pytest.mark.parametrize(
    "budget", [{"max_tokens": 0}, {"max_adapter_bytes": -1}, {"max_cold_bytes": -1}], ids=str
)
def test_budgets_out_of_range(clock, budget):
    with pytest.raises(ValueError, match="cannot be formed"):
        Scheduler(clock=clock).next_batch(**{**ROOMY, **budget})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tokens": 0}, "0 tokens"), ({"adapter_bytes": -1}, "-1 bytes"), ({"deadline": float("nan")}, "NaN")],
)
def test_requests_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"tenant 'a'.*{message}"):
        request("a", **options)
