"""Other ways to count the bigrams and trigrams of token sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import duckdb
import torch

import hmi_kernels
from hmi_engine.models.packing import PackedSequences

__all__ = ["DuckDbCounts", "count_with_counter", "count_with_hmi", "count_with_torch"]

Totals = list[tuple[int, int]]
"""Of bigrams, then trigrams: how many distinct ones, and the sum of the squares of their counts."""

_ORDERS = (2, 3)


def count_with_hmi(sequences: PackedSequences) -> Totals:
    """The n-gram counter of HMI, to sorted keys and counts."""
    totals = []
    for order in _ORDERS:
        counter = hmi_kernels.NgramCounter(order)
        counter.add(sequences.input_ids, sequences.offsets)
        keys, counts = counter.items()
        totals.append((len(keys), int(counts.square().sum())))
    return totals


def count_with_counter(sequences: Sequence[list[int]]) -> Totals:
    """``collections.Counter`` of tuples."""
    bigrams: Counter[tuple[int, ...]] = Counter()
    trigrams: Counter[tuple[int, ...]] = Counter()
    for ids in sequences:
        bigrams.update(pairwise(ids))
        trigrams.update(zip(ids, ids[1:], ids[2:], strict=False))
    return [(len(counts), sum(count * count for count in counts.values())) for counts in (bigrams, trigrams)]


def count_with_torch(sequences: PackedSequences) -> Totals:
    """``torch.unique`` of keys made by tensor arithmetic: the reference of HMI's own op."""
    totals = []
    for order in _ORDERS:
        with hmi_kernels.use_backend("reference"):
            keys, counts = hmi_kernels.count_ngrams(sequences.input_ids, sequences.offsets, order=order)
        totals.append((len(keys), int(counts.square().sum())))
    return totals


class DuckDbCounts:
    """DuckDB alone: token lists in a table, unnested to n-grams and grouped."""

    def __init__(self, sequences: PackedSequences) -> None:
        """Loads the tokens, which nobody times."""
        lengths = torch.tensor(sequences.lengths)
        tokens = {
            "id": sequences.input_ids.numpy(),
            "place": torch.arange(sequences.num_tokens).numpy(),
            "sequence": torch.repeat_interleave(torch.arange(len(lengths)), lengths).numpy(),
        }
        self._connection = duckdb.connect(config={"threads": str(torch.get_num_threads())})
        self._connection.execute("SET enable_progress_bar = false")
        self._connection.register("tokens", tokens)
        self._connection.execute(
            "CREATE TABLE texts AS SELECT list(id ORDER BY place) AS ids FROM tokens GROUP BY sequence"
        )

    def run(self) -> Totals:
        """Counts; the n-grams stay in the database, where a caller would go on."""
        return [
            self._count("list_zip(ids[:-2], ids[2:], true)"),
            self._count("list_zip(ids[:-3], ids[2:-2], ids[3:], true)"),
        ]

    def _count(self, ngrams: str) -> tuple[int, int]:
        self._connection.execute(
            "CREATE OR REPLACE TEMP TABLE counted AS SELECT ngram, count(*) AS count "
            f"FROM (SELECT unnest({ngrams}) AS ngram FROM texts) GROUP BY ngram"
        )
        row = self._connection.execute("SELECT count(*), sum(count * count) FROM counted").fetchone()
        assert row is not None
        return int(row[0]), int(row[1] or 0)

    def close(self) -> None:
        """Frees the database."""
        self._connection.close()
