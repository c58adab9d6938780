from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmi_engine.knowledge.selection import bytes_per_row, select_rows, table_bytes
from hmi_kernels import plot_index_build

counters = st.dictionaries(st.integers(1, 2**62), st.integers(1, 9), max_size=40).map(Counter)


def tensors(counter: Counter[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(list(counter), dtype=torch.int64), torch.tensor(
        list(counter.values()), dtype=torch.int64
    )


@settings(deadline=None)
@given(counters, st.integers(0, 4000), st.integers(1, 4), st.integers(49, 200), st.data())
def test_the_most_frequent_are_chosen_as_a_counter_would(
    counter: Counter[int], budget: int, min_count: int, row_bytes: int, data: st.DataObject
) -> None:
    known = list(counter)
    excluded = data.draw(st.lists(st.sampled_from(known), unique=True)) if known else []
    keys, counts = tensors(counter)
    selection = select_rows(
        keys,
        counts,
        budget_bytes=budget,
        bytes_per_row=row_bytes,
        min_count=min_count,
        exclude=[
            plot_index_build(torch.tensor(part, dtype=torch.int64))
            for part in (excluded[:3], [*excluded[3:], 2**62 + 5])
        ],
    )
    wanted = [(key, count) for key, count in counter.items() if count >= min_count and key not in excluded]
    wanted.sort(key=lambda item: (-item[1], item[0]))
    chosen = list(zip(selection.keys.tolist(), selection.counts.tolist(), strict=True))
    assert chosen == wanted[: len(chosen)]
    assert table_bytes(len(chosen), row_bytes) <= budget
    assert len(chosen) == len(wanted) or table_bytes(len(chosen) + 1, row_bytes) > budget
    total = max(sum(counter.values()), 1)
    assert selection.hit_mass == pytest.approx(sum(count for _, count in chosen) / total)
    assert selection.inherited_mass == pytest.approx(sum(counter[key] for key in excluded) / total)
    assert selection.admission_count == (chosen[-1][1] if chosen else 0)


@given(counters, st.randoms())
@settings(deadline=None)
def test_the_order_of_the_keys_does_not_matter(counter: Counter[int], random: "object") -> None:
    keys, counts = tensors(counter)
    order = torch.randperm(len(keys))
    one, other = (
        select_rows(k, c, budget_bytes=900, bytes_per_row=80, min_count=1)
        for k, c in ((keys, counts), (keys[order], counts[order]))
    )
    assert torch.equal(one.keys, other.keys)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5, 8, 9, 100, 1024, 1025])
def test_table_bytes_are_those_of_the_real_index(num_rows: int) -> None:
    index = plot_index_build(torch.arange(1, num_rows + 1))
    row = bytes_per_row(2, 384, "float16")
    assert row == 2 * 384 * 2 + 16 + 32
    if num_rows:
        assert table_bytes(num_rows, row) == index.numel() * 8 + num_rows * (2 * 384 * 2 + 16)


def test_rows_of_float32_and_three_slots() -> None:
    assert bytes_per_row(3, 10, "float32") == 3 * 10 * 4 + 48


def test_tensors_that_do_not_match_are_refused() -> None:
    keys = torch.ones(3, dtype=torch.int64)
    for bad_keys, bad_counts in ((keys, keys[:2]), (keys.int(), keys), (keys.view(3, 1), keys.view(3, 1))):
        with pytest.raises(ValueError, match="keys and counts"):
            select_rows(bad_keys, bad_counts, budget_bytes=1, bytes_per_row=50, min_count=1)
