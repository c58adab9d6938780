"""Blocks of the cache against a model with lists; keys are equal just where contents are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hmi_engine.generation.block_pool import BlockPool, PrefixKeys

KEYS = [bytes([number]) for number in range(6)]


class BlockPoolMachine(RuleBasedStateMachine):
    """Holders are lists of blocks, as sequences have them."""

    @initialize(num_blocks=st.integers(1, 8))
    def begin(self, num_blocks):
        self.pool = BlockPool(num_blocks)
        self.holders = []
        self.kept = {}  # key -> block
        self.unused_since = []  # kept blocks that nobody holds, the one unused for longest first

    @property
    def held(self):
        return {block for blocks in self.holders for block in blocks}

    @property
    def free(self):
        return set(range(self.pool.num_blocks)) - self.held - set(self.unused_since)

    @rule(count=st.integers(0, 5))
    def take(self, count):
        held, free = self.held, self.free
        taken = self.pool.take(count)
        if count > len(free) + len(self.unused_since):
            assert taken is None
            return
        assert len(taken) == len(set(taken)) == count
        assert not held.intersection(taken)
        forgotten = self.unused_since[: max(0, count - len(free))]
        assert set(taken) - free == set(forgotten), "first what is free, then what is unused for longest"
        self.unused_since = self.unused_since[len(forgotten) :]
        self.kept = {key: block for key, block in self.kept.items() if block not in forgotten}
        self.holders.append(taken)

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True))
    def find(self, keys):
        expected = []
        for key in keys:
            if key not in self.kept:
                break
            expected.append(self.kept[key])
        assert self.pool.find(keys) == expected
        self.unused_since = [block for block in self.unused_since if block not in expected]
        self.holders.append(expected)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def keep(self, data, key):
        block = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.keep(block, key)
        if key not in self.kept and block not in self.kept.values():
            self.kept[key] = block

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data):
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(blocks)
        for block in reversed(blocks):
            if block not in self.held and block in self.kept.values():
                self.unused_since.append(block)

    @rule(data=st.data())
    def release_what_nobody_holds(self, data):
        unheld = sorted(set(range(self.pool.num_blocks)) - self.held)
        if unheld:
            block = data.draw(st.sampled_from(unheld))
            with pytest.raises(ValueError, match=f"block {block} is given back, but nobody holds it"):
                self.pool.release([block])

    @invariant()
    def counts_add_up(self):
        assert self.pool.num_held == len(self.held)
        assert self.pool.num_held + self.pool.num_unused == self.pool.num_blocks

    def teardown(self):
        if hasattr(self, "pool"):
            for blocks in self.holders:
                self.pool.release(blocks)
            assert self.pool.num_held == 0
            assert sorted(self.pool.take(self.pool.num_blocks)) == list(range(self.pool.num_blocks))


BlockPoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestBlockPool = BlockPoolMachine.TestCase


def test_a_sequence_loses_its_last_block_first():
    pool = BlockPool(3)
    blocks = pool.take(3)
    for block, key in zip(blocks, KEYS, strict=False):
        pool.keep(block, key)
    pool.release(blocks)
    assert pool.take(1) == [blocks[2]]
    assert pool.find(KEYS) == blocks[:2]


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_a_pool_has_blocks(num_blocks):
    with pytest.raises(ValueError, match=f"at least one block, not {num_blocks}"):
        BlockPool(num_blocks)


NAMES = st.sampled_from([b"", b"a", b"b", b"ab", b"aab", b"a\x00"])
CONTENTS = st.tuples(NAMES, NAMES, st.lists(st.sampled_from([0, 1, 2**31 - 1]), max_size=7))


@given(CONTENTS, CONTENTS, st.booleans(), st.integers(1, 3))
def test_keys_are_equal_where_contents_are(one, other, is_alike, block_size):
    if is_alike:
        other = (*one[:2], other[2])
    lists = [PrefixKeys(weights, salt, block_size).extend(tokens) for weights, salt, tokens in (one, other)]
    assert [len(keys) for keys in lists] == [len(one[2]) // block_size, len(other[2]) // block_size]
    for i, key in enumerate(lists[0]):
        for j, other_key in enumerate(lists[1]):
            ends = (i + 1) * block_size, (j + 1) * block_size
            contents = [(*each[:2], each[2][:end]) for each, end in zip((one, other), ends, strict=True)]
            assert (key == other_key) == (contents[0] == contents[1])


@given(CONTENTS, st.integers(1, 3), st.lists(st.integers(0, 7)))
def test_keys_grow_with_their_tokens(content, block_size, cuts):
    weights, salt, tokens = content
    grown = PrefixKeys(weights, salt, block_size)
    for cut in sorted(cuts):
        assert len(grown.extend(tokens[:cut])) == len(tokens[:cut]) // block_size
    assert grown.extend(tokens) == PrefixKeys(weights, salt, block_size).extend(tokens)
