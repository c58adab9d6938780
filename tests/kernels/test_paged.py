"""Attention over a paged cache against torch's own causal attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.paged_cases import Cache, expected, offsets

import hmi_kernels


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("head_size", [1, 5, 32])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 3], [17, 16, 33, 1], [70]])
def test_equals_torch(lengths, head_size, block_size, implementation):
    rows = torch.randn(sum(lengths), 3 * 2 * head_size).split(2 * head_size, dim=1)
    cache = Cache(lengths, 2, head_size, block_size)
    found = cache.attend(rows, lengths, lengths)
    torch.testing.assert_close(found, expected(*rows, lengths, 2), atol=1e-5, rtol=1e-5)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=4),
    st.sampled_from([2, 16]),
    st.randoms(use_true_random=False),
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tokens_that_come_in_pieces(backend, pieces, block_size, random):
    """Whatever comes with whatever: on the CPU equal bit for bit to all at once, alone."""
    heads, head_size = 2, 8
    lengths = [sum(of_one) for of_one in pieces]
    torch.manual_seed(sum(lengths))
    rows = [torch.randn(sum(lengths), heads * head_size) for _ in range(3)]
    starts = offsets(lengths).tolist()
    cache = Cache(lengths, heads, head_size, block_size)
    found = torch.empty_like(rows[0])
    waiting = {sequence: list(of_one) for sequence, of_one in enumerate(pieces)}
    done = dict.fromkeys(waiting, 0)
    with hmi_kernels.use_backend(backend):
        while waiting:
            chosen = random.sample(sorted(waiting), random.randint(1, len(waiting)))
            counts = [waiting[sequence].pop(0) for sequence in chosen]
            places = [
                torch.arange(starts[sequence] + done[sequence], starts[sequence] + done[sequence] + count)
                for sequence, count in zip(chosen, counts, strict=True)
            ]
            for sequence, count in zip(chosen, counts, strict=True):
                done[sequence] += count
            index = torch.cat(places)
            found[index] = cache.attend(
                [part[index] for part in rows], counts, [done[sequence] for sequence in chosen], chosen
            )
            waiting = {sequence: left for sequence, left in waiting.items() if left}
        alone = [
            Cache([length], heads, head_size, block_size).attend(
                [part[start : start + length] for part in rows], [length], [length]
            )
            for start, length in zip(starts, lengths, strict=False)
        ]
    torch.testing.assert_close(found, expected(*rows, lengths, heads), atol=1e-5, rtol=1e-5)
    if backend == "cpu":
        assert torch.equal(found, torch.cat(alone))


def test_no_sequences_and_sequences_without_new_tokens(implementation):
    cache = Cache([5, 2], 2, 4, 4)
    rows = [torch.randn(5, 8) for _ in range(3)]
    cache.attend([*(part[:5] for part in rows)], [5], [5], [0])
    found = cache.attend([part[:2] for part in rows], [0, 2], [5, 2])
    torch.testing.assert_close(found, expected(*(part[:2] for part in rows), [2], 2), atol=1e-5, rtol=1e-5)
    empty = [part[:0] for part in rows]
    assert cache.attend(empty, [], [], []).shape == (0, 8)


def test_another_sequences_nan_stays_there(implementation):
    lengths = [9, 9]
    rows = [torch.randn(18, 8) for _ in range(3)]
    clean = Cache(lengths, 2, 4, 4).attend(rows, lengths, lengths)
    for part in rows:
        part[:9] = torch.nan
    dirty = Cache(lengths, 2, 4, 4).attend(rows, lengths, lengths)
    assert dirty[:9].isnan().all()
    assert torch.equal(dirty[9:], clean[9:])


@pytest.mark.parametrize(
    ("counts", "lengths", "block"),
    [([3], [2], 0), ([3], [9], 0), ([3], [3], 4), ([3], [3], -1), ([2], [3], 0), ([-1], [3], 0)],
)
def test_refuses_what_does_not_fit(counts, lengths, block, implementation):
    keys, values = torch.zeros(4, 2, 4, 4), torch.zeros(4, 2, 4, 4)
    rows = [torch.ones(3, 8) for _ in range(3)]
    tables = torch.tensor([[block, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"sequence 0|query_offsets"):
        hmi_kernels.paged_attention(*rows, keys, values, tables, offsets(counts), torch.tensor(lengths))
    assert not keys.any() and not values.any()


def test_refuses_shapes(implementation):
    rows = [torch.ones(3, 8) for _ in range(3)]
    bounds = torch.tensor([0, 3]), torch.tensor([3])
    tables = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="value_cache"):
        hmi_kernels.paged_attention(*rows, torch.zeros(2, 2, 4, 3), torch.zeros(2, 2, 4, 3), tables, *bounds)
    with pytest.raises(ValueError, match="key_cache"):
        hmi_kernels.paged_attention(*rows, torch.zeros(2, 2, 2, 3), torch.zeros(2, 2, 3, 2), tables, *bounds)
    with pytest.raises(TypeError, match="block_tables"):
        hmi_kernels.paged_attention(
            *rows, torch.zeros(2, 2, 4, 3), torch.zeros(2, 2, 3, 4), tables.long(), *bounds
        )
