"""The PLOT index: from n-gram key to row, in one tensor that a file can hold."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from hmi_kernels import reference
from hmi_kernels.checks import require_tensor, require_vector
from hmi_kernels.library import Implementation, define
from hmi_kernels.native import native

__all__ = ["plot_index_build", "plot_index_find", "plot_index_insert", "require_index"]


def plot_index_build(keys: Tensor) -> Tensor:
    """Builds the index of a table whose row i belongs to ``keys[i]``.

    The index is a hash table with open addressing and linear probing, at most half full: slots of (key, row),
    key 0 for an empty one. The home slot is the top log2(slots) bits of the mixed key, for which see
    ``reference.mix_key``. It can be stored as it is.

    Args:
        keys: int64 [n], positive and distinct.

    Returns: int64 [slots, 2], slots the smallest power of two that is at least 2 and 2n.
    Raises ValueError on a key that is not positive or comes twice.
    """
    return cast(Tensor, _plot_index_build(keys))


def plot_index_insert(index: Tensor, keys: Tensor, rows: Tensor) -> None:
    """Adds keys to an index in place; a key that is there gets the new row.

    On the backend ``cpu``, lookups may run meanwhile: they find a new key with its row, or not yet. Two
    insertions at once are the caller's to prevent.

    Args:
        index: int64 [slots, 2], as :func:`plot_index_build` makes it.
        keys: int64 [m], positive; of equal ones the last counts.
        rows: int64 [m], not negative.

    Raises ValueError, and changes nothing, if more than half of the slots would be used.
    """
    _plot_index_insert(index, keys, rows)


def plot_index_find(index: Tensor, keys: Tensor) -> Tensor:
    """Semantics: ``rows[i] = row of keys[i] in index, or -1``.

    Args:
        index: int64 [slots, 2], as :func:`plot_index_build` makes it.
        keys: int64 [m].

    Returns: int64 [m].
    """
    return cast(Tensor, _plot_index_find(index, keys))


def require_index(name: str, index: Tensor) -> None:
    """Raises TypeError or ValueError unless this can be an index: int64 [a power of two, 2]."""
    require_tensor(name, index, torch.int64, (None, 2))
    num_slots = index.shape[0]
    if num_slots < 2 or num_slots & (num_slots - 1):
        raise ValueError(f"{name} must have a power of two of slots, at least 2, not {num_slots}")


class _BuildArguments(NamedTuple):
    keys: Tensor


class _InsertArguments(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    keys: Tensor
    rows: Tensor


class _FindArguments(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    keys: Tensor


def _check_build(arguments: _BuildArguments) -> None:
    require_vector("keys", arguments.keys, torch.int64)


def _build_on_cpu(arguments: _BuildArguments) -> Tensor:
    (keys,) = arguments
    index = torch.zeros(native.plot_index_capacity(keys.shape[0]), 2, dtype=torch.int64)
    native.plot_index_build(index.data_ptr(), index.shape[0], keys.data_ptr(), keys.shape[0])
    return index


def _fake_build(arguments: _BuildArguments) -> Tensor:
    return arguments.keys.new_empty(torch.library.get_ctx().new_dynamic_size(), 2)


def _check_insert(arguments: _InsertArguments) -> None:
    require_index("index", arguments.index)
    require_vector("keys", arguments.keys, torch.int64)
    require_vector("rows", arguments.rows, torch.int64, arguments.keys.shape[0])


def _insert_on_cpu(arguments: _InsertArguments) -> None:
    index, keys, rows = arguments
    native.plot_index_insert(
        index.data_ptr(), index.shape[0], keys.data_ptr(), rows.data_ptr(), keys.shape[0]
    )


def _fake_insert(arguments: _InsertArguments) -> None:
    """The index exists; nothing is made."""


def _check_find(arguments: _FindArguments) -> None:
    require_index("index", arguments.index)
    require_vector("keys", arguments.keys, torch.int64)


def _find_on_cpu(arguments: _FindArguments) -> Tensor:
    index, keys = arguments
    rows = torch.empty_like(keys)
    native.plot_index_find(
        index.data_ptr(),
        index.shape[0],
        keys.data_ptr(),
        rows.data_ptr(),
        keys.shape[0],
        torch.get_num_threads(),
    )
    return rows


def _fake_find(arguments: _FindArguments) -> Tensor:
    return torch.empty_like(arguments.keys)


_plot_index_build = define(
    "plot_index_build(Tensor keys) -> Tensor",
    arguments=_BuildArguments,
    check=_check_build,
    implementations={"cpu": Implementation(_build_on_cpu)},
    reference=reference.plot_index_build,
    fake=_fake_build,
)
_plot_index_insert = define(
    "plot_index_insert(Tensor(a!) index, Tensor keys, Tensor rows) -> ()",
    arguments=_InsertArguments,
    check=_check_insert,
    implementations={"cpu": Implementation(_insert_on_cpu)},
    reference=reference.plot_index_insert,
    fake=_fake_insert,
)
_plot_index_find = define(
    "plot_index_find(Tensor index, Tensor keys) -> Tensor",
    arguments=_FindArguments,
    check=_check_find,
    implementations={"cpu": Implementation(_find_on_cpu)},
    reference=reference.plot_index_find,
    fake=_fake_find,
)
