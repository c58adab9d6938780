"""One set's texts, rows and contextual states together, and every rule by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.composition_fits import fit_diagonal, fit_linear, fit_scalars
from benchmarks.composition_rows import StudyRows, compute_rows, contextual_states
from benchmarks.composition_rules import (
    CENTERS,
    Center,
    Doubles,
    Held,
    PairSides,
    Singles,
    absent_doubles,
    learned_center,
    learned_sides,
    masked_doubles,
    masked_sides,
    masked_singles,
    mean_sides,
    merge_pairs,
    merge_triples,
    own_rows,
    unigram_singles,
    unigram_unless_both,
    zero_outer_singles,
)
from benchmarks.composition_texts import StudyTexts
from hmi_engine.models.bert import HierarchicalBert

__all__ = [
    "DROPPED",
    "PAIR_RULES",
    "PLACEHOLDER",
    "TRIPLE_RULES",
    "ZERO_OUTSIDE",
    "Merge",
    "Rule",
    "Study",
    "open_study",
]


@dataclass(frozen=True)
class Study:
    """What is computed once for a set and a number of domain layers.

    Attributes:
        model: the base.
        texts: the set.
        rows: what tables would hold.
        context: float32 [T, H], the plain model's states after the domain layers.
    """

    model: HierarchicalBert
    texts: StudyTexts
    rows: StudyRows
    context: Tensor

    def inputs(self, merged: Tensor) -> Tensor:
        """The first upper layer's input for a merge [T, H]: position added, LayerNorm."""
        positions = self.model.merge_positions[self.texts.sequences.positions()]
        return self.model.merge_norm(merged + positions)

    def everything(self) -> Held:
        """A table of all n-grams."""
        return Held.everything(self.rows)

    def found(self) -> Held:
        """A table of the n-grams that the corpus holds twice."""
        return Held.of(self.rows, self.texts.pairs.held(), self.texts.triples.held())

    def found_pairs(self) -> Held:
        """The bigrams of that table alone."""
        return Held.of(self.rows, self.texts.pairs.held(), self._none())

    def every_pair(self) -> Held:
        """A table of all bigrams and of no trigram."""
        return Held.of(self.rows, ~self._none(), self._none())

    def nothing(self) -> Held:
        """A table without n-grams."""
        return Held.of(self.rows, self._none(), self._none())

    def at_random(self, rate: float) -> Held:
        """A table that has each n-gram with this probability."""
        texts = self.texts
        return Held.of(self.rows, texts.pairs.held_at_random(rate), texts.triples.held_at_random(rate))

    def _none(self) -> Tensor:
        return torch.zeros_like(self.texts.tokens_in_training)


@torch.no_grad()
def open_study(model: HierarchicalBert, texts: StudyTexts, placeholder: int) -> Study:
    """Computes all rows and states of a set."""
    rows = compute_rows(model, texts.sequences, placeholder)
    return Study(model, texts, rows, contextual_states(model, texts.sequences))


Merge = Callable[[Held], Tensor]
"""The merged states [T, H] of a set under a table."""
Rule = Callable[[Study], Merge]
"""Prepares what a rule needs once for a set."""


def _pairs(stand_ins: Callable[[Study], PairSides]) -> Rule:
    def prepare(study: Study) -> Merge:
        sides = stand_ins(study)
        return lambda held: merge_pairs(study.rows, held, sides)

    return prepare


def _triples(
    center: Callable[[Study], Center],
    singles: Callable[[StudyRows], Singles],
    doubles: Callable[[StudyRows], Doubles] = absent_doubles,
) -> Rule:
    def prepare(study: Study) -> Merge:
        chosen, pairs, alone = center(study), doubles(study.rows), singles(study.rows)
        return lambda held: merge_triples(study.texts, study.rows, held, chosen, pairs, alone)

    return prepare


def _fixed(name: str) -> Callable[[Study], Center]:
    return lambda study: CENTERS[name]


DROPPED, PLACEHOLDER = "bracket dropped (today)", "placeholder beside the token"
PAIR_RULES: dict[str, Rule] = {
    DROPPED: _pairs(lambda study: own_rows(study.rows)),
    "unigram unless both bigrams are found": lambda study: lambda held: unigram_unless_both(study.rows, held),
    PLACEHOLDER: _pairs(lambda study: masked_sides(study.rows)),
    "mean over the corpus' neighbors": _pairs(lambda study: mean_sides(study.texts, study.rows)),
    "learned, a number a slot": _pairs(lambda s: learned_sides(s.texts, s.rows, fit_scalars)),
    "learned, a diagonal a slot": _pairs(lambda s: learned_sides(s.texts, s.rows, fit_diagonal)),
    "learned, a matrix a slot": _pairs(lambda s: learned_sides(s.texts, s.rows, fit_linear)),
}
"""What stands for a missing bigram, width 2."""

ZERO_OUTSIDE = "additive, nothing outside (today)"
TRIPLE_RULES: dict[str, Rule] = {
    ZERO_OUTSIDE: _triples(_fixed("additive"), zero_outer_singles),
    "additive, unigram outside": _triples(_fixed("additive"), unigram_singles),
    "more frequent bigram": _triples(_fixed("more frequent bigram"), zero_outer_singles),
    "left bigram": _triples(_fixed("left bigram"), zero_outer_singles),
    "average of both": _triples(_fixed("average of both"), zero_outer_singles),
    "learned, a number a slot": _triples(
        lambda s: learned_center(s.texts, s.rows, fit_scalars), zero_outer_singles
    ),
    "learned, a diagonal a slot": _triples(
        lambda s: learned_center(s.texts, s.rows, fit_diagonal), zero_outer_singles
    ),
    "learned, a matrix a slot": _triples(
        lambda s: learned_center(s.texts, s.rows, fit_linear), zero_outer_singles
    ),
    "average of both, placeholder in unigrams": _triples(_fixed("average of both"), masked_singles),
    "additive, placeholder everywhere": _triples(_fixed("additive"), masked_singles, masked_doubles),
    "average of both, placeholder everywhere": _triples(
        _fixed("average of both"), masked_singles, masked_doubles
    ),
}
"""What stands for a missing trigram, width 3."""
