"""Forward decay against its definition: an occurrence that is t tokens old weighs 2 ** (-t / half-life)."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmi_engine.knowledge.frequencies import Frequencies, sum_counts

HALF_LIFE = 1000
counts = st.dictionaries(st.integers(1, 8), st.integers(1, 10_000), min_size=1)
events = st.lists(
    st.tuples(counts, st.one_of(st.none(), st.integers(0, 3 * HALF_LIFE), st.integers(0, 10**12))), max_size=8
)


def tensors(counted: dict[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([*counted], dtype=torch.int64), torch.tensor([*counted.values()], dtype=torch.int64)


@settings(max_examples=200, deadline=None)
@given(events)
def test_counts_decay_as_their_definition_says(history: list[tuple[dict[int, int], int | None]]) -> None:
    """Text without tokens on the clock is a corpus; else it is traffic that took so many tokens."""
    found, expected, total = Frequencies.none(), Counter[int](), 0.0
    for counted, tokens in history:
        keys, numbers = tensors(counted)
        occurrences = sum(counted.values())
        if tokens is None:
            found = found.with_corpus(keys, numbers, occurrences=occurrences)
        else:
            found = found.with_traffic(
                keys, numbers.double(), tokens=tokens, occurrences=occurrences, half_life_tokens=HALF_LIFE
            )
        aged = 2.0 ** (-(tokens or 0) / HALF_LIFE) if (tokens or 0) < 1000 * HALF_LIFE else 0.0
        expected = Counter({key: weight * aged for key, weight in expected.items()})  # type: ignore[misc]
        expected.update(counted)
        total = total * aged + occurrences
    assert bool((found.keys.diff() > 0).all()) and bool((found.counts > 0).all())
    weights = dict(zip(found.keys.tolist(), (found.counts / found.occurrence_weight).tolist(), strict=True))
    # Half a unit is lost to rounding at each event; a unit is at most one occurrence of its time.
    for key in expected.keys() | weights.keys():
        assert weights.get(key, 0.0) == pytest.approx(expected[key], rel=1e-6, abs=1 + len(history) / 2)
    assert found.total / found.occurrence_weight == pytest.approx(total, rel=1e-6)


@given(st.lists(counts, min_size=1, max_size=5))
def test_counts_add_up_as_a_counter_does(parts: list[dict[int, int]]) -> None:
    keys, summed = sum_counts([tensors(part) for part in parts])
    expected = Counter[int]()
    for part in parts:
        expected.update(part)
    assert dict(zip(keys.tolist(), summed.tolist(), strict=True)) == dict(sorted(expected.items()))
    assert keys.tolist() == sorted(expected)


def test_the_most_frequent_are_kept_and_found() -> None:
    found = Frequencies(*map(torch.tensor, ([1, 2, 3, 4], [5, 9, 5, 1]))).most_frequent(2)
    assert found.keys.tolist() == [1, 2] and found.counts.tolist() == [5, 9]
    assert found.counts_of(torch.tensor([2, 3, 1, 99])).tolist() == [9, 0, 5, 0]
    assert Frequencies.none().counts_of(torch.tensor([2])).tolist() == [0]


@pytest.mark.parametrize(("tokens", "half_life"), [(-1, 10), (1, 0), (1, float("nan"))])
def test_impossible_clocks_are_refused(tokens: int, half_life: float) -> None:
    empty = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="half_life_tokens"):
        Frequencies.none().with_traffic(
            empty, empty.double(), tokens=tokens, occurrences=0, half_life_tokens=half_life
        )
