"""The drift benchmark's policies against naive ones, and a whole run on drawn text."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import hmi_kernels
from benchmarks import drift
from benchmarks.arguments import Arguments
from benchmarks.drift_policies import (
    Clairvoyant,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    Period,
    Static,
    Updated,
)
from benchmarks.growth_texts import TokenizedTexts
from hmi_engine.errors import HmiError
from hmi_engine.knowledge.frequencies import Frequencies

ROWS = 20


def draw_texts(seed: int, num_texts: int, *, shift: int = 0) -> TokenizedTexts:
    """Texts of a Zipf-like law; ``shift`` moves the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (num_texts,), generator=generator)
    weights = 1 / torch.arange(1, 30)
    ids = torch.multinomial(weights, int(lengths.sum()), replacement=True, generator=generator) + shift
    return TokenizedTexts(ids.int(), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))


def windows(texts: TokenizedTexts) -> list[tuple[int, int]]:
    parts = texts.input_ids.split(texts.offsets.diff().tolist())
    return [pair for part in parts for pair in pairwise(part.tolist())]


PERIODS = [Period.of(draw_texts(seed, 60, shift=5 * seed)) for seed in range(4)]


def first_table() -> tuple[torch.Tensor, torch.Tensor, Frequencies]:
    corpus = draw_texts(9, 300)
    keys, counts = hmi_kernels.count_ngrams(corpus.input_ids, corpus.offsets, order=2)
    order = counts.argsort(descending=True, stable=True)[:ROWS]
    return (
        keys[order],
        counts[order],
        Frequencies.none().with_corpus(keys, counts, occurrences=int(counts.sum())),
    )


def test_periods_hold_the_windows_in_order() -> None:
    for period in PERIODS:
        slots = hmi_kernels.ngram_tokens(period.keys).tolist()
        assert [(a, b) for a, b, _ in slots] == windows(period.texts)
        assert all(c == -1 for *_, c in slots)


def test_least_recently_used_is_a_list_in_order_of_use() -> None:
    table, _, _ = first_table()
    policy, rows, computed = LeastRecentlyUsed(table.flip(0)), table.flip(0).tolist(), 0
    for period in PERIODS:
        hits = 0
        for key in period.keys.tolist():
            hits += key in rows
            rows.remove(key if key in rows else rows[0])
            rows.append(key)
        computed += len(period.keys) - hits
        assert policy.serve(period) == hits
    assert policy.rows_computed == computed


def test_least_frequently_used_drops_the_least_count() -> None:
    table, counts, _ = first_table()
    policy = LeastFrequentlyUsed(table, counts)
    uses = {
        key: (count, time)
        for time, (key, count) in enumerate(zip(table.tolist(), counts.tolist(), strict=True))
    }
    time = len(uses)
    for period in PERIODS:
        hits = 0
        for key in period.keys.tolist():
            hits += key in uses
            if key not in uses:
                del uses[min(uses, key=lambda each: uses[each])]
            uses[key] = (uses.get(key, (0, 0))[0] + 1, time)
            time += 1
        assert policy.serve(period) == hits
        assert len(uses) == ROWS


def test_static_and_clairvoyant_count_what_a_counter_counts() -> None:
    table, _, _ = first_table()
    static, known = Static(table), Clairvoyant(table)
    for period in PERIODS:
        counted = Counter(period.keys.tolist())
        assert static.serve(period) == sum(counted[key] for key in table.tolist())
        assert known.serve(period) == sum(count for _, count in counted.most_common(ROWS))
    assert static.rows_computed == 0 < known.rows_computed


@pytest.mark.parametrize("bound", [3, None])
def test_updates_follow_decayed_counts_within_their_bound(bound: int | None) -> None:
    table, _, frequencies = first_table()
    # A half-life so short that the corpus is soon forgotten, and one so long that nothing decays.
    for half_life in (50, 10**12):
        policy = Updated(frequencies, rows=ROWS, half_life_tokens=half_life, max_promotions=bound)
        counts = Counter(
            dict(zip(frequencies.keys.tolist(), map(float, frequencies.counts.tolist()), strict=True))
        )
        held, computed = set(table.tolist()), 0
        for period in PERIODS:
            before = policy.rows_computed
            assert policy.serve(period) == sum(key in held for key in period.keys.tolist())
            assert bound is None or policy.rows_computed - before <= bound
            decay = 0.5 ** (period.texts.num_tokens / half_life)
            counts = Counter({key: count * decay for key, count in counts.items()})
            counts.update(period.keys.tolist())
            now = set(policy._table.tolist())
            assert len(now) == ROWS
            computed += len(now - held)
            if bound is None:
                least = min(counts[key] for key in now)
                best = [count for _, count in counts.most_common(ROWS)]
                assert least == pytest.approx(best[-1], rel=0.02, abs=0.01)
            held = now
        assert policy.rows_computed == computed


def test_the_streams_turn_from_one_text_to_the_other() -> None:
    first, second = draw_texts(1, 2000), draw_texts(2, 1000, shift=1000)
    made = drift.make_drift(first, second, num_tokens=4000, num_periods=8, rows=ROWS)
    assert made.corpus.input_ids.max() < 1000
    for periods in made.streams.values():
        shares = [float((period.texts.input_ids >= 1000).double().mean()) for period in periods]
        assert len(shares) == 8
        for number, share in enumerate(shares):
            assert abs(share - (number + 0.5) / 8) < 0.15
        assert sum(period.texts.num_tokens for period in periods) > 3800
    in_order = torch.cat([period.texts.input_ids for period in made.streams["file_order"]])
    length = int((in_order >= 1000).sum())
    assert torch.equal(in_order[in_order >= 1000], second.input_ids[:length])


def test_a_whole_run(tmp_path: Path) -> None:
    made = drift.make_drift(
        draw_texts(1, 1000), draw_texts(2, 500, shift=15), num_tokens=3000, num_periods=5, rows=ROWS
    )
    result = drift.measure(
        made, ["a", "b"], Arguments(None, tmp_path / "out.json", quick=True, command="test")
    )
    assert {curve.figure for curve in result.curves} == made.streams.keys()
    for order in made.streams:
        shares = {curve.name: curve.y for curve in result.curves if curve.figure == order}
        assert all(len(share) == 5 and 0 <= min(share) <= max(share) <= 1 for share in shares.values())
        between = [share for name, share in shares.items() if name not in (drift.RECENT, drift.FREQUENT)]
        for share in between:
            assert all(found <= best for found, best in zip(share, shares[drift.KNOWN], strict=True))
    costs = {quantity.name: quantity.value for quantity in result.quantities}
    for order in ("random order", "file order"):
        assert costs[f"{order}, {drift.STATIC}: computed"] == 0 < costs[f"{order}, {drift.RECENT}: computed"]
    with pytest.raises(HmiError, match="too few"):
        drift.policies(
            drift.make_drift(draw_texts(1, 9), draw_texts(2, 9), num_tokens=9, num_periods=1, rows=999)
        )
