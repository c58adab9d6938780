"""The PLOT index against a dict."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import hmi_kernels
from hmi_kernels import reference

KEYS = st.lists(st.integers(1, 2**63 - 1), unique=True, max_size=40)


def int64(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def contents(index: torch.Tensor) -> dict[int, int]:
    return {key: row for key, row in index.tolist() if key != 0}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@settings(max_examples=50, deadline=None)
@given(keys=KEYS, others=KEYS)
def test_finds_what_was_built(backend: str, keys: list[int], others: list[int]) -> None:
    with hmi_kernels.use_backend(backend):
        index = hmi_kernels.plot_index_build(int64(keys))
        expected = {key: row for row, key in enumerate(keys)}
        assert contents(index) == expected
        assert index.shape[0] >= 2 * len(keys)
        asked = [*keys, *others, 0, -7]
        assert hmi_kernels.plot_index_find(index, int64(asked)).tolist() == [
            expected.get(k, -1) for k in asked
        ]


@given(keys=KEYS)
@settings(max_examples=50, deadline=None)
def test_backends_write_the_same_file(keys: list[int]) -> None:
    assert torch.equal(hmi_kernels.plot_index_build(int64(keys)), reference.plot_index_build(int64(keys)))


@pytest.mark.parametrize("num_keys", [0, 1, 2, 3, 4, 5, 1000])
def test_keys_lie_where_the_format_says(num_keys: int) -> None:
    keys = torch.randint(1, 2**62, (num_keys,)).unique()
    index = hmi_kernels.plot_index_build(keys)
    capacity = index.shape[0]
    assert capacity == max(2, 2 ** (2 * len(keys) - 1).bit_length()) if len(keys) else capacity == 2
    slots = index[:, 0].tolist()
    for key in keys.tolist():
        place = reference.mix_key(key) // (2**64 // capacity)
        while slots[place] != key:
            assert slots[place] != 0
            place = (place + 1) % capacity


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@settings(max_examples=50, deadline=None)
@given(first=KEYS, second=st.lists(st.integers(1, 30), max_size=20))
def test_insert_updates_a_dict(backend: str, first: list[int], second: list[int]) -> None:
    with hmi_kernels.use_backend(backend):
        index = torch.zeros(128, 2, dtype=torch.int64)
        hmi_kernels.plot_index_insert(index, int64(first), torch.arange(len(first)))
        hmi_kernels.plot_index_insert(index, int64(second), torch.arange(100, 100 + len(second)))
    expected = {key: row for row, key in enumerate(first)}
    expected.update({key: 100 + i for i, key in enumerate(second)})
    assert contents(index) == expected


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_insert_fills_half_and_no_more(backend: str) -> None:
    with hmi_kernels.use_backend(backend):
        index = hmi_kernels.plot_index_build(int64([1, 2, 3]))
        hmi_kernels.plot_index_insert(index, int64([4, 4, 2]), int64([7, 8, 9]))
        before = index.clone()
        with pytest.raises(ValueError, match="cannot take 1 more"):
            hmi_kernels.plot_index_insert(index, int64([1, 5]), int64([0, 0]))
        assert torch.equal(index, before)
    assert contents(index) == {1: 0, 2: 9, 3: 2, 4: 8}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("keys", [[3, 0], [-1], [5, 6, 5]])
def test_build_refuses_bad_keys(backend: str, keys: list[int]) -> None:
    with hmi_kernels.use_backend(backend), pytest.raises(ValueError, match="keys"):
        hmi_kernels.plot_index_build(int64(keys))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("keys", "rows"), [([0], [1]), ([4], [-1]), ([4], [1, 2])])
def test_insert_refuses_bad_pairs(backend: str, keys: list[int], rows: list[int]) -> None:
    index = torch.zeros(8, 2, dtype=torch.int64)
    with hmi_kernels.use_backend(backend), pytest.raises(ValueError, match=r"keys|rows"):
        hmi_kernels.plot_index_insert(index, int64(keys), int64(rows))
    assert not index.any()


@pytest.mark.parametrize("shape", [(3, 2), (1, 2), (0, 2), (4, 3), (8,)])
def test_an_index_has_a_power_of_two_of_slots(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="index"):
        hmi_kernels.plot_index_find(torch.zeros(shape, dtype=torch.int64), int64([1]))


def test_a_search_ends_in_a_damaged_index_without_empty_slots() -> None:
    damaged = torch.full((8, 2), 99, dtype=torch.int64)
    assert hmi_kernels.plot_index_find(damaged, int64([1, 99])).tolist() == [-1, 99]


def test_many_keys_on_many_threads(threads_mode: str) -> None:
    keys = hmi_kernels.ngram_keys(torch.cartesian_prod(torch.arange(300), torch.arange(300)).int())
    index = hmi_kernels.plot_index_build(keys)
    order = torch.randperm(len(keys))
    assert torch.equal(hmi_kernels.plot_index_find(index, keys[order].contiguous()), order)
