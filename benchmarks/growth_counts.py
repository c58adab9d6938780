"""How much of held-out text a growing corpus holds, and how much of it a table of a byte budget."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hmi_kernels
from benchmarks.growth_texts import Mixture, TokenizedTexts
from hmi_engine.knowledge.selection import bytes_per_row, table_bytes

__all__ = ["MIN_COUNT", "Counts", "Growth", "Ranking", "Wanted", "chain_shares", "grow", "table_shares"]

MIN_COUNT = 2
"""How often a corpus must hold an n-gram before a table may have a row for it, as a store asks by default."""

_STRETCH = 1 << 22
"""Tokens counted by one call: few enough that a call's own memory is small beside the counts."""


@dataclass(frozen=True, eq=False)
class Counts:
    """n-grams and how often they occur: ``keys`` int64 [N], ascending and distinct; ``counts`` int64 [N]."""

    keys: Tensor
    counts: Tensor

    @classmethod
    def of(cls, texts: TokenizedTexts, order: int) -> Counts:
        """Counts the n-grams of ``order`` tokens."""
        return cls(*hmi_kernels.count_ngrams(texts.input_ids, texts.offsets, order=order))

    def find(self, keys: Tensor) -> Tensor:
        """How often each of ``keys`` occurs, int64, 0 for one that is not here."""
        if not len(self.keys):
            return torch.zeros_like(keys)
        places = torch.searchsorted(self.keys, keys).clamp_(max=len(self.keys) - 1)
        return torch.where(self.keys[places] == keys, self.counts[places], 0)


@dataclass(frozen=True, eq=False)
class Wanted:
    """The n-grams of a held-out text, and how often a training split that is always there holds each."""

    occurrences: Counts
    in_training: Tensor

    @classmethod
    def of(cls, held_out: TokenizedTexts, order: int, training: TokenizedTexts | None = None) -> Wanted:
        """Those of ``order`` tokens."""
        occurrences = Counts.of(held_out, order)
        if training is None:
            return cls(occurrences, torch.zeros_like(occurrences.counts))
        return cls(occurrences, Counts.of(training, order).find(occurrences.keys))

    def share(self, found: Tensor) -> float:
        """Share of all occurrences that those marked in ``found``, bool [N], account for."""
        return float(self.occurrences.counts[found].sum() / self.occurrences.counts.sum())

    def share_of_corpus(self, corpus: Counts | None, min_count: int = MIN_COUNT) -> float:
        """Share of the occurrences whose n-gram training split and corpus hold ``min_count`` times."""
        held = self.in_training if corpus is None else self.in_training + corpus.find(self.occurrences.keys)
        return self.share(held >= min_count)


@dataclass(frozen=True, eq=False)
class Ranking:
    """The order in which n-grams get rows: a table of N rows holds those of the ranks 0 to N-1.

    Attributes:
        keys: int64 [M], ascending: those seen at least ``MIN_COUNT`` times.
        ranks: int64 [M]; the more frequent first, of equal ones the smaller key first, as a store selects.
    """

    keys: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, corpus: Counts) -> Ranking:
        """Ranks what a corpus holds."""
        often = corpus.counts >= MIN_COUNT
        keys, order = corpus.keys[often], corpus.counts[often].argsort(descending=True, stable=True)
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order))
        return cls(keys, ranks)

    def find(self, keys: Tensor) -> Tensor:
        """The rank of each of ``keys``, int64; M for one that has none."""
        missing = len(self.keys)
        return missing - Counts(self.keys, missing - self.ranks).find(keys)

    def by_rank(self) -> Tensor:
        """``keys`` in the order of their ranks."""
        return self.keys[self.ranks.argsort()]


@dataclass(frozen=True, eq=False)
class Growth:
    """What a growing corpus holds.

    Attributes:
        shares: for each held-out text its share found, one figure for each size.
        whole: counts of the whole corpus, those of at least ``MIN_COUNT``.
    """

    shares: dict[str, tuple[float, ...]]
    whole: Counts


def grow(mixture: Mixture, order: int, sizes: Sequence[int], wanted: Mapping[str, Wanted]) -> Growth:
    """Counts ``mixture`` from its start and looks at held-out texts at each of the ascending ``sizes``."""
    counter = hmi_kernels.NgramCounter(order)
    shares: dict[str, list[float]] = {name: [] for name in wanted}
    counted = 0
    for size in sizes:
        _count(counter, mixture, counted, size)
        counted = size
        corpus = Counts(*counter.items())
        for name, target in wanted.items():
            shares[name].append(target.share_of_corpus(corpus))
    _count(counter, mixture, counted, mixture.num_tokens)
    return Growth({name: tuple(values) for name, values in shares.items()}, Counts(*counter.items(MIN_COUNT)))


def _count(counter: hmi_kernels.NgramCounter, mixture: Mixture, start: int, stop: int) -> None:
    for begin in range(start, stop, _STRETCH):
        for texts in mixture.between(begin, min(begin + _STRETCH, stop)):
            counter.add(texts.input_ids, texts.offsets)


def table_shares(
    corpus: Ranking, wanted: Wanted, budgets: Sequence[int], *, order: int, hidden_size: int
) -> tuple[float, ...]:
    """Share of held-out n-grams with a row, for tables of so many bytes of float16 rows."""
    rank = corpus.find(wanted.occurrences.keys)
    rows = [_num_rows(budget, len(corpus.keys), order, hidden_size) for budget in budgets]
    return tuple(wanted.share(rank < count) for count in rows)


def chain_shares(
    ancestor: Ranking,
    domain: Ranking,
    wanted: Wanted,
    budgets: Sequence[int],
    *,
    order: int,
    hidden_size: int,
) -> tuple[float, ...]:
    """The same for two tables of half the bytes each; the domain's holds nothing that its ancestor's does."""
    above, below = (ranking.find(wanted.occurrences.keys) for ranking in (ancestor, domain))
    is_known = below < len(domain.keys)
    rank_above = ancestor.find(domain.by_rank())
    shares = []
    for budget in budgets:
        rows = _num_rows(budget // 2, len(ancestor.keys), order, hidden_size)
        own_rows = _num_rows(budget // 2, len(domain.keys), order, hidden_size)
        is_left = rank_above >= rows
        has_own_row = is_left & (is_left.cumsum(0) <= own_rows)
        found = above < rows
        found[is_known] |= has_own_row[below[is_known]]
        shares.append(wanted.share(found))
    return tuple(shares)


def _num_rows(budget: int, available: int, order: int, hidden_size: int) -> int:
    """The most rows, at most ``available``, whose table fits in ``budget`` bytes."""
    row_bytes = bytes_per_row(order, hidden_size, "float16")
    return bisect_right(range(available + 1), budget, key=lambda rows: table_bytes(rows, row_bytes)) - 1
