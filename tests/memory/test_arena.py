"""The arena never hands out memory twice, keeps what lies in it, and grows together again."""

import itertools

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hmi_engine.memory.arena import AdapterArena

GRANULES = 64


class ArenaMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.arena = AdapterArena(GRANULES * 4096)
        self.held = {}
        self.values = itertools.count(1.0)

    @rule(size=st.integers(0, 20_000))
    def allocate(self, size):
        offset = self.arena.allocate(size)
        if offset is None:
            assert size > 1024 or self.arena.free_bytes == 0
        else:
            assert offset + size <= self.arena.memory.numel() and offset not in self.held
            self.held[offset] = (size, next(self.values))
            self.arena.memory[offset : offset + size] = self.held[offset][1]
            self.arena.clear_tail(offset, size)

    @rule()
    def fill(self):
        while self.arena.free_bytes:
            self.allocate(1)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        offset = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[offset]
        self.arena.release(offset)

    @rule(share=st.floats(0.5, 1.1), data=st.data())
    def slide(self, share, data):
        size = max(1, int(share * self.arena.free_bytes / 4))
        before = {value: offset for offset, (_, value) in self.held.items()}
        fixed = data.draw(
            st.sets(st.sampled_from(sorted(self.held)), max_size=3) if self.held else st.just(set())
        )
        moved = self.arena.slide(size, fixed)
        if moved is None:
            # With nothing in the way whatever is free can be brought together.
            assert fixed or self.arena.free_bytes < self.arena.allocated_bytes(size)
            return
        assert not fixed & moved.keys()
        self.held = {moved.get(offset, offset): held for offset, held in self.held.items()}
        assert {value for _, value in self.held.values()} == before.keys()
        offset = self.arena.allocate(size)
        assert offset is not None, "there is a free range as long as was asked for"
        self.arena.release(offset)

    @invariant()
    def ranges_are_disjoint_counted_and_keep_their_contents(self):
        ends = sorted((offset, offset + max(1024, size)) for offset, (size, _) in self.held.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
        sizes = [AdapterArena.allocated_bytes(size) for size, _ in self.held.values()]
        assert self.arena.used_bytes == sum(sizes)
        assert self.arena.used_bytes + self.arena.free_bytes == self.arena.capacity_bytes
        for (offset, (size, value)), taken in zip(self.held.items(), sizes, strict=True):
            lies = self.arena.memory[offset : offset + taken // 4]
            assert (lies[:size] == value).all() and not lies[size:].any()

    def teardown(self):
        for offset in self.held:
            self.arena.release(offset)
        assert self.arena.allocate(GRANULES * 1024) == 0, "free neighbours grow together"


ArenaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestArena = ArenaMachine.TestCase


def filled(lengths, free):
    """An arena of ranges of so many granules, those numbered in ``free`` given back; the others' offsets.

    Each range holds its number.
    """
    arena = AdapterArena(sum(lengths) * 4096)
    offsets = [arena.allocate(length * 1024) for length in lengths]
    for number, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        arena.memory[offset : offset + length * 1024] = number
    for number in free:
        arena.release(offsets[number])
    return arena, offsets


def test_a_slide_moves_the_least():
    # Holes of 2: over 9 and over 3 granules there are 4 together.
    arena, offsets = filled([2, 9, 2, 3, 2, 8], free=[0, 2, 4])
    assert arena.slide(4 * 1024) == {offsets[3]: offsets[2]}
    assert (arena.memory[offsets[2] :][: 3 * 1024] == 3).all(), "longer than the hole: the two overlap"
    assert (arena.memory[offsets[1] :][: 9 * 1024] == 1).all() and (arena.memory[offsets[5] :] == 5).all()
    assert arena.allocate(4 * 1024) == offsets[2] + 3 * 1024
    # And where the short one may not move, the long one does.
    arena, offsets = filled([2, 9, 2, 3, 2, 8], free=[0, 2, 4])
    assert arena.slide(4 * 1024, fixed=[offsets[3]]) == {offsets[1]: 0}
    assert arena.slide(6 * 1024, fixed=[offsets[3]]) is None
    assert arena.slide(7 * 1024) is None, "there is not so much"


def test_an_arena_takes_no_more_than_its_budget():
    for budget, size in ((0, 0), (4095, 0), (4096, 4096), (10_000, 8192)):
        arena = AdapterArena(budget)
        assert arena.capacity_bytes == arena.memory.nbytes == size
    assert AdapterArena(4095).allocate(1) is None
    assert AdapterArena(4096).slide(2000) is None


def test_the_best_fit_is_taken():
    arena, offsets = filled([5, 1, 3, 1, 4, 1], free=[0, 2, 4])
    assert arena.allocate(3 * 1024) == offsets[2]
    assert arena.allocate(4 * 1024) == offsets[4]
    assert arena.allocate(1) == offsets[0]


def test_closed():
    arena = AdapterArena(8192)
    arena.allocate(1)
    arena.close()
    assert arena.capacity_bytes == arena.used_bytes == 0 and arena.allocate(1) is None
    assert isinstance(arena.memory, torch.Tensor)
