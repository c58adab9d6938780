"""Merges of rows where some are missing, by several rules: what the composition study compares.

Each follows the definition of the merge in docs/architecture.md in plain torch; a test holds the rules of the
engine to ``hmi_kernels.plot_merge``. All results are float32 [T, H], before position and LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.composition_fits import Affine
from benchmarks.composition_rows import StudyRows
from benchmarks.composition_texts import StudyTexts

__all__ = [
    "CENTERS",
    "Center",
    "CenterParts",
    "Doubles",
    "Held",
    "PairSides",
    "Singles",
    "absent_doubles",
    "center_parts",
    "corrected",
    "learned_center",
    "learned_sides",
    "masked_doubles",
    "masked_sides",
    "masked_singles",
    "mean_sides",
    "merge_pairs",
    "merge_triples",
    "own_rows",
    "pair_sides",
    "unigram_singles",
    "unigram_unless_both",
    "zero_outer_singles",
]


@dataclass(frozen=True)
class Held:
    """Which rows the table has, bool [T, 1] each.

    Attributes:
        pairs: the bigram that starts at the token.
        triples: the window around the token; at a text's ends, where that is a bigram, as in ``pairs``.
    """

    pairs: Tensor
    triples: Tensor

    @classmethod
    def of(cls, rows: StudyRows, pairs: Tensor, triples: Tensor) -> Held:
        """From bool [T] of the bigrams that start at the tokens and of the trigrams around them."""
        pairs, triples = pairs[:, None] & rows.has_right, triples[:, None]
        at_start, at_end = ~rows.has_left, ~rows.has_right
        return cls(pairs, triples | (at_start & pairs) | (at_end & pairs.roll(1, 0)))

    @classmethod
    def everything(cls, rows: StudyRows) -> Held:
        """As if the table held all n-grams."""
        return cls.of(rows, rows.has_right[:, 0], torch.ones_like(rows.has_right[:, 0]))

    @property
    def pairs_before(self) -> Tensor:
        """The bigram that ends at the token."""
        return self.pairs.roll(1, 0)


@dataclass(frozen=True)
class PairSides:
    """What stands for the token in its left and its right bigram, float32 [T, H] each."""

    left: Tensor
    right: Tensor


def pair_sides(rows: StudyRows) -> PairSides:
    """The exact ones; undefined where the text has no such neighbor."""
    return PairSides(rows.pair.slot(1, -1), rows.pair.slot(0))


def own_rows(rows: StudyRows) -> PairSides:
    """A stand-in that is none: the token's row alone, so that the bracket of a missing bigram is zero."""
    alone = rows.first.slot(0)
    return PairSides(alone, alone)


def masked_sides(rows: StudyRows) -> PairSides:
    """The token's states beside the placeholder: some neighbor is there, only which is unknown."""
    return PairSides(rows.masked_left.slot(1), rows.masked_right.slot(0))


def merge_pairs(rows: StudyRows, held: Held, stand_ins: PairSides) -> Tensor:
    """The merge of width 2, with ``stand_ins`` in the place of missing bigrams."""
    alone, exact = rows.first.slot(0), pair_sides(rows)
    left = torch.where(held.pairs_before, exact.left, stand_ins.left)
    right = torch.where(held.pairs, exact.right, stand_ins.right)
    left = torch.where(rows.has_left, left, alone)
    right = torch.where(rows.has_right, right, alone)
    return left + right - alone


def unigram_unless_both(rows: StudyRows, held: Held) -> Tensor:
    """The merge of width 2 where every neighbor's bigram is held, else the unigram row alone."""
    complete = (held.pairs_before | ~rows.has_left) & (held.pairs | ~rows.has_right)
    return torch.where(complete, merge_pairs(rows, held, own_rows(rows)), rows.first.slot(0))


def mean_sides(texts: StudyTexts, rows: StudyRows) -> PairSides:
    """What neighbors do to the token on average over the training texts: one more row a token and side.

    A token of a training text does not count itself. Tokens seen seldom lean on the mean over all tokens.
    """
    alone, exact = rows.first.slot(0), pair_sides(rows)
    return PairSides(
        alone + _mean_change(texts, rows.has_left[:, 0], exact.left - alone),
        alone + _mean_change(texts, rows.has_right[:, 0], exact.right - alone),
    )


def _mean_change(texts: StudyTexts, has_neighbor: Tensor, changes: Tensor) -> Tensor:
    """Mean of ``changes`` [T, H] by token over the training texts; one pseudo-count of the mean of all."""
    counted = (texts.tokens_in_training & has_neighbor).float()[:, None]
    distinct, place = torch.unique(texts.sequences.input_ids, return_inverse=True)
    sums = torch.zeros(len(distinct), changes.shape[1]).index_add_(0, place, changes * counted)
    counts = torch.zeros(len(distinct), 1).index_add_(0, place, counted)
    overall = sums.sum(0) / counts.sum()
    return (sums[place] - changes * counted + overall) / (counts[place] - counted + 1)


def learned_sides(
    texts: StudyTexts, rows: StudyRows, fit: Callable[[list[Tensor], Tensor], Affine]
) -> PairSides:
    """Stand-ins by least squares from the unigram rows of the token and of its neighbor.

    Fitted where training texts miss the bigram: those are rarer, so other, than the ones found.
    """
    alone, exact, missing = rows.first.slot(0), pair_sides(rows), ~texts.pairs.held()
    before = rows.first.slot(0, -1)
    left_missing = texts.tokens_in_training & rows.has_left[:, 0] & missing.roll(1)
    left = fit([alone[left_missing], before[left_missing]], exact.left[left_missing])(alone, before)
    after = rows.first.slot(0, 1)
    right_missing = texts.tokens_in_training & rows.has_right[:, 0] & missing
    right = fit([alone[right_missing], after[right_missing]], exact.right[right_missing])(alone, after)
    return PairSides(left, right)


@dataclass(frozen=True)
class Singles:
    """What a table of width 3 has for a token alone, float32 [T, H] by the token's slot in the window."""

    first: Tensor
    middle: Tensor
    last: Tensor


def zero_outer_singles(rows: StudyRows) -> Singles:
    """The unigram row in the middle; a missing window adds nothing to its neighbors' tokens."""
    alone = rows.middle.slot(1)
    nothing = torch.zeros_like(alone)
    return Singles(nothing, alone, nothing)


def unigram_singles(rows: StudyRows) -> Singles:
    """The unigram row in every slot."""
    alone = rows.middle.slot(1)
    return Singles(alone, alone, alone)


def masked_singles(rows: StudyRows) -> Singles:
    """The token's states in windows whose other places hold the placeholder: three rows a token."""
    return Singles(rows.masked_after.slot(0), rows.masked_around.slot(1), rows.masked_before.slot(2))


@dataclass(frozen=True)
class Doubles:
    """The token's states in bigrams of a table of width 3, float32 [T, H] each, in the middle or outside.

    Attributes:
        left: at slot 1, with the token before at slot 0.
        right: at slot 1, with the token after at slot 2.
        first: at slot 0, with the token after at slot 1.
        last: at slot 2, with the token before at slot 1.
    """

    left: Tensor
    right: Tensor
    first: Tensor
    last: Tensor


def absent_doubles(rows: StudyRows) -> Doubles:
    """Today's: the third place is absent."""
    pair, right_pair = rows.pair, rows.right_pair
    return Doubles(pair.slot(1, -1), right_pair.slot(1), pair.slot(0), right_pair.slot(2, -1))


def masked_doubles(rows: StudyRows) -> Doubles:
    """The third place holds the placeholder."""
    pair, right_pair = rows.pair_masked, rows.masked_pair
    return Doubles(pair.slot(1, -1), right_pair.slot(1), pair.slot(0), right_pair.slot(2, -1))


@dataclass(frozen=True)
class CenterParts:
    """What a missing trigram's own token can be composed of, float32 [T, H] each.

    Attributes:
        left: its state in the bigram with the token before.
        right: and with the token after.
        alone: with neither.
        left_is_frequent: bool [T, 1], whether the left bigram is at least as frequent as the right one.
    """

    left: Tensor
    right: Tensor
    alone: Tensor
    left_is_frequent: Tensor


Center = Callable[[CenterParts], Tensor]

CENTERS: dict[str, Center] = {
    "additive": lambda parts: parts.left + parts.right - parts.alone,
    "more frequent bigram": lambda parts: torch.where(parts.left_is_frequent, parts.left, parts.right),
    "left bigram": lambda parts: parts.left,
    "average of both": lambda parts: (parts.left + parts.right) / 2,
}
"""How both bigrams of a missing trigram are made into one state of its own token."""


def center_parts(texts: StudyTexts, doubles: Doubles, alone: Tensor) -> CenterParts:
    """All parts, as if every bigram were held; ``alone`` float32 [T, H]."""
    left_is_frequent = texts.pairs.counts.roll(1) >= texts.pairs.counts
    return CenterParts(doubles.left, doubles.right, alone, left_is_frequent[:, None])


def learned_center(
    texts: StudyTexts, rows: StudyRows, fit: Callable[[list[Tensor], Tensor], Affine]
) -> Center:
    """Least squares from (left, right, alone), on training texts where the trigram misses alone."""
    parts = center_parts(texts, absent_doubles(rows), rows.middle.slot(1))
    pairs = texts.pairs.held()
    used = texts.tokens_in_training & ~texts.triples.held() & pairs & pairs.roll(1)
    used &= (rows.has_left & rows.has_right)[:, 0]
    features = [parts.left[used], parts.right[used], parts.alone[used]]
    affine = fit(features, rows.triple.slot(1)[used])
    return lambda parts: affine(parts.left, parts.right, parts.alone)


def merge_triples(
    texts: StudyTexts, rows: StudyRows, held: Held, center: Center, doubles: Doubles, singles: Singles
) -> Tensor:
    """The merge of width 3: a missing trigram from ``doubles``, a missing bigram from ``singles``."""
    parts = center_parts(texts, doubles, singles.middle)
    has_before, has_after = rows.has_left & held.pairs_before, rows.has_right & held.pairs
    composed = torch.where(has_before, parts.left, torch.where(has_after, parts.right, parts.alone))
    composed = torch.where(has_before & has_after, center(parts), composed)
    result = torch.where(held.triples, rows.triple.slot(1), composed)
    from_left = torch.where(held.pairs_before, doubles.last, singles.last)
    from_left = torch.where(held.triples.roll(1, 0), rows.triple.slot(2, -1), from_left)
    from_right = torch.where(held.pairs, doubles.first, singles.first)
    from_right = torch.where(held.triples.roll(-1, 0), rows.triple.slot(0, 1), from_right)
    return result + from_left * rows.has_left + from_right * rows.has_right


def corrected(
    rows: StudyRows, merged: Tensor, triples: Tensor, *, slots: Literal["own token", "all three"]
) -> Tensor:
    """A merge of width 2, corrected where the trigram around a token is held (``triples`` bool [T]).

    A correction is the trigram window's state less what bigrams alone make of the same three tokens: of the
    middle token (H values a trigram), or of all three (3 H values).
    """
    sides, alone = pair_sides(rows), rows.first.slot(0)
    inside = rows.has_left & rows.has_right & triples[:, None]
    result = merged + inside * (rows.triple.slot(1) - (sides.left + sides.right - alone))
    if slots == "all three":
        result += rows.has_left * inside.roll(1, 0) * (rows.triple.slot(2, -1) - sides.left)
        result += rows.has_right * inside.roll(-1, 0) * (rows.triple.slot(0, 1) - sides.right)
    return result
