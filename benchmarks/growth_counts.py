"""How much of held-out text a growing corpus holds, and how much of it a table of a byte budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hmi_kernels
from benchmarks.growth_texts import Mixture, TokenizedTexts
from hmi_engine.knowledge.selection import Selection, bytes_per_row, select_rows

__all__ = ["MIN_COUNT", "Counts", "Growth", "Wanted", "chain_shares", "grow", "table_shares"]

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

    def share_of_tables(self, tables: Sequence[Selection]) -> float:
        """Share of the occurrences whose n-gram has a row in one of the tables."""
        return self.share(torch.isin(self.occurrences.keys, torch.cat([table.keys for table in tables])))


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
    corpus: Counts, wanted: Wanted, budgets: Sequence[int], *, order: int, hidden_size: int
) -> tuple[float, ...]:
    """Share of held-out n-grams with a row, for tables of so many bytes of float16 rows."""
    row_bytes = bytes_per_row(order, hidden_size, "float16")
    return tuple(wanted.share_of_tables([_select(corpus, budget, row_bytes)]) for budget in budgets)


def chain_shares(
    ancestor: Counts, domain: Counts, wanted: Wanted, budgets: Sequence[int], *, order: int, hidden_size: int
) -> tuple[float, ...]:
    """The same for two tables of half the bytes each; the domain's holds nothing that its ancestor's does."""
    row_bytes = bytes_per_row(order, hidden_size, "float16")
    shares = []
    for budget in budgets:
        above = _select(ancestor, budget // 2, row_bytes)
        below = _select(domain, budget // 2, row_bytes, above=above)
        shares.append(wanted.share_of_tables([above, below]))
    return tuple(shares)


def _select(corpus: Counts, budget: int, row_bytes: int, *, above: Selection | None = None) -> Selection:
    return select_rows(
        corpus.keys,
        corpus.counts,
        budget_bytes=budget,
        bytes_per_row=row_bytes,
        min_count=MIN_COUNT,
        exclude=() if above is None else (hmi_kernels.plot_index_build(above.keys),),
    )
