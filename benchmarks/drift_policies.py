"""Ways to decide which rows a table of fixed size holds while traffic goes on."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.growth_texts import TokenizedTexts
from hmi_engine.knowledge.frequencies import Frequencies
from hmi_engine.knowledge.selection import bytes_per_row, select_rows, table_bytes
from hmi_engine.memory.traffic import TrafficRecorder
from hmi_engine.models.packing import PackedSequences
from hmi_kernels import ngram_keys

__all__ = [
    "Clairvoyant",
    "LeastFrequentlyUsed",
    "LeastRecentlyUsed",
    "Period",
    "Policy",
    "Static",
    "Updated",
    "most_frequent_rows",
    "record",
]

_CANDIDATES_PER_ROW = 8
_ROW_BYTES = bytes_per_row(2, 384, "float16")  # any size: budgets are made for a number of rows
_TEXTS_PER_BATCH = 64
_DOMAIN = "drift"


@dataclass(frozen=True, eq=False)
class Period:
    """Traffic between two updates: texts, and the keys int64 of their bigram windows in order of arrival."""

    texts: TokenizedTexts
    keys: Tensor

    @classmethod
    def of(cls, texts: TokenizedTexts) -> Period:
        """Forms the keys."""
        ids = texts.input_ids
        opens = torch.ones(len(ids), dtype=torch.bool)
        opens[texts.offsets[1:] - 1] = False  # the last token of a text
        following = torch.cat([ids[1:], ids[:1]])
        return cls(texts, ngram_keys(torch.stack([ids, following], dim=1)[opens]))


class Policy(Protocol):
    """``serve`` returns how many of a period's windows were hits; ``rows_computed`` counts new rows."""

    rows_computed: int

    def serve(self, period: Period) -> int:
        """Serves a period."""


class Static:
    """The table as it was built."""

    def __init__(self, table: Tensor) -> None:
        """``table``: int64 keys."""
        self.rows_computed = 0
        self._table = table

    def serve(self, period: Period) -> int:
        """Looks up."""
        return int(torch.isin(period.keys, self._table).sum())


class LeastRecentlyUsed:
    """Computes every miss; the row that was not asked for the longest goes."""

    def __init__(self, table: Tensor) -> None:
        """``table``: int64 keys, the best last."""
        self.rows_computed = 0
        self._rows = OrderedDict.fromkeys(table.tolist())

    def serve(self, period: Period) -> int:
        """Looks up, window by window."""
        rows, misses = self._rows, 0
        for key in period.keys.tolist():
            if key in rows:
                rows.move_to_end(key)
            else:
                misses += 1
                rows.popitem(last=False)
                rows[key] = None
        self.rows_computed += misses
        return len(period.keys) - misses


class LeastFrequentlyUsed:
    """Computes every miss; the row with the fewest hits since it came goes, of equal ones the oldest hit.

    Constant time for each window: Shah, Mitra, Matani, "An O(1) algorithm for implementing the LFU cache
    eviction scheme", 2010.
    """

    def __init__(self, table: Tensor, counts: Tensor) -> None:
        """``table``: int64 keys; ``counts``: int64, how often each was asked for before."""
        self.rows_computed = 0
        self._counts: dict[int, int] = dict(zip(table.tolist(), counts.tolist(), strict=True))
        self._by_count: dict[int, OrderedDict[int, None]] = {}
        for key, count in self._counts.items():
            self._by_count.setdefault(count, OrderedDict())[key] = None
        self._least = min(self._by_count)

    def serve(self, period: Period) -> int:
        """Looks up, window by window."""
        misses = 0
        for key in period.keys.tolist():
            count = self._counts.get(key)
            if count is None:
                misses += 1
                self._evict()
                self._least = 1
            else:
                self._remove(key, count)
                if count == self._least and count not in self._by_count:
                    self._least = count + 1
            self._put(key, (count or 0) + 1)
        self.rows_computed += misses
        return len(period.keys) - misses

    def _put(self, key: int, count: int) -> None:
        self._counts[key] = count
        self._by_count.setdefault(count, OrderedDict())[key] = None

    def _remove(self, key: int, count: int) -> None:
        del self._by_count[count][key]
        if not self._by_count[count]:
            del self._by_count[count]

    def _evict(self) -> None:
        key = next(iter(self._by_count[self._least]))
        self._remove(key, self._least)
        del self._counts[key]


class Updated:
    """HMI: traffic is counted by a sketch, and after each period some rows are replaced by frequency."""

    def __init__(
        self,
        frequencies: Frequencies,
        *,
        rows: int,
        half_life_tokens: float,
        max_promotions: int | None,
    ) -> None:
        """Starts with the most frequent ``rows``; ``max_promotions`` limits each update."""
        self.rows_computed = 0
        self._rows = rows
        self._half_life_tokens = half_life_tokens
        self._max_promotions = max_promotions
        self._frequencies = frequencies
        self._table = most_frequent_rows(frequencies, rows).sort().values
        # Time stands still, so that all is counted and the result does not depend on the machine.
        self._recorder = TrafficRecorder(2, clock=lambda: 0.0)

    def serve(self, period: Period) -> int:
        """Looks up and records, then updates."""
        hits = int(torch.isin(period.keys, self._table).sum())
        record(self._recorder, period.texts)
        traffic = self._recorder.drain(_DOMAIN)
        changed = self._frequencies.with_traffic(
            traffic.keys,
            traffic.weights,
            tokens=traffic.tokens,
            occurrences=traffic.occurrences,
            half_life_tokens=self._half_life_tokens,
        )
        self._frequencies = changed.most_frequent(_CANDIDATES_PER_ROW * self._rows)
        self._update()
        return hits

    def _update(self) -> None:
        wanted = most_frequent_rows(self._frequencies, self._rows)
        promoted = wanted[~torch.isin(wanted, self._table)][: self._max_promotions]
        rank = self._frequencies.counts_of(self._table).argsort(descending=True, stable=True)
        kept = self._table[rank[: self._rows - len(promoted)]]
        self._table = torch.cat([kept, promoted]).sort().values
        self.rows_computed += len(promoted)


class Clairvoyant:
    """Knows each period's traffic before it begins and holds the best rows for it: no update does better."""

    def __init__(self, table: Tensor) -> None:
        """``table``: int64 keys of the first rows, which need not be computed."""
        self.rows_computed = 0
        self._table = table

    def serve(self, period: Period) -> int:
        """Counts."""
        keys, counts = torch.unique(period.keys, return_counts=True)
        best, order = counts.sort(descending=True, stable=True)
        chosen = keys[order[: len(self._table)]]
        self.rows_computed += int((~torch.isin(chosen, self._table)).sum())
        spare = self._table[~torch.isin(self._table, chosen)]
        self._table = torch.cat([chosen, spare])[: len(self._table)]
        return int(best[: len(self._table)].sum())


def most_frequent_rows(frequencies: Frequencies, rows: int) -> Tensor:
    """The keys of the rows that an update wants, most frequent first."""
    selection = select_rows(
        frequencies.keys,
        frequencies.counts,
        budget_bytes=table_bytes(rows, _ROW_BYTES),
        bytes_per_row=_ROW_BYTES,
        min_count=1,
    )
    return selection.keys


def record(recorder: TrafficRecorder, texts: TokenizedTexts) -> None:
    """Records in batches, as an engine does; nobody looks at the hits here."""
    for start in range(0, len(texts.offsets) - 1, _TEXTS_PER_BATCH):
        offsets = texts.offsets[start : start + _TEXTS_PER_BATCH + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        lengths = tuple(offsets.diff().tolist())
        batch = PackedSequences(texts.input_ids[first:last], offsets - first, lengths)
        recorder.record(batch, [_DOMAIN] * len(lengths), torch.zeros(last - first, dtype=torch.bool))
