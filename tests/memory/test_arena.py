"""The arena never hands out memory twice, and grows together again."""

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hmi_engine.memory.arena import AdapterArena


class ArenaMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.arena = AdapterArena(64 * 4096)
        self.held = {}

    @rule(size=st.integers(1, 20_000))
    def allocate(self, size):
        offset = self.arena.allocate(size)
        if offset is None:
            assert size > 1024 or self.arena.used_bytes == self.arena.capacity_bytes
        else:
            assert offset + size <= self.arena.memory.numel()
            self.held[offset] = size

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        offset = data.draw(st.sampled_from(sorted(self.held)))
        self.arena.release(offset, self.held.pop(offset))

    @invariant()
    def ranges_are_disjoint_and_counted(self):
        ranges = sorted((offset, offset + size) for offset, size in self.held.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
        assert self.arena.used_bytes == sum(map(AdapterArena.allocated_bytes, self.held.values()))

    def teardown(self):
        for offset, size in self.held.items():
            self.arena.release(offset, size)
        assert self.arena.allocate(self.arena.memory.numel()) == 0, "free neighbours grow together"


ArenaMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestArena = ArenaMachine.TestCase
