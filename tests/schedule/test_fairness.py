"""Counters against ones that are never forgotten, and how many are remembered."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hmi_engine.schedule.fairness import VirtualTokenCounters

TENANTS = [f"tenant{number}" for number in range(8)]


class CountersMachine(RuleBasedStateMachine):
    """The paper's algorithm with a counter for everybody who ever came.

    Weights and tokens are powers of two and small, so that the floats are exact.
    """

    def __init__(self):
        super().__init__()
        self.counters = VirtualTokenCounters()
        self.all = {}
        self.queued = []
        self.last_left = None
        self.floors = [0.0]

    def floor(self):
        if self.queued:
            return min(self.all[tenant] for tenant in self.queued)
        return self.all[self.last_left] if self.last_left else Fraction(0)

    @rule(tenant=st.sampled_from(TENANTS))
    def enter(self, tenant):
        if tenant not in self.queued:
            self.all[tenant] = max(self.all.get(tenant, Fraction(0)), self.floor())
            self.queued.append(tenant)
            self.counters.enter(tenant)

    @precondition(lambda self: self.queued)
    @rule(tokens=st.integers(1, 64), weight=st.sampled_from([0.5, 1.0, 4.0]), leaves=st.booleans())
    def serve_the_next(self, tokens, weight, leaves):
        (tenant,) = self.counters.first(1)
        assert self.all[tenant] == self.floor()
        self.charge(tenant, tokens, weight, leaves)

    @precondition(lambda self: self.queued)
    @rule(data=st.data(), tokens=st.integers(1, 64), leaves=st.booleans())
    def serve_another(self, data, tokens, leaves):
        self.charge(data.draw(st.sampled_from(self.queued)), tokens, 1.0, leaves)

    def charge(self, tenant, tokens, weight, leaves):
        self.all[tenant] += Fraction(tokens) / Fraction(weight)
        self.counters.charge(tenant, tokens, weight)
        if leaves:
            self.leave(tenant)
        else:
            self.queued.remove(tenant)
            self.queued.append(tenant)  # of equal counters, the one that was set first is next

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def give_up(self, data):
        self.leave(data.draw(st.sampled_from(self.queued)))

    def leave(self, tenant):
        self.queued.remove(tenant)
        self.last_left = tenant
        self.counters.leave(tenant)

    @invariant()
    def same_order_and_counters(self):
        expected = sorted(self.queued, key=self.all.__getitem__)
        assert self.counters.first(len(TENANTS)) == expected
        assert [self.counters.turn(tenant)[0] for tenant in expected] == [self.all[t] for t in expected]

    @invariant()
    def the_floor_never_falls(self):
        assert self.counters.floor == self.floor()
        self.floors.append(self.counters.floor)
        assert self.floors[-1] >= self.floors[-2]

    @invariant()
    def only_who_is_queued_or_ahead_is_remembered(self):
        ahead = {tenant for tenant, counter in self.all.items() if counter > self.floor()}
        assert len(self.counters) == len(ahead.union(self.queued))


TestCountersMachine = CountersMachine.TestCase


@given(st.lists(st.integers(1, 64), min_size=1, max_size=300))
def test_memory_is_that_of_one_request_of_virtual_time(sizes):
    """A tenant comes for each request and never again, while one stays: those behind it are forgotten."""
    counters = VirtualTokenCounters()
    counters.enter("steady")
    for number, size in enumerate(sizes):
        counters.enter(f"passing{number}")
        for _ in range(2):
            (tenant,) = counters.first(1)
            counters.charge(tenant, 64 if tenant == "steady" else size, 1.0)
            if tenant != "steady":
                counters.leave(tenant)
        assert len(counters) <= 3
