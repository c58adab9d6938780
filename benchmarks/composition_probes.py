"""Row errors, the probe, and what equal bytes of bigrams and of trigrams carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.composition_fits import probe, relative_error
from benchmarks.composition_rules import Held, corrected, pair_sides
from benchmarks.composition_study import (
    DROPPED,
    PAIR_RULES,
    PLACEHOLDER,
    TRIPLE_RULES,
    ZERO_OUTSIDE,
    Merge,
    Rule,
    Study,
)
from benchmarks.composition_texts import Frequencies

__all__ = ["Plan", "budget_shares", "context_shares", "hybrid_shares", "row_errors", "rule_shares"]

BYTES_PER_VALUE = 2
BYTES_BESIDE_ROW = 48
"""Key, count and index entries of a row."""


def row_errors(
    study: Study, rules: Mapping[str, Rule], coverages: Mapping[str, Held]
) -> dict[str, tuple[float, float]]:
    """Relative error of the merge on held-out texts, before and after position and LayerNorm.

    Returns them by ``"COVERAGE: RULE"``, against the merge of a table of all n-grams.
    """
    test = ~study.texts.tokens_in_training
    found = {}
    for rule, prepare in rules.items():
        merge = prepare(study)
        exact = merge(study.everything())
        exact_inputs = study.inputs(exact)[test]
        for coverage, held in coverages.items():
            merged = merge(held)
            found[f"{coverage}: {rule}"] = (
                relative_error(merged[test], exact[test]),
                relative_error(study.inputs(merged)[test], exact_inputs),
            )
    return found


def share(study: Study, merged: Tensor) -> float:
    """Share of the contextual states' variance that a probe recovers from a merge, on held-out texts."""
    return probe(study.inputs(merged), study.context, study.texts.tokens_in_training)


def rule_shares(study: Study, rules: Mapping[str, Rule], coverages: Mapping[str, Held]) -> dict[str, float]:
    """The probe's share by ``"COVERAGE: RULE"``."""
    found: dict[str, float] = {}
    for rule, prepare in rules.items():
        merge = prepare(study)
        found |= {f"{coverage}: {rule}": share(study, merge(held)) for coverage, held in coverages.items()}
    return found


def context_shares(study: Study) -> dict[str, float]:
    """How much context exact windows, pure compositions and single tokens carry."""
    rows, everything = study.rows, study.everything()
    exact_pairs, exact_triples = (
        prepare(study)(everything) for prepare in (PAIR_RULES[DROPPED], TRIPLE_RULES[ZERO_OUTSIDE])
    )
    sides = pair_sides(rows)
    only_left = torch.where(rows.has_left, sides.left, rows.first.slot(0))
    compositions = {
        name: TRIPLE_RULES[name](study)(study.every_pair())
        for name in (ZERO_OUTSIDE, "more frequent bigram", "average of both", "learned, a number a slot")
    }
    states = {
        "trigram windows, three slots": exact_triples,
        "trigram windows, the token's own slot": rows.triple.slot(1),
        "bigram windows": exact_pairs,
        "left bigram only": only_left,
        **{f"trigrams composed of bigrams, {name}": merged for name, merged in compositions.items()},
        "one row a token, placeholder on both sides": PAIR_RULES[PLACEHOLDER](study)(study.nothing()),
        "one row a token, alone in its window": rows.first.slot(0),
    }
    return {name: share(study, merged) for name, merged in states.items()}


def hybrid_shares(study: Study) -> dict[str, float]:
    """Bigram windows corrected by trigrams: all of them, and where the corpus holds them twice."""
    merge = PAIR_RULES[PLACEHOLDER](study)
    everything = torch.ones_like(study.texts.tokens_in_training)
    found = study.texts.triples.held()
    cases: dict[str, tuple[Held, Tensor]] = {
        "all n-grams": (study.everything(), everything),
        "n-grams of the corpus": (study.found(), found),
    }
    shares = {}
    for coverage, (held, triples) in cases.items():
        merged = merge(held)
        shares[f"{coverage}: bigrams"] = share(study, merged)
        for slots in ("own token", "all three"):
            states = corrected(
                study.rows, merged, triples, slots="own token" if slots == "own token" else "all three"
            )
            shares[f"{coverage}: bigrams corrected by trigrams, {slots}"] = share(study, states)
    return shares


@dataclass(frozen=True)
class Plan:
    """How a budget is spent: the share of its bytes for trigrams, and what a trigram's row holds."""

    name: str
    trigram_bytes: float
    slots: Literal["own token", "all three"] = "own token"


PLANS = (
    Plan("bigrams alone", 0.0),
    Plan("half for trigrams' own tokens", 0.5),
    Plan("half for trigrams of three slots", 0.5, "all three"),
    Plan("trigrams' own tokens alone", 1.0),
)


def budget_shares(study: Study, budgets: Sequence[int]) -> dict[str, list[float]]:
    """The probe's share for each plan at each budget in bytes; placeholder rows stand in."""
    merge = PAIR_RULES[PLACEHOLDER](study)
    return {plan.name: [_planned_share(study, merge, plan, budget) for budget in budgets] for plan in PLANS}


def _planned_share(study: Study, merge: Merge, plan: Plan, budget: int) -> float:
    texts, size = study.texts, study.model.configuration.hidden_size
    values = size if plan.slots == "own token" else 3 * size
    pairs = most_frequent(texts.pairs, round(budget * (1 - plan.trigram_bytes)), 2 * size)
    triples = most_frequent(texts.triples, round(budget * plan.trigram_bytes), values)
    held = Held.of(study.rows, pairs, torch.zeros_like(triples))
    return share(study, corrected(study.rows, merge(held), triples, slots=plan.slots))


def most_frequent(frequencies: Frequencies, num_bytes: int, values: int) -> Tensor:
    """Bool [T]: which n-grams a table of so many bytes has, of rows of ``values`` numbers.

    A training text's n-gram counts as held if its occurrences in other folds would have admitted it.
    """
    num_rows = num_bytes // (values * BYTES_PER_VALUE + BYTES_BESIDE_ROW)
    if num_rows < 1:
        return torch.zeros_like(frequencies.keys, dtype=torch.bool)
    last = min(num_rows, len(frequencies.all_counts)) - 1
    return frequencies.held(max(2, int(frequencies.all_counts[last])))
