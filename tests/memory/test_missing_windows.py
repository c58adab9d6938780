"""Which windows a batch lacks, against plain Python."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hmi_kernels
from hmi_engine.memory.missing_windows import WindowBudget, find_missing, most_wanted
from hmi_engine.models.packing import PackedSequences

TEXTS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=7), min_size=1, max_size=5)


def windows_of(ids, window):
    """The window of each position as a tuple, None where it has none."""
    if window == 2:
        return [(ids[t], ids[t + 1], -1) if t + 1 < len(ids) else None for t in range(len(ids))]
    around = [-1, *ids, -1]
    return [tuple(around[t : t + 3]) for t in range(len(ids))]


def tuples(keys):
    return list(map(tuple, hmi_kernels.ngram_tokens(keys).tolist()))


@settings(deadline=None, max_examples=60)
@given(TEXTS, st.sampled_from([2, 3]), st.randoms(use_true_random=False))
def test_missing_windows_are_those_without_a_reference(texts, window, random):
    sequences = PackedSequences.pack(texts)
    identities = [random.choice("ab") for _ in texts]
    found = torch.tensor([random.random() < 0.4 for _ in range(sequences.num_tokens)])
    references = torch.where(found, 7, -1)[:, None].expand(-1, 1 if window == 2 else 3)
    expected = {"a": Counter(), "b": Counter()}
    positions = {"a": {}, "b": {}}
    place = 0
    for ids, identity in zip(texts, identities, strict=True):
        for tokens in windows_of(ids, window):
            if tokens is not None and not found[place]:
                expected[identity][tokens] += 1
                positions[identity][place] = tokens
            place += 1
    parts = find_missing(sequences, references, identities, window=window)
    assert {part.identity for part in parts} == {name for name, counts in expected.items() if counts}
    for part in parts:
        assert (
            dict(zip(tuples(part.keys), part.occurrences().tolist(), strict=True)) == expected[part.identity]
        )
        of_positions = [tuples(part.keys)[member] for member in part.members.tolist()]
        assert dict(zip(part.positions.tolist(), of_positions, strict=True)) == positions[part.identity]


@settings(deadline=None, max_examples=60)
@given(TEXTS, st.integers(0, 12), st.randoms(use_true_random=False))
def test_a_budget_takes_the_most_frequent(texts, limit, random):
    sequences = PackedSequences.pack(texts)
    identities = [random.choice("ab") for _ in texts]
    references = torch.full((sequences.num_tokens, 1), -1)
    missing = find_missing(sequences, references, identities, window=2)
    weights = [torch.tensor([random.choice([0.0, 1.0, 1e6]) for _ in part.keys]).double() for part in missing]

    def wishes(parts, weights):
        return [
            (count, weight, part.identity, tokens)
            for part, own in zip(parts, weights, strict=True)
            for tokens, count, weight in zip(
                tuples(part.keys), part.occurrences().tolist(), own.tolist(), strict=True
            )
        ]

    everything = sorted(wishes(missing, weights), reverse=True)
    chosen = most_wanted(missing, weights, limit)
    kept = {(part.identity, tokens) for part in chosen for tokens in tuples(part.keys)}
    assert len(kept) == min(limit, len(everything))
    worst_kept = min((wish[:2] for wish in everything if wish[2:] in kept), default=None)
    best_left = max((wish[:2] for wish in everything if wish[2:] not in kept), default=None)
    assert worst_kept is None or best_left is None or worst_kept >= best_left
    for part in chosen:
        (whole,) = (other for other in missing if other.identity == part.identity)
        of_whole = dict(zip(whole.positions.tolist(), whole.keys[whole.members].tolist(), strict=True))
        of_part = dict(zip(part.positions.tolist(), part.keys[part.members].tolist(), strict=True))
        assert of_part == {place: key for place, key in of_whole.items() if key in set(part.keys.tolist())}


@given(st.lists(st.integers(0, 30), max_size=60), st.sampled_from([0.0, 0.05, 0.1, 0.3, 1.0]))
def test_a_budget_adds_up_over_batches(token_counts, share):
    budget, computed = WindowBudget(share), 0
    for place, num_tokens in enumerate(token_counts):
        granted = budget.grant(num_tokens)
        budget.spend(granted)
        computed += granted
        assert computed == int(share * sum(token_counts[: place + 1]) + 1e-3)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=60), st.integers(0, 30))
def test_a_budget_saves_up_one_window(batches, num_tokens):
    """Whatever came before: of what nobody missed no more is left."""
    budget = WindowBudget(0.1)
    for count, wanted in batches:
        budget.spend(min(wanted, budget.grant(count)))
    assert int(0.1 * num_tokens) <= budget.grant(num_tokens) <= 0.1 * num_tokens + 1.001
    for _ in range(100):
        budget.grant(1000)
    assert budget.grant(0) == 1
