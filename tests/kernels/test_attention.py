"""Packed attention against torch's own attention, one sequence at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import hmi_kernels
from hmi_kernels import attention
from hmi_kernels.attention import _Arguments, attend_jagged, attend_packed

BACKENDS = ("cpu", "reference")


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def expected(query, key, value, query_lengths, key_lengths, num_heads):
    parts = []
    for q, k, v in zip(
        query.split(query_lengths), key.split(key_lengths), value.split(key_lengths), strict=True
    ):
        heads = [part.double().unflatten(1, (num_heads, -1)).transpose(0, 1) for part in (q, k, v)]
        parts.append(functional.scaled_dot_product_attention(*heads).transpose(0, 1).flatten(1))
    return torch.cat(parts).float()


@pytest.mark.parametrize("head_size", [1, 3, 8, 32, 33, 64])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 3], [17, 16, 15, 1], [64, 65, 130], [200]])
def test_equals_torch(head_size, lengths, implementation):
    wide = torch.randn(sum(lengths), 3 * 2 * head_size)
    query, key, value = wide.split(2 * head_size, dim=1)  # column slices, as the engine has them
    found = hmi_kernels.packed_attention(query, key, value, offsets(lengths), offsets(lengths), num_heads=2)
    torch.testing.assert_close(found, expected(query, key, value, lengths, lengths, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_16_bits(dtype):
    """The reference, which alone takes them on the CPU: rounded once, at the end."""
    lengths = [17, 16, 1]
    query, key, value = torch.randn(sum(lengths), 48).to(dtype).split(16, dim=1)
    found = hmi_kernels.packed_attention(query, key, value, offsets(lengths), offsets(lengths), num_heads=2)
    assert found.dtype is dtype
    torch.testing.assert_close(found, expected(query, key, value, lengths, lengths, 2).to(dtype))
    with pytest.raises(TypeError, match="key must be"):
        hmi_kernels.packed_attention(
            query, key.float(), value, offsets(lengths), offsets(lengths), num_heads=2
        )


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=6), st.integers(1, 3))
def test_fewer_queries_than_keys(lengths, num_heads):
    query_lengths, key_lengths = [q for q, _ in lengths], [k for _, k in lengths]
    generator = torch.Generator().manual_seed(sum(key_lengths))
    query = torch.randn(sum(query_lengths), 4 * num_heads, generator=generator)
    key, value = (torch.randn(sum(key_lengths), 4 * num_heads, generator=generator) for _ in range(2))
    found = hmi_kernels.packed_attention(
        query, key, value, offsets(query_lengths), offsets(key_lengths), num_heads=num_heads
    )
    torch.testing.assert_close(
        found, expected(query, key, value, query_lengths, key_lengths, num_heads), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("max_length", [None, 9, 100])
@pytest.mark.parametrize("query_lengths", [[5, 1, 9, 3], [1, 1, 9, 2]])
def test_the_way_of_gpus_equals_torch(query_lengths, max_length):
    """On the CPU torch takes another kernel for it, but the layout and the bounds are the same."""
    key_lengths = [5, 1, 9, 3]
    query = torch.randn(sum(query_lengths), 12)
    key, value = torch.randn(18, 24).split(12, dim=1)
    bounds = offsets(query_lengths), offsets(key_lengths)
    arguments = _Arguments(query, key, value, *bounds, 3, max_length)
    found = attend_jagged(arguments)
    assert torch.equal(attend_packed(arguments), found), "float32 has no other kernel"
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected(query, key, value, query_lengths, key_lengths, 3))
    nothing = attend_jagged(_Arguments(query[:0], key[:0], value[:0], offsets([]), offsets([]), 3))
    assert nothing.shape == (0, 12)


@pytest.mark.parametrize(
    ("dtype", "first", "stride", "is_copied"),
    [
        (torch.float16, 0, 72, False),
        (torch.float16, 8, 72, False),
        (torch.float16, 4, 72, True),
        (torch.bfloat16, 0, 68, True),
        (torch.float32, 4, 68, False),
    ],
)
def test_gpus_are_given_rows_that_they_can_read(dtype, first, stride, is_copied, monkeypatch):
    """FlashAttention reads 16 bytes at a time, wherever the rows begin."""
    pytest.importorskip("torch.nn.attention.varlen")
    rows = torch.randn(20, stride).to(dtype)[:, first : first + 64]
    given = []

    def flash(query, key, value, *bounds):
        given.extend([query, key, value])
        return query.clone()

    monkeypatch.setattr(attention, "_has_flash", lambda device: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    attend_packed(_Arguments(rows, rows, rows, offsets([20]), offsets([20]), 4, 20))
    if dtype is torch.float32:
        assert not given
        assert attention._aligned(rows) is rows
        return
    for operand in given:
        assert (operand.data_ptr() != rows.data_ptr()) == is_copied
        assert operand.data_ptr() % 16 == operand.stride(0) % 8 == 0
        assert torch.equal(operand.flatten(1), rows)


def test_neighbours_and_threads_change_no_bit(simd_level):
    torch.manual_seed(1)
    lengths = [30, 1, 77, 64, 5, 128]
    query, key, value = (torch.randn(sum(lengths), 64) for _ in range(3))

    def run(rows: slice, own: list[int]) -> torch.Tensor:
        return hmi_kernels.packed_attention(
            query[rows], key[rows], value[rows], offsets(own), offsets(own), num_heads=4
        )

    together = run(slice(None), lengths)
    ends = offsets(lengths).tolist()
    for number, length in enumerate(lengths):
        alone = run(slice(ends[number], ends[number + 1]), [length])
        assert torch.equal(alone, together[ends[number] : ends[number + 1]])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(run(slice(None), lengths), together)
    finally:
        torch.set_num_threads(threads)


def test_nan_stays_in_its_sequence(simd_level):
    lengths = [20, 20, 20]
    query, key, value = (torch.randn(60, 8) for _ in range(3))
    before = hmi_kernels.packed_attention(query, key, value, offsets(lengths), offsets(lengths), num_heads=2)
    key[25, 0] = float("nan")
    after = hmi_kernels.packed_attention(query, key, value, offsets(lengths), offsets(lengths), num_heads=2)
    assert torch.equal(before[:20], after[:20]) and torch.equal(before[40:], after[40:])
    assert after[20:40, :4].isnan().all(), "the head whose key is damaged says so"
    assert torch.equal(before[20:40, 4:], after[20:40, 4:])


def test_large_scores_do_not_overflow(simd_level):
    query = torch.full((40, 8), 1e4)
    key = torch.cat([torch.full((1, 8), 1e4), torch.zeros(39, 8)])
    value = torch.arange(40.0)[:, None].expand(40, 8).contiguous()
    found = hmi_kernels.packed_attention(query, key, value, offsets([40]), offsets([40]), num_heads=1)
    assert found.abs().max() < 1e-30, "all weight is on the first key, whose value is 0"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_offsets": torch.tensor([0, 3])}, "offsets"),
        ({"query_offsets": torch.tensor([1, 4])}, "0"),
        (
            {"query_offsets": torch.tensor([0, 5, 4]), "key_offsets": torch.tensor([0, 2, 4])},
            "offsets|smaller",
        ),
        ({"query_offsets": torch.tensor([0, 2, 4]), "key_offsets": torch.tensor([0, 0, 4])}, "no keys"),
        ({"query_offsets": torch.tensor([], dtype=torch.int64)}, "empty"),
        ({"key_offsets": torch.tensor([0, 2, 4])}, "key_offsets"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"key": torch.randn(4, 6)}, "key"),
        ({"value": torch.randn(3, 8)}, "value"),
        ({"query": torch.randn(8, 4).t()}, "query"),
    ],
)
def test_bad_arguments(backend, change, message):
    arguments = {
        "query": torch.randn(4, 8),
        "key": torch.randn(4, 8),
        "value": torch.randn(4, 8),
        "query_offsets": torch.tensor([0, 4]),
        "key_offsets": torch.tensor([0, 4]),
        "num_heads": 2,
    } | change
    with hmi_kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        hmi_kernels.packed_attention(**arguments)
