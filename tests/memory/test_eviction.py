"""Who leaves: by decayed frequency per byte, and never who is waited for while another can go."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hmi_engine import lazy_heap
from hmi_engine.memory import eviction
from hmi_engine.memory.eviction import DemandQueue, FrequencyPerByte

KEYS = st.integers(0, 7)
SIZES = {key: 1000 * 4**key for key in range(8)}


class FrequencyMachine(RuleBasedStateMachine):
    """Against the definition: every use is remembered with its time, and weighs half after a half-life."""

    def __init__(self):
        super().__init__()
        self.policy = FrequencyPerByte()
        self.now = 0.0
        self.uses = {}
        self.offered = set()

    def worth(self, key):
        frequency = sum(2.0 ** (time - self.now) for time in self.uses[key])
        return frequency * (eviction.FIXED_COST_BYTES + SIZES[key]) / SIZES[key]

    @rule(key=KEYS, times=st.integers(1, 5))
    def use(self, key, times):
        for _ in range(times):
            self.policy.used(key, SIZES[key])
            self.uses.setdefault(key, []).append(self.now)

    @rule(key=KEYS)
    def offer(self, key):
        if key in self.uses:
            self.policy.offer(key)
            self.offered.add(key)

    @rule(key=KEYS)
    def withdraw(self, key):
        self.policy.withdraw(key)
        self.offered.discard(key)

    @rule(key=KEYS)
    def forget(self, key):
        self.policy.forget(key)
        self.offered.discard(key)
        self.uses.pop(key, None)

    @rule()
    def evict(self):
        if self.offered:
            self.now += 1 / (eviction.HALF_LIFE_TURNOVERS * len(self.offered))
        key = self.policy.evict()
        if not self.offered:
            assert key is None
            return
        assert key in self.offered
        assert self.worth(key) <= min(map(self.worth, self.offered)) * (1 + 1e-9)
        self.offered.discard(key)

    @invariant()
    def counts_what_is_offered(self):
        assert len(self.policy) == len(self.offered)


FrequencyMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestFrequencyPerByte = FrequencyMachine.TestCase


def test_of_equals_the_large_one_goes_and_of_equal_ones_the_rare_one():
    policy = FrequencyPerByte()
    for key, size, uses in (("small", 10_000, 1), ("large", 1_000_000, 1), ("frequent", 1_000_000, 50)):
        for _ in range(uses):
            policy.used(key, size)
        policy.offer(key)
    assert [policy.evict() for _ in range(4)] == ["large", "small", "frequent", None]


def test_what_was_frequent_is_forgotten_when_memory_has_turned_over():
    policy = FrequencyPerByte()
    for _ in range(20):
        policy.used("old", 1000)
    policy.offer("old")
    gone = []
    for number in range(40):  # newcomers, each of which pushes another out
        policy.used(number, 1000)
        policy.offer(number)
        gone.append(policy.evict())
    assert gone[:5] == list(range(5)), "at first it is worth more than newcomers"
    assert "old" in gone, "when memory has turned over some times it is not"


def test_the_table_of_frequencies_is_bounded_and_keeps_the_frequent():
    policy = FrequencyPerByte(max_known=100)
    for key in range(10):
        for _ in range(5):
            policy.used(("frequent", key), 1000)
    policy.used("in memory", 1000)
    policy.offer("in memory")
    for number in range(10_000):
        policy.used(number, 1000)
    assert len(policy._frequencies) <= 100 and len(policy._worth) <= 100
    assert all(("frequent", key) in policy._frequencies for key in range(10))
    assert policy.evict() == "in memory"
    assert len(policy._heap._heap) <= lazy_heap._MIN_HEAP + 1


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=300))
def test_heaps_do_not_grow_with_time(steps):
    policy = FrequencyPerByte()
    for put, key in steps * 3:
        policy.used(key, 1000)
        (policy.offer if put else policy.withdraw)(key)
    assert len(policy._heap._heap) <= lazy_heap._MIN_HEAP + 1


class DemandMachine(RuleBasedStateMachine):
    """Against a plain list of who waits."""

    def __init__(self):
        super().__init__()
        self.queue = DemandQueue(FrequencyPerByte())
        self.waiting = []  # (number of the expectation, key) in the order of arrival
        self.tickets = {}
        self.offered = set()
        self.numbers = itertools.count()

    def needed(self, key):
        return any(key == waiting for _, waiting in self.waiting)

    @rule(keys=st.lists(KEYS, max_size=6))
    def expect(self, keys):
        number = next(self.numbers)
        self.tickets[number] = self.queue.expect(keys)
        self.waiting += [(number, key) for key in keys]

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def release(self, data):
        number = data.draw(st.sampled_from(sorted(self.tickets)))
        self.queue.release(self.tickets.pop(number))
        self.waiting = [entry for entry in self.waiting if entry[0] != number]

    @rule(key=KEYS)
    def offer(self, key):
        self.queue.used(key, SIZES[key])
        self.queue.offer(key)
        self.offered.add(key)

    @rule(key=KEYS)
    def withdraw(self, key):
        self.queue.withdraw(key)
        self.offered.discard(key)

    @rule(spare=st.booleans())
    def evict(self, spare):
        key = self.queue.evict(spare_needed=spare)
        free = {each for each in self.offered if not self.needed(each)}
        if free:
            assert key in free
        elif self.offered and not spare:
            order = [waiting for _, waiting in self.waiting]
            assert order.index(key) == max(map(order.index, self.offered))
        else:
            assert key is None
        self.offered.discard(key)

    @invariant()
    def knows_who_waits(self):
        for key in range(8):
            assert self.queue.is_needed(key) == self.needed(key)

    def teardown(self):
        for tickets in self.tickets.values():
            self.queue.release(tickets)
        assert not self.queue._waiting and not self.queue._fulfilled, "nothing is left of requests that ran"


DemandMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestDemandQueue = DemandMachine.TestCase


@pytest.mark.parametrize("num_bytes", [0, 1, 1 << 40])
def test_sizes_at_the_ends(num_bytes):
    policy = FrequencyPerByte()
    policy.used("key", num_bytes)
    policy.offer("key")
    assert policy.evict() == "key"
