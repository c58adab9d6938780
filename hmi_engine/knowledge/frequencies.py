"""How often a domain's n-grams occur: in its corpora, and in the traffic since, which counts for more.

Forward decay (Cormode, Shkapenyuk, Srivastava, Xu: "Forward Decay: A Practical Time Decay Model for Streaming
Systems", ICDE 2009): instead of shrinking all old counts as time passes, a new occurrence weighs more than an
older one. Only ratios matter, so the decay is exact, old counts are never touched, and counts stay integers.
Time is the number of tokens of the domain's traffic: a domain that nobody asks forgets nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["DEFAULT_HALF_LIFE_TOKENS", "Frequencies", "sum_counts"]

DEFAULT_HALF_LIFE_TOKENS = 10_000_000
"""After so many tokens of traffic, what was counted before weighs half of what is counted now."""

_LARGEST_WEIGHT = float(1 << 16)
_RESCALE_BITS = 8


@dataclass(frozen=True, eq=False)
class Frequencies:
    """N-grams and their weighted counts.

    Attributes:
        keys: int64 [N], ascending and distinct.
        counts: int64 [N], positive.
        total: weight of all occurrences that were ever counted, also of n-grams that are not kept.
        corpus_weight: the most that one occurrence in a corpus adds to a count.
        occurrence_weight: what one occurrence of traffic adds to a count now. It doubles with every half-life
            of traffic; when it gets large, all counts are scaled down, and what is then below 1 is forgotten.
    """

    keys: Tensor
    counts: Tensor
    total: float = 0.0
    corpus_weight: float = 1.0
    occurrence_weight: float = 1.0

    def __len__(self) -> int:
        """Return the number of n-grams."""
        return len(self.keys)

    @classmethod
    def none(cls) -> Frequencies:
        """Return the frequencies of a domain that has seen nothing."""
        empty = torch.empty(0, dtype=torch.int64)
        return cls(empty, empty)

    def with_corpus(self, keys: Tensor, counts: Tensor, *, occurrences: int) -> Frequencies:
        """Return the frequencies with the n-grams of more text, which weigh like traffic of now.

        ``keys`` and ``counts`` are int64 [M]; keys are distinct, in any order. ``occurrences`` counts all
        n-grams of the text.
        """
        weight = self.occurrence_weight
        weighted = (counts.double() * weight).round().long()
        summed = sum_counts([(self.keys, self.counts), (keys, weighted)])
        total = self.total + occurrences * weight
        return replace(self, keys=summed[0], counts=summed[1], total=total, corpus_weight=weight)

    def with_traffic(
        self,
        keys: Tensor,
        weights: Tensor,
        *,
        tokens: int,
        occurrences: float,
        half_life_tokens: float = DEFAULT_HALF_LIFE_TOKENS,
    ) -> Frequencies:
        """Return the frequencies after ``tokens`` tokens of traffic, which count as if all came at their end.

        Args:
            keys: int64 [M], distinct, in any order.
            weights: float64 [M], occurrences; fractions come from sampling.
            tokens: how far the clock goes on.
            occurrences: of all n-grams in the traffic.
            half_life_tokens: tokens after which an occurrence weighs half.

        Raises:
            ValueError: the half-life is not positive, or ``tokens`` is negative.
        """
        if not half_life_tokens > 0 or tokens < 0:
            raise ValueError(
                f"half_life_tokens is {half_life_tokens}, must be positive; tokens is {tokens}, must not be "
                "negative"
            )
        # After 40 doublings nothing older is of any weight. Scaled down before the new counts are weighted: a
        # weight of many doublings times a count would not fit into int64.
        doublings = min(tokens / half_life_tokens, 40.0)
        grown = replace(self, occurrence_weight=self.occurrence_weight * math.exp2(doublings))._rescaled()
        weight = grown.occurrence_weight
        counted = (weights.double() * weight).round().long()
        summed = sum_counts([(grown.keys, grown.counts), (keys, counted)])
        return replace(grown, keys=summed[0], counts=summed[1], total=grown.total + occurrences * weight)

    def _rescaled(self) -> Frequencies:
        current = self
        while current.occurrence_weight > _LARGEST_WEIGHT:
            counts = current.counts >> _RESCALE_BITS
            kept = counts > 0
            current = Frequencies(
                current.keys[kept],
                counts[kept],
                current.total / (1 << _RESCALE_BITS),
                current.corpus_weight / (1 << _RESCALE_BITS),
                current.occurrence_weight / (1 << _RESCALE_BITS),
            )
        return current

    def most_frequent(self, num_items: int) -> Frequencies:
        """Return at most ``num_items`` of the n-grams, those with the largest counts (equal ones by key)."""
        if len(self) <= num_items:
            return self
        order = self.counts.argsort(descending=True, stable=True)[:num_items].sort().values
        return replace(self, keys=self.keys[order], counts=self.counts[order])

    def counts_of(self, keys: Tensor) -> Tensor:
        """Return int64 like ``keys``: the count of each, 0 where it has none."""
        if not len(self):
            return torch.zeros_like(keys)
        places = torch.searchsorted(self.keys, keys).clamp_(max=len(self) - 1)
        return torch.where(self.keys[places] == keys, self.counts[places], 0)


def sum_counts(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the distinct keys of all parts, ascending, and their summed counts (int64), none of them 0."""
    keys = torch.cat([part for part, _ in parts])
    counts = torch.cat([part for _, part in parts])
    distinct, members = torch.unique(keys, return_inverse=True)
    summed = torch.zeros(len(distinct), dtype=torch.int64).index_add_(0, members, counts)
    kept = summed > 0
    return distinct[kept], summed[kept]
