"""Rows as a text would find them had its own fold not been in the corpus (cross-fitting).

A domain's table is often built from text that includes the training examples. Looked up plainly, such a text
finds the rows that it helped to admit, far more than a new text finds in service, and the tenant learns to
rely on them. So the examples are split into folds, and a row counts as missing for a text of a fold if the
table would lack it without that fold's texts.

A table knows whole documents only: text that its corpus holds cut in another way is looked up plainly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

import hmi_kernels
from hmi_engine.knowledge.plot_table import PlotTable
from hmi_engine.memory.plot_view import PlotView
from hmi_engine.models.packing import PackedSequences, window_tokens

__all__ = ["CrossFitter", "HitRates", "count_hits"]

MISSING = -1


class HitRates(BaseModel):
    """Share of window positions whose whole n-gram has a row: as looked up, and after cross-fitting.

    ``texts_in_corpus`` is how many of the texts are documents of the corpus of the domain or of an ancestor;
    only those are cross-fitted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    looked_up: float
    cross_fitted: float
    texts_in_corpus: int


@dataclass(frozen=True)
class _TableCounts:
    """What the examples contributed to one table of the domain's chain.

    ``contained`` bool [S]: the texts in its corpus. ``keys``/``counts``: for each fold, the n-grams of those
    of its texts, sorted by key.
    """

    table: PlotTable
    contained: Tensor
    keys: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]


class CrossFitter:
    """Looks texts up as if each one's fold had not been in the corpus of the domain and its ancestors."""

    def __init__(
        self,
        plots: PlotView,
        domain: str,
        texts: Sequence[str],
        token_ids: Sequence[list[int]],
        *,
        window: int,
        folds: int,
    ) -> None:
        """Counts what each fold contributed to each table.

        Args:
            plots: a lease on the tables of ``domain``.
            domain: whose chain of tables is searched.
            texts: S texts; folds are blocks of neighbours.
            token_ids: their tokens as the corpus' were counted, not cut shorter.
            window: width of the store's windows.
            folds: number of blocks.
        """
        self._plots, self._domain, self._window = plots, domain, window
        self._fold_of_text = torch.arange(len(texts)) * folds // max(1, len(texts))
        tables = [plots.table(name) for name in plots.ancestors(domain)]
        self._tables = [self._count(table, texts, token_ids, folds) for table in tables if table is not None]

    def _count(
        self, table: PlotTable, texts: Sequence[str], token_ids: Sequence[list[int]], folds: int
    ) -> _TableCounts:
        contained = table.contains_document(texts)
        counted = []
        for fold in range(folds):
            members = (contained & (self._fold_of_text == fold)).nonzero()[:, 0].tolist()
            once = {texts[member]: token_ids[member] for member in members}
            counted.append(_count_windows(list(once.values()), self._window))
        keys, counts = zip(*counted, strict=True)
        return _TableCounts(table, contained, keys, counts)

    @property
    def texts_in_corpus(self) -> int:
        """How many of the texts are in the corpus of at least one table."""
        contained = [counts.contained for counts in self._tables]
        return int(torch.stack(contained).any(0).sum()) if contained else 0

    def lookup(self, sequences: PackedSequences, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """References of packed texts, plain and cross-fitted.

        Args:
            sequences: some of the texts, possibly cut to fewer tokens.
            numbers: for each sequence, which of the constructor's texts it is.

        Returns:
            Two int64 [T, 1] or [T, 3], as ``hmi_kernels.plot_lookup`` describes them: what the tables hold,
            and what they would hold without the texts' own folds.
        """
        domains = [self._domain] * sequences.num_sequences
        plain = self._plots.lookup(sequences, domains)
        lengths = torch.tensor(sequences.lengths)
        text_of_token = torch.repeat_interleave(torch.tensor(numbers, dtype=torch.int64), lengths)
        references = self._without_own_fold(plain, text_of_token)
        if self._window == 3:
            newly_missing = ((plain[:, 0] >= 0) & (references[:, 0] < 0)).nonzero()[:, 0]
            if len(newly_missing):
                bigrams = self._bigram_references(window_tokens(sequences, 3)[newly_missing])
                references[newly_missing, 1:] = self._without_own_fold(bigrams, text_of_token[newly_missing])
        return plain, references

    def _without_own_fold(self, references: Tensor, text_of_token: Tensor) -> Tensor:
        """references [M, C] of tokens of the texts [M], with the rows that depend on the own fold missing."""
        result = references.clone()
        keys = self._plots.row_keys(references)
        result[keys == 0] = MISSING  # computed in traffic, not in any table
        counts = self._plots.row_counts(references)
        texts = text_of_token[:, None].expand_as(references)
        unowned = keys != 0
        for contribution in self._tables:
            owned = unowned.clone()
            owned[unowned] = hmi_kernels.plot_index_find(contribution.table.index, keys[unowned]) >= 0
            unowned &= ~owned
            own = torch.zeros_like(counts)
            for fold, (fold_keys, fold_counts) in enumerate(
                zip(contribution.keys, contribution.counts, strict=True)
            ):
                chosen = owned & contribution.contained[texts] & (self._fold_of_text[texts] == fold)
                own[chosen] = _look_up(_canonical(keys[chosen]), fold_keys, fold_counts)
            metadata = contribution.table.metadata
            # In the units of the counts: text that was counted after traffic weighs more than one.
            rest_is_too_rare = counts - own * metadata.corpus_weight < metadata.admission_count
            result[owned & (own > 0) & rest_is_too_rare] = MISSING
        return result

    def _bigram_references(self, windows: Tensor) -> Tensor:
        """References [M, 2] of the left and right bigrams of trigram windows int32 [M, 3], -1 where absent.

        ``plot_lookup`` leaves them out where it found the trigram. In a sequence of just two tokens the first
        one's window is a right bigram, and the second one's a left bigram.
        """
        result = torch.full((len(windows), 2), MISSING)
        for column, (first, slot) in enumerate([(0, 1), (1, 0)]):
            pairs = windows[:, first : first + 2]
            complete = (pairs >= 0).all(1).nonzero()[:, 0]
            if len(complete):
                sequences = PackedSequences.pack(pairs[complete].tolist())
                found = self._plots.lookup(sequences, [self._domain] * len(complete))
                result[complete, column] = found[slot::2, 0]
        return result


def count_hits(
    plain: Tensor, cross_fitted: Tensor, sequences: PackedSequences, window: int
) -> tuple[int, int, int]:
    """Hits as looked up, hits after cross-fitting, and positions that have a window at all."""
    has_window = torch.ones(sequences.num_tokens, dtype=torch.bool)
    if window == 2:
        has_window[sequences.offsets[1:] - 1] = False
    hits = [int((references[has_window, 0] >= 0).sum()) for references in (plain, cross_fitted)]
    return hits[0], hits[1], int(has_window.sum())


def _count_windows(token_ids: list[list[int]], window: int) -> tuple[Tensor, Tensor]:
    """N-grams of 2 (and 3) tokens, which no key confuses, sorted by key, and their counts."""
    if not token_ids:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    sequences = PackedSequences.pack(token_ids)
    counted = [
        hmi_kernels.count_ngrams(sequences.input_ids, sequences.offsets, order=order)
        for order in range(2, window + 1)
    ]
    keys, counts = (torch.cat(parts) for parts in zip(*counted, strict=True))
    keys, order = keys.sort()
    return keys, counts[order]


def _canonical(keys: Tensor) -> Tensor:
    """Keys of bigrams at a window's slots 1 and 2 as they are at slots 0 and 1, where they are counted."""
    tokens = hmi_kernels.ngram_tokens(keys)
    shifted = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1)
    return hmi_kernels.ngram_keys(torch.where(tokens[:, :1] < 0, shifted, tokens))


def _look_up(keys: Tensor, sorted_keys: Tensor, counts: Tensor) -> Tensor:
    """Counts of ``keys`` among ``sorted_keys``, 0 where absent."""
    if not len(sorted_keys):
        return torch.zeros_like(keys)
    places = torch.searchsorted(sorted_keys, keys).clamp_(max=len(sorted_keys) - 1)
    return torch.where(sorted_keys[places] == keys, counts[places], 0)
