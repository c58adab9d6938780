"""n-gram keys and counts, against tuples and collections.Counter."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import hmi_kernels
from hmi_kernels.native import native
from hmi_kernels.ngrams import _TorchCounter

MAX_TOKEN_ID = 2**21 - 2
Sequences = list[list[int]]
SEQUENCES = st.lists(st.lists(st.sampled_from([0, 1, 2, 3, MAX_TOKEN_ID]), max_size=9), max_size=6)


def pack(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = [0, *map(len, sequences)]
    ids = [token for sequence in sequences for token in sequence]
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(lengths).cumsum(0)


def count_tuples(sequences: Sequences, order: int) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(sequence[i : i + order]) for sequence in sequences for i in range(len(sequence) - order + 1)
    )


def as_tuples(keys: torch.Tensor, counts: torch.Tensor, order: int) -> dict[tuple[int, ...], int]:
    tokens = hmi_kernels.ngram_tokens(keys)
    assert (tokens[:, order:] == -1).all()
    return {tuple(t[:order]): n for t, n in zip(tokens.tolist(), counts.tolist(), strict=True)}


@given(st.lists(st.lists(st.integers(-1, MAX_TOKEN_ID), min_size=3, max_size=3), min_size=1))
def test_keys_are_the_formula_and_can_be_undone(tokens: list[list[int]]) -> None:
    tokens = [row for row in tokens if row != [-1, -1, -1]]
    packed = torch.tensor(tokens, dtype=torch.int32).reshape(-1, 3)
    keys = hmi_kernels.ngram_keys(packed)
    assert keys.tolist() == [(a + 1) << 42 | (b + 1) << 21 | (c + 1) for a, b, c in tokens]
    assert (keys > 0).all()
    assert torch.equal(hmi_kernels.ngram_tokens(keys), packed)


def test_fewer_slots_leave_the_last_ones_absent() -> None:
    keys = hmi_kernels.ngram_keys(torch.tensor([[7, 5]], dtype=torch.int32))
    assert hmi_kernels.ngram_tokens(keys).tolist() == [[7, 5, -1]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[-1, -1, -1]], "without any token"),
        ([[-2, 1, 1]], "-2"),
        ([[1, MAX_TOKEN_ID + 1, 1]], str(MAX_TOKEN_ID + 1)),
        ([[1, 1, 1, 1]], "1 to 3 slots"),
    ],
)
def test_keys_refuse(tokens: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hmi_kernels.ngram_keys(torch.tensor(tokens, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("order", [1, 2, 3])
@settings(max_examples=40, deadline=None)
@given(sequences=SEQUENCES)
def test_counts_equal_counter(backend: str, order: int, sequences: Sequences) -> None:
    with hmi_kernels.use_backend(backend):
        keys, counts = hmi_kernels.count_ngrams(*pack(sequences), order=order)
    assert (keys.diff() > 0).all()
    assert as_tuples(keys, counts, order) == count_tuples(sequences, order)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_large_batches_are_counted_in_parallel(order: int, num_threads: int) -> None:
    ids = torch.randint(0, 60, (30_000,), dtype=torch.int32)
    offsets = torch.cat(
        [torch.tensor([0]), torch.randint(0, 30_001, (99,)).sort().values, torch.tensor([30_000])]
    )
    sequences = [ids[a:b].tolist() for a, b in pairwise(offsets)]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    keys, counts = hmi_kernels.count_ngrams(ids, offsets, order=order)
    torch.set_num_threads(before)
    assert (keys.diff() > 0).all()
    assert as_tuples(keys, counts, order) == count_tuples(sequences, order)


@pytest.mark.parametrize("make", [native.NgramCounter, _TorchCounter])
@settings(max_examples=30, deadline=None)
@given(batches=st.lists(SEQUENCES, max_size=4), min_count=st.integers(1, 3))
def test_counter_adds_batches_up(make: type, batches: list[Sequences], min_count: int) -> None:
    counter = hmi_kernels.NgramCounter(2)
    counter._counter = make(2)
    expected: Counter[tuple[int, ...]] = Counter()
    for sequences in batches:
        counter.add(*pack(sequences))
        expected += count_tuples(sequences, 2)
    assert len(counter) == len(expected)
    assert counter.total == expected.total()
    frequent = {ngram: n for ngram, n in expected.items() if n >= min_count}
    assert as_tuples(*counter.items(min_count), 2) == frequent


@pytest.mark.parametrize("make", [native.NgramCounter, _TorchCounter])
@settings(max_examples=30, deadline=None)
@given(rounds=st.lists(SEQUENCES, max_size=4))
def test_drained_pieces_hold_all_once(make: type, rounds: list[Sequences]) -> None:
    counter = hmi_kernels.NgramCounter(2)
    counter._counter = make(2)
    total = 0
    for sequences in rounds:
        expected = count_tuples(sequences, 2)
        total += expected.total()
        counter.add(*pack(sequences))
        found: Counter[tuple[int, ...]] = Counter()
        for keys, counts in counter.drain():
            assert (keys.diff() > 0).all()
            piece = as_tuples(keys, counts, 2)
            assert not piece.keys() & found.keys()
            found.update(piece)
        assert found == expected
        assert (len(counter), counter.total) == (0, total)


def test_draining_gives_the_memory_back() -> None:
    counter = hmi_kernels.NgramCounter(1)
    empty = counter.memory_bytes
    counter.add(*pack([list(range(5000))]))
    sizes = [counter.memory_bytes for _ in counter.drain()]
    assert sizes == sorted(sizes, reverse=True)
    assert counter.memory_bytes == empty


@pytest.mark.parametrize("shard", [-1, 16])
def test_a_shard_that_is_none_is_refused(shard: int) -> None:
    with pytest.raises(ValueError, match=r"shard must lie in 0\.\.15"):
        native.NgramCounter(2).take_shard(shard)


def test_counter_tells_its_memory_and_forgets_a_bad_batch() -> None:
    counter = hmi_kernels.NgramCounter(1)
    empty = counter.memory_bytes
    with pytest.raises(ValueError, match=r"input_ids\[1\] is -5"):
        counter.add(*pack([[1, -5]]))
    with pytest.raises(ValueError, match="input_ids must be on the CPU, not on meta"):
        counter.add(*(tensor.to("meta") for tensor in pack([[1, 5]])))
    assert (len(counter), counter.total) == (0, 0)
    counter.add(*pack([list(range(5000))]))
    assert 5000 * 32 <= counter.memory_bytes - empty <= 5000 * 16 * 8


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("ids", "offsets", "order", "error"),
    [
        (torch.zeros(3), torch.tensor([0, 3]), 2, TypeError),
        (torch.zeros(3, dtype=torch.int32), torch.tensor([0, 2]), 2, ValueError),
        (torch.zeros(3, dtype=torch.int32), torch.tensor([0, 3, 2, 3]), 2, ValueError),
        (torch.zeros(3, dtype=torch.int32), torch.tensor([], dtype=torch.int64), 2, ValueError),
        (torch.zeros(3, dtype=torch.int32), torch.tensor([0, 3]), 4, ValueError),
        (torch.zeros(6, dtype=torch.int32)[::2], torch.tensor([0, 3]), 2, ValueError),
        (torch.full((3,), MAX_TOKEN_ID + 1, dtype=torch.int32), torch.tensor([0, 3]), 2, ValueError),
    ],
)
def test_counting_refuses(
    backend: str, ids: torch.Tensor, offsets: torch.Tensor, order: int, error: type[Exception]
) -> None:
    with hmi_kernels.use_backend(backend), pytest.raises(error):
        hmi_kernels.count_ngrams(ids, offsets, order=order)
