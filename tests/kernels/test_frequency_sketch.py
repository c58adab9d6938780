"""The sketch against Counter: never too much, too little by max_error at most, in bounded memory."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hmi_kernels import FrequencySketch, ngram_tokens
from hmi_kernels.frequency_sketch import _TorchSketch
from hmi_kernels.native import native

MAKERS = pytest.mark.parametrize("make", [native.FrequencySketch, _TorchSketch])
KEYS = st.one_of(st.integers(0, 12), st.integers(1, 2**62))
BATCHES = st.lists(st.tuples(st.lists(KEYS, max_size=40), st.integers(1, 9)), max_size=12)
PURGED_SHARE = 0.25


def new_sketch(make: type, max_items: int) -> FrequencySketch:
    sketch = FrequencySketch(max_items)
    sketch._sketch = make(max_items)
    return sketch


def int64(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def add_all(sketch: FrequencySketch, batches: list[tuple[list[int], int]]) -> Counter[int]:
    """Adds the batches; returns the true weights."""
    true: Counter[int] = Counter()
    for keys, weight in batches:
        sketch.add(int64(keys), weight)
        for key in keys:
            true[key] += weight * (key != 0)
    return +true


def check(sketch: FrequencySketch, true: Counter[int]) -> None:
    keys, weights = sketch.items()
    assert keys.dtype == torch.int64 and weights.dtype == torch.float64
    assert (keys.diff() > 0).all() and (keys > 0).all()
    assert len(sketch) == len(keys) <= sketch.max_items
    assert sketch.total == true.total()
    found = dict(zip(keys.tolist(), weights.tolist(), strict=True))
    assert found.keys() <= true.keys()
    for key, weight in true.items():
        assert found.get(key, 0) <= weight <= found.get(key, 0) + sketch.max_error
        assert key in found or weight <= sketch.max_error


@MAKERS
@settings(deadline=None, max_examples=120)
@given(max_items=st.integers(1, 20), batches=BATCHES)
def test_weights_are_within_the_error(
    make: type, max_items: int, batches: list[tuple[list[int], int]]
) -> None:
    sketch = new_sketch(make, max_items)
    true = add_all(sketch, batches)
    check(sketch, true)
    # One shard: the bound of the method holds for every stream.
    assert sketch.max_error * (max_items - int(max_items * PURGED_SHARE)) <= sketch.total
    if len(true) <= max_items:
        assert sketch.max_error == 0


@MAKERS
@settings(deadline=None, max_examples=80)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=3, max_size=3),
    parts=st.lists(BATCHES, min_size=3, max_size=3),
)
def test_merging_keeps_the_guarantee_in_either_order(
    make: type, sizes: list[int], parts: list[list[tuple[list[int], int]]]
) -> None:
    for left_first in (True, False):
        sketches = [new_sketch(make, size) for size in sizes]
        true = sum((add_all(sketch, part) for sketch, part in zip(sketches, parts, strict=True)), Counter())
        first, second, third = sketches
        if left_first:
            first.merge(second)
            first.merge(third)
        else:
            second.merge(third)
            first.merge(second)
        check(first, true)


def skewed_keys(count: int, seed: int) -> torch.Tensor:
    """Half by a Zipf-like law, half drawn from so many that hardly one comes twice."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64).clamp(min=1e-6)
    rare = torch.randint(1, 2**40, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.5, uniform.pow(-1.6).long(), rare)


@pytest.mark.parametrize("others", [700, 3000, 40_000])
def test_merging_sketches_of_other_numbers_of_shards(others: int) -> None:
    one, other = FrequencySketch(3000), FrequencySketch(others)
    first, second = skewed_keys(60_000, 1), skewed_keys(60_000, 2)
    one.add(first)
    other.add(second, 2)
    one.merge(other)
    true = Counter(first.tolist())
    for key in second.tolist():
        true[key] += 2
    assert one.max_error > 0
    check(one, true)


@pytest.mark.parametrize("max_items", [500, 5000, 50_000])
def test_shards_bound_their_error_and_their_memory(max_items: int) -> None:
    sketch = FrequencySketch(max_items)
    true: Counter[int] = Counter()
    for seed in range(6):
        keys = skewed_keys(50_000, seed)
        sketch.add(keys)
        true.update(keys.tolist())
        assert sketch.memory_bytes <= FrequencySketch.max_memory_bytes(max_items)
    check(sketch, true)
    # Distinct keys are shared out evenly but for chance, and so is the weight of rare ones.
    rare = sum(weight for weight in true.values() if weight <= sketch.max_error)
    heavy = sum(weight > sketch.max_error for weight in true.values())
    assert sketch.max_error <= 2 * rare / (0.75 * max_items - heavy) + 2


def test_a_stream_of_distinct_keys_leaves_no_key_behind_in_memory() -> None:
    sketch = FrequencySketch(4096)
    for start in range(1, 400_000, 50_000):
        sketch.add(torch.arange(start, start + 50_000))
    assert len(sketch) <= 4096
    assert sketch.memory_bytes <= FrequencySketch.max_memory_bytes(4096)
    sketch.add(int64([77] * 1000))
    keys, weights = sketch.items(min_weight=500)
    assert keys.tolist() == [77]
    assert 1000 - sketch.max_error <= weights[0] <= 1001


@pytest.mark.parametrize("max_bytes", [100, 1000, 100_000, 8 << 20])
def test_items_within_a_size(max_bytes: int) -> None:
    items = FrequencySketch.items_within(max_bytes)
    assert items == 0 or FrequencySketch.max_memory_bytes(items) <= max_bytes
    assert FrequencySketch.max_memory_bytes(items + 1) > max_bytes


def test_threads_add_beside_each_other() -> None:
    """Nothing is lost: with room for all keys the counts are exact."""
    sketch = FrequencySketch(100_000)
    batches = [skewed_keys(5000, seed) % 40_000 + 1 for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(sketch.add, batches))
    true = Counter(torch.cat(batches).tolist())
    assert sketch.max_error == 0
    check(sketch, true)


def test_threads_that_purge_add_and_merge_beside_each_other() -> None:
    sketch, other = FrequencySketch(4096), FrequencySketch(4096)
    batches = [skewed_keys(20_000, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pair: (sketch, other)[pair[0] % 2].add(pair[1]), enumerate(batches)))
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(sketch.items) for _ in range(4)]
        pool.submit(sketch.merge, other).result()
        assert all((keys.result()[0].diff() > 0).all() for keys in reads)
    assert sketch.max_error > 0
    check(sketch, Counter(torch.cat(batches).tolist()))


@MAKERS
def test_scale_clear_and_the_least_weight(make: type) -> None:
    sketch = new_sketch(make, 4)
    true = add_all(sketch, [([1, 2, 3, 4, 5, 5, 6, 6, 6], 2)])
    before = sketch.max_error
    assert before > 0
    sketch.scale(0.5)
    assert sketch.max_error == before / 2
    check(sketch, Counter({key: weight // 2 for key, weight in true.items()}))
    keys, weights = sketch.items()
    least = weights.max().item()
    assert sketch.items(least)[0].tolist() == keys[weights == least].tolist()
    sketch.clear()
    assert (len(sketch), sketch.total, sketch.max_error) == (0, 0.0, 0.0)
    check(sketch, add_all(sketch, [([7, 8], 1)]))


@MAKERS
def test_a_sketch_merged_with_itself_is_doubled(make: type) -> None:
    sketch = new_sketch(make, 5000)
    true = add_all(sketch, [(list(range(1, 3000)), 3)])
    sketch.merge(sketch)
    check(sketch, true + true)


def window_keys(sequence: list[int], window: int, is_causal: bool) -> Counter[tuple[int, ...]]:
    pairs = Counter((a, b, -1) for a, b in pairwise(sequence))
    if window == 2:
        return pairs
    right = Counter() if is_causal else Counter((-1, a, b) for a, b in pairwise(sequence))
    return pairs + right + Counter(zip(sequence, sequence[1:], sequence[2:], strict=False))


@MAKERS
@pytest.mark.parametrize(("window", "is_causal"), [(2, False), (3, False), (2, True), (3, True)])
@settings(deadline=None, max_examples=60)
@given(sequences=st.lists(st.lists(st.integers(0, 5), max_size=7), min_size=1, max_size=6), data=st.data())
def test_windows_of_chosen_sequences(
    make: type, window: int, is_causal: bool, sequences: list[list[int]], data: st.DataObject
) -> None:
    numbers = data.draw(st.lists(st.integers(0, len(sequences) - 1), max_size=6))
    ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32)
    offsets = int64([0, *map(len, sequences)]).cumsum(0)
    sketch = new_sketch(make, 1000)
    sketch.add_windows(ids, offsets, int64(numbers), window=window, is_causal=is_causal, weight=4)
    true = sum((window_keys(sequences[number], window, is_causal) for number in numbers), Counter())
    keys, weights = sketch.items()
    slots = map(tuple, ngram_tokens(keys).tolist())
    assert dict(zip(slots, weights.tolist(), strict=True)) == {key: 4 * n for key, n in true.items()}


@MAKERS
def test_bad_arguments_add_nothing(make: type) -> None:
    with pytest.raises(ValueError, match="max_items"):
        FrequencySketch(0)
    sketch = new_sketch(make, 10)
    with pytest.raises(ValueError, match="positive"):
        sketch.add(int64([3, -1]))
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight"):
            sketch.add(int64([3]), weight)
        with pytest.raises(ValueError, match="factor"):
            sketch.scale(weight)
    with pytest.raises(TypeError):
        sketch.add(torch.tensor([3], dtype=torch.int32))
    with pytest.raises(ValueError, match="keys must be on the CPU, not on meta"):
        sketch.add(int64([3]).to("meta"))
    assert len(sketch) == 0
    ids, offsets = torch.tensor([1, 2, 3], dtype=torch.int32), int64([0, 3])
    with pytest.raises(ValueError, match="sequence_numbers must be on the CPU"):
        sketch.add_windows(ids, offsets, int64([0]).to("meta"), window=2)
    for bad_ids, bad_offsets, numbers, window in (
        (ids, offsets, [1], 2),
        (ids, offsets, [-1], 2),
        (ids, int64([0, 2]), [0], 2),
        (ids, int64([0, 4, 3]), [0], 2),
        (ids - 3, offsets, [0], 2),
        (ids, offsets, [0], 4),
    ):
        for is_causal in (False, True):
            with pytest.raises(ValueError):
                sketch.add_windows(bad_ids, bad_offsets, int64(numbers), window=window, is_causal=is_causal)
    assert (len(sketch), sketch.total) == (0, 0)
