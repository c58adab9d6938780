"""Which n-grams a table gets: the most frequent within a budget, none that an ancestor has already.

Why the most frequent are the best set, and when uni-, bi- and trigrams compete: docs/coverage.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.knowledge.row_formats import RowFormat, stored_row_bytes

__all__ = ["Selection", "bytes_per_row", "select_rows", "table_bytes"]

_INDEX_ENTRY_BYTES = 16  # key and row
_KEY_AND_COUNT_BYTES = 16
_MIN_INDEX_BYTES_PER_ROW = 2 * _INDEX_ENTRY_BYTES


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen n-grams, most frequent first (equal counts by key): ``keys`` and ``counts`` int64 [N].

    ``admission_count`` is the least count among them, 0 if there is none. ``hit_mass`` and ``inherited_mass``
    are the shares of all n-gram occurrences in the corpus that the chosen ones, and those left to ancestors,
    account for.
    """

    keys: Tensor
    counts: Tensor
    admission_count: int
    hit_mass: float
    inherited_mass: float


def bytes_per_row(window: int, hidden_size: int, row_format: RowFormat) -> int:
    """Return what one n-gram takes in a file: its row, key and count, and two index entries."""
    row_bytes = stored_row_bytes(row_format, window, hidden_size)
    return row_bytes + _KEY_AND_COUNT_BYTES + _MIN_INDEX_BYTES_PER_ROW


def table_bytes(num_rows: int, row_bytes: int) -> int:
    """Return the bytes of a table of ``num_rows``, where ``row_bytes`` is from :func:`bytes_per_row`.

    The index has a power of two of entries, at most half of them used: 2 to 4 for each row.
    """
    index_entries = 1 << max(2 * num_rows - 1, 0).bit_length() if num_rows else 0
    return num_rows * (row_bytes - _MIN_INDEX_BYTES_PER_ROW) + index_entries * _INDEX_ENTRY_BYTES


def select_rows(
    keys: Tensor,
    counts: Tensor,
    *,
    budget_bytes: int,
    bytes_per_row: int,
    min_count: int,
    exclude: Sequence[Tensor] = (),
    total: float | None = None,
) -> Selection:
    """Choose the most frequent n-grams whose table fits in ``budget_bytes``.

    ``keys`` (distinct) and ``counts`` are int64 [M]; ``bytes_per_row`` is from the function of that name;
    ``exclude`` are the indexes of the ancestors' tables, int64 [C, 2]. N-grams seen less often than
    ``min_count`` are left out. ``total`` is the weight of all occurrences, by default that of ``counts``.
    Deterministic, whatever the order of ``keys``. Raises ValueError for tensors that do not match.
    """
    if (
        keys.dtype != torch.int64
        or counts.dtype != torch.int64
        or keys.dim() != 1
        or keys.shape != counts.shape
    ):
        raise ValueError(
            f"keys and counts must be int64 of one shape [M], not {keys.dtype} {list(keys.shape)} "
            f"and {counts.dtype} {list(counts.shape)}"
        )
    inherited = torch.zeros(len(keys), dtype=torch.bool)
    for excluded in exclude:
        inherited |= hmi_kernels.plot_index_find(excluded, keys) >= 0
    wanted = (counts >= min_count) & ~inherited
    kept_keys, kept_counts = keys[wanted], counts[wanted]
    by_key = kept_keys.argsort()
    order = by_key[kept_counts[by_key].argsort(descending=True, stable=True)]
    order = order[: _most_rows(len(order), budget_bytes, bytes_per_row)]
    chosen_counts = kept_counts[order]
    total = max(total or float(counts.sum()), 1.0)
    return Selection(
        keys=kept_keys[order],
        counts=chosen_counts,
        admission_count=int(chosen_counts[-1]) if len(order) else 0,
        hit_mass=int(chosen_counts.sum()) / total,
        inherited_mass=int(counts[inherited].sum()) / total,
    )


def _most_rows(available: int, budget_bytes: int, row_bytes: int) -> int:
    """Return the largest number of rows, at most ``available``, whose table fits in the budget."""
    fits, too_many = 0, available + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if table_bytes(middle, row_bytes) <= budget_bytes:
            fits = middle
        else:
            too_many = middle
    return fits
