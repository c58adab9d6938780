"""The scheduler against the rule written down with lists, and what must hold after any calls in any order."""

import collections

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference_scheduler import ReferenceScheduler
from scheduler_simulation import Clock, number_of_segments, request

from hmi_engine.schedule.limits import QueueLimits, TenantLimits
from hmi_engine.schedule.queued_request import RequestState
from hmi_engine.schedule.scheduler import Scheduler

TENANTS = [f"tenant{number}" for number in range(6)]
WEIGHTS = dict(zip(TENANTS, [1.0, 1.0, 1.0, 0.5, 2.0, 4.0], strict=True))  # floats are exact
KEYS = [f"{tenant}/{number}" for tenant in TENANTS for number in range(2)]
BYTES = {key: 100 + 50 * (number % 3) for number, key in enumerate(KEYS)}


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.submitted = []
        self.in_flight = []
        self.left = collections.Counter()

    @initialize(lead=st.sampled_from([0, 8, 64, 10**6]), passings=st.integers(1, 4))
    def begin(self, lead, passings):
        self.scheduler = Scheduler(
            clock=self.clock,
            queue_limits=QueueLimits(tenant_share=None),
            max_lead_tokens=lead,
            max_passings=passings,
        )
        self.reference = ReferenceScheduler(weights=WEIGHTS, max_lead_tokens=lead, max_passings=passings)

    @rule(
        key=st.sampled_from(KEYS),
        tokens=st.integers(1, 64),
        priority=st.integers(-1, 1),
        patience=st.none() | st.floats(0.5, 20),
    )
    def submit(self, key, tokens, priority, patience):
        self.reference_expires()
        one = request(
            key.partition("/")[0],
            tokens,
            key=key,
            adapter_bytes=BYTES[key],
            priority=priority,
            deadline=None if patience is None else self.clock.now + patience,
        )
        self.scheduler.submit(one, TenantLimits(weight=WEIGHTS[one.tenant]))
        self.reference.submit(one)
        self.submitted.append(one)

    @rule(
        tokens=st.integers(1, 150),
        num_bytes=st.integers(0, 900),
        resident=st.none() | st.sets(st.sampled_from(KEYS)),
        cold_bytes=st.none() | st.integers(0, 400),
    )
    def next_batch(self, tokens, num_bytes, resident, cold_bytes):
        self.reference_expires()
        budgets = {"max_tokens": tokens, "max_adapter_bytes": num_bytes, "max_cold_bytes": cold_bytes}
        expected = self.reference.next_batch(**budgets, resident=resident)
        batch = self.scheduler.next_batch(
            **budgets, is_resident=None if resident is None else resident.__contains__
        )
        assert batch == expected
        self.check(batch, tokens, num_bytes)
        if batch:
            self.in_flight.append(batch)

    @rule(data=st.data(), count=st.integers(1, 4))
    def several_batches(self, data, count):
        resident = data.draw(st.sets(st.sampled_from(KEYS)))
        for _ in range(count):
            self.next_batch(60, 500, resident, 150)

    def check(self, batch, max_tokens, max_bytes):
        assert all(one.state is RequestState.RUNNING for one in batch)
        sizes = {one.weights_key: one.adapter_bytes for one in batch}
        assert sum(one.num_tokens for one in batch) <= max_tokens or len(batch) == 1
        assert sum(sizes.values()) <= max_bytes or len(batch) == 1
        assert number_of_segments(batch) == len(sizes)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def finish(self, data):
        batch = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        self.scheduler.finish(batch)
        for one in batch:
            assert one.state in (RequestState.DONE, RequestState.CANCELLED)
            self.left[one] += 1

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data):
        one = data.draw(st.sampled_from(self.submitted))
        was = one.state
        assert self.scheduler.cancel(one) == (was in (RequestState.QUEUED, RequestState.RUNNING))
        if was is RequestState.QUEUED:
            self.reference.withdraw(one)
            self.left[one] += 1

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule()
    def expire(self):
        self.reference_expires()
        for one in self.scheduler.expire():
            assert one.state is RequestState.EXPIRED
            self.left[one] += 1

    def reference_expires(self):
        self.reference.expire(self.clock.now)

    @rule(limit=st.integers(0, 7))
    def peek(self, limit):
        self.reference_expires()
        expected = [self.reference.head(tenant) for tenant in self.reference.in_turn()[:limit]]
        assert self.scheduler.peek(limit) == expected

    @invariant()
    def nothing_leaves_twice(self):
        assert all(times == 1 for times in self.left.values())

    @invariant()
    def totals_agree(self):
        if not hasattr(self, "scheduler"):
            return
        told = self.scheduler.statistics
        states = collections.Counter(one.state for one in self.submitted)
        queued = [one for one in self.submitted if one.state is RequestState.QUEUED]
        assert len(self.scheduler) == told.queued_requests == len(queued)
        assert self.scheduler.queued_tokens == told.queued_tokens == sum(one.num_tokens for one in queued)
        assert told.queued_tenants == len({one.tenant for one in queued})
        assert told.running_requests == sum(len(batch) for batch in self.in_flight)
        totals = told.totals
        assert totals.submitted == len(self.submitted)
        assert (totals.served, totals.cancelled, totals.expired) == (
            states[RequestState.DONE],
            states[RequestState.CANCELLED],
            states[RequestState.EXPIRED],
        )

    def teardown(self):
        """Every request that was submitted leaves once."""
        if not hasattr(self, "scheduler"):
            return
        while len(self.scheduler):
            self.next_batch(100, 1000, None, None)
        while self.in_flight:
            batch = self.in_flight.pop()
            self.scheduler.finish(batch)
            self.left.update(batch)
        self.left.update(self.scheduler.expire())
        assert self.left == collections.Counter(self.submitted)
        assert self.scheduler.next_batch(max_tokens=1, max_adapter_bytes=0) == []


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
