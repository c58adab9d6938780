"""Whether a PLOT holds what its catalog entry says, and nothing that a lookup or an update trips over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.knowledge.plot_table import PlotTable
from hmi_engine.knowledge.records import PlotFile

__all__ = ["table_faults"]

_PIECE_ELEMENTS = 1 << 22
_OF_METADATA = ("layer_identity", "corpus_tokens", "min_count", "admission_count", "row_format")


def table_faults(file: PlotFile, table: PlotTable, *, deep: bool) -> Iterator[str]:
    """Yield what is wrong with an open table; nothing if it is sound.

    Without ``deep`` only the header is compared with the catalog's entry; with it, all contents are read up
    to the first fault: the later checks rely on what the earlier ones found sound.
    """
    difference = _find_difference(file, table)
    if difference:
        yield difference
    if deep:
        yield from islice(filter(None, (check(table) for check in _DEEP_CHECKS)), 1)


def _find_difference(file: PlotFile, table: PlotTable) -> str | None:
    found = {name: getattr(table.metadata, name) for name in _OF_METADATA}
    found |= {"rows": len(table.row_keys), "unigrams": table.unigrams is not None}
    differing = {name: value for name, value in found.items() if getattr(file, name) != value}
    if not differing:
        return None
    expected = {name: getattr(file, name) for name in differing}
    return f"holds {differing}, the catalog says {expected}"


def _index_fault(table: PlotTable) -> str | None:
    """Return what is wrong if the index does not map exactly the row keys to their rows."""
    used = table.index[table.index[:, 0] != 0]
    keys, rows = used[:, 0], used[:, 1]
    num_rows = len(table.row_keys)
    if len(keys) != num_rows:
        return f"the index has {len(keys)} n-grams, the table {num_rows} rows"
    if not torch.equal(rows.sort().values, torch.arange(num_rows)):
        return f"the index does not refer to each of the rows 0 to {num_rows - 1} once"
    if not torch.equal(table.row_keys[rows], keys):
        return "the index refers to rows of other n-grams"
    found = hmi_kernels.plot_index_find(table.index, table.row_keys)
    if not torch.equal(found, torch.arange(num_rows)):
        return "a search in the index does not find every n-gram"
    return None


def _counts_fault(table: PlotTable) -> str | None:
    for name, keys, counts in (
        ("row", table.row_keys, table.row_counts),
        ("candidate", table.candidate_keys, table.candidate_counts),
    ):
        if not _is_ascending(keys):
            return f"the {name} keys are not ascending and distinct"
        if len(counts) and int(counts.min()) <= 0:
            return f"the {name} counts are not positive"
    with_row = hmi_kernels.plot_index_find(table.index, table.candidate_keys) >= 0
    if with_row.any():
        return f"{int(with_row.sum())} candidates have a row already"
    if not _is_ascending(table.documents):
        return "the digests of the documents are not ascending and distinct"
    return None


def _is_ascending(keys: Tensor) -> bool:
    return bool((keys[1:] > keys[:-1]).all())


def _weights_fault(table: PlotTable) -> str | None:
    metadata = table.metadata
    for name in ("corpus_weight", "occurrence_weight"):
        weight = getattr(metadata, name)
        if not (math.isfinite(weight) and weight > 0):
            return f"{name} is {weight}"
    if not (math.isfinite(metadata.total_weight) and metadata.total_weight >= 0):
        return f"total_weight is {metadata.total_weight}"
    return None


def _values_fault(table: PlotTable) -> str | None:
    for name in ("rows", "row_scales", "codebooks", "unigrams"):
        tensor = getattr(table, name)
        if tensor is not None and tensor.is_floating_point() and not _is_finite(tensor):
            return f"the {name.replace('_', ' ')} hold NaN or infinity"
    return None


def _is_finite(tensor: Tensor) -> bool:
    # In pieces, as each needs temporary memory of its size.
    return all(bool(piece.isfinite().all()) for piece in tensor.view(-1).split(_PIECE_ELEMENTS))


_DEEP_CHECKS: tuple[Callable[[PlotTable], str | None], ...] = (
    _index_fault,
    _counts_fault,
    _weights_fault,
    _values_fault,
)
