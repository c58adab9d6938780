"""PLOT: the index from n-gram to row, the look-up of a batch in it, and the merge of the rows into hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from hmi_kernels import reference
from hmi_kernels.checks import FLOATS, require_one_device, require_packed, require_tensor, require_window
from hmi_kernels.library import define
from hmi_kernels.native import native

__all__ = [
    "ROW_BITS",
    "plot_index_build",
    "plot_index_find",
    "plot_index_insert",
    "plot_lookup",
    "plot_merge",
]

ROW_BITS = 40
"""A row reference is ``table << ROW_BITS | row``; -1 says that the n-gram is in no table."""


def plot_index_build(keys: Tensor) -> Tensor:
    """Builds the index of a table whose row i belongs to ``keys[i]``.

    The index is a hash table with open addressing and linear probing, at most half full: slots of (key, row), key 0
    for an empty one. The home slot is the top log2(slots) bits of the mixed key; ``csrc/common/ngram_key.h`` and
    ``reference.mix_key`` define the mixing. It can be stored as it is.

    Args:
        keys: int64 [n], positive and distinct.

    Returns: int64 [slots, 2], slots the smallest power of two that is at least 2 and 2n.
    Raises ValueError on a key that is not positive or comes twice.
    """
    return cast(Tensor, _plot_index_build(keys))


def plot_index_insert(index: Tensor, keys: Tensor, rows: Tensor) -> None:
    """Adds keys to an index in place; a key that is there gets the new row.

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


def plot_lookup(
    input_ids: Tensor, sequence_offsets: Tensor, indexes: Sequence[Tensor], chains: Tensor, *, window: int
) -> Tensor:
    """Finds the row of every window of a batch in the tables of its sequence.

    Semantics (``a, b, c = ids[t-1], ids[t], ids[t+1]``, absent outside the sequence):
    window 2: ``references[t, 0] = find(b, c)``, -1 at the last token.
    window 3: ``references[t, 0] = find(a, b, c)``; where that is -1, ``references[t, 1] = find(a, b, -)`` unless a is
    absent and ``references[t, 2] = find(-, b, c)`` unless c is; else -1.

    Args:
        input_ids: int32 [tokens], the sequences laid end to end.
        sequence_offsets: int64 [sequences + 1].
        indexes: int64 [slots, 2] each, as :func:`plot_index_build` makes them.
        chains: int32 [sequences, depth]: the indexes to search for each sequence, in order; the first hit wins, the
            first -1 ends the search.
        window: 2 or 3 tokens.

    Returns: references int64 [tokens, 1] or [tokens, 3], each ``table << ROW_BITS | row`` or -1.
    Raises TypeError or ValueError on arguments of another kind, ValueError on ids and tables that cannot be.
    """
    return cast(Tensor, _plot_lookup(input_ids, sequence_offsets, list(indexes), chains, window=window))


def plot_merge(
    input_ids: Tensor,
    sequence_offsets: Tensor,
    references: Tensor,
    row_tables: Sequence[Tensor],
    unigram_tables: Sequence[Tensor],
    sequence_unigram_tables: Tensor,
    position_embeddings: Tensor,
    layer_norm_weight: Tensor,
    layer_norm_bias: Tensor,
    *,
    layer_norm_eps: float,
    window: int,
) -> Tensor:
    """Merges the rows that :func:`plot_lookup` found into the hidden states that the upper layers start from.

    Semantics, with R(t) the row of the window at t and U the unigram row of ``input_ids[t]``:
    window 2: ``m[t] = U + (R(t-1)[1] - U) + (R(t)[0] - U)``; a bracket whose window is missing, or that reaches over
    an end of the sequence, is zero.
    window 3: ``m[t] = R(t)[1] + R(t-1)[2] + R(t+1)[0]`` inside the sequence. A missing R is composed of the bigrams of
    columns 1 and 2: slot 0 of left, slot 2 of right (zero if missing), and slot 1
    ``(left[1] or U) + (right[1] or U) - U``.
    Then ``output[t] = LayerNorm(m[t] + position_embeddings[t - start of its sequence])``.

    Args:
        input_ids: int32 [tokens].
        sequence_offsets: int64 [sequences + 1].
        references: int64 [tokens, 1] for window 2, [tokens, 3] for window 3.
        row_tables: float16 or float32 [rows, window, hidden] each; the table part of a reference counts them.
        unigram_tables: float16 or float32 [vocabulary, hidden] each.
        sequence_unigram_tables: int32 [sequences]: which of them a sequence uses.
        position_embeddings: float32 [positions, hidden].
        layer_norm_weight: float32 [hidden].
        layer_norm_bias: float32 [hidden].
        layer_norm_eps: added to the variance.
        window: 2 or 3 tokens.

    Returns: float32 [tokens, hidden].
    Raises TypeError or ValueError on arguments of another kind, ValueError on a sequence longer than there are
    positions and on rows or ids that lie outside the tables.
    """
    output = _plot_merge(
        input_ids,
        sequence_offsets,
        references,
        list(row_tables),
        list(unigram_tables),
        sequence_unigram_tables,
        position_embeddings,
        layer_norm_weight,
        layer_norm_bias,
        layer_norm_eps=layer_norm_eps,
        window=window,
    )
    return cast(Tensor, output)


def _require_index(name: str, index: Tensor) -> None:
    require_tensor(name, index, torch.int64, (None, 2))
    capacity = index.shape[0]
    if capacity < 2 or capacity & (capacity - 1):
        raise ValueError(f"{name} must have a power of two of slots, at least 2, not {capacity}")


def _check_build(keys: Tensor) -> None:
    require_tensor("keys", keys, torch.int64, (None,))


def _build_on_cpu(keys: Tensor) -> Tensor:
    count = keys.shape[0]
    index = torch.zeros(native.plot_index_capacity(count), 2, dtype=torch.int64)
    native.plot_index_build(index.data_ptr(), index.shape[0], keys.data_ptr(), count)
    return index


def _fake_build(keys: Tensor) -> Tensor:
    return keys.new_empty(torch.library.get_ctx().new_dynamic_size(), 2)


def _check_insert(index: Tensor, keys: Tensor, rows: Tensor) -> None:
    _require_index("index", index)
    require_tensor("keys", keys, torch.int64, (None,))
    require_tensor("rows", rows, torch.int64, (keys.shape[0],))
    require_one_device(index=index, keys=keys, rows=rows)


def _insert_on_cpu(index: Tensor, keys: Tensor, rows: Tensor) -> None:
    native.plot_index_insert(
        index.data_ptr(), index.shape[0], keys.data_ptr(), rows.data_ptr(), keys.shape[0]
    )


def _fake_insert(index: Tensor, keys: Tensor, rows: Tensor) -> None:
    return None


def _check_find(index: Tensor, keys: Tensor) -> None:
    _require_index("index", index)
    require_tensor("keys", keys, torch.int64, (None,))
    require_one_device(index=index, keys=keys)


def _find_on_cpu(index: Tensor, keys: Tensor) -> Tensor:
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


def _fake_find(index: Tensor, keys: Tensor) -> Tensor:
    return torch.empty_like(keys)


def _check_lookup(
    input_ids: Tensor, sequence_offsets: Tensor, indexes: list[Tensor], chains: Tensor, *, window: int
) -> None:
    require_packed(input_ids, sequence_offsets)
    for i, index in enumerate(indexes):
        _require_index(f"indexes[{i}]", index)
    require_tensor("chains", chains, torch.int32, (sequence_offsets.shape[0] - 1, None))
    require_window(window)
    require_one_device(input_ids=input_ids, sequence_offsets=sequence_offsets, indexes=indexes, chains=chains)


def _new_references(input_ids: Tensor, window: int) -> Tensor:
    return input_ids.new_empty(input_ids.shape[0], 1 if window == 2 else 3, dtype=torch.int64)


def _lookup_on_cpu(
    input_ids: Tensor, sequence_offsets: Tensor, indexes: list[Tensor], chains: Tensor, *, window: int
) -> Tensor:
    references = _new_references(input_ids, window)
    native.plot_lookup(
        input_ids.data_ptr(),
        input_ids.shape[0],
        sequence_offsets.data_ptr(),
        sequence_offsets.shape[0] - 1,
        [(index.data_ptr(), index.shape[0]) for index in indexes],
        chains.data_ptr(),
        chains.shape[1],
        window,
        references.data_ptr(),
        torch.get_num_threads(),
    )
    return references


def _fake_lookup(
    input_ids: Tensor, sequence_offsets: Tensor, indexes: list[Tensor], chains: Tensor, *, window: int
) -> Tensor:
    return _new_references(input_ids, window)


def _check_merge(
    input_ids: Tensor,
    sequence_offsets: Tensor,
    references: Tensor,
    row_tables: list[Tensor],
    unigram_tables: list[Tensor],
    sequence_unigram_tables: Tensor,
    position_embeddings: Tensor,
    layer_norm_weight: Tensor,
    layer_norm_bias: Tensor,
    *,
    layer_norm_eps: float,
    window: int,
) -> None:
    require_window(window)
    require_packed(input_ids, sequence_offsets)
    require_tensor("references", references, torch.int64, (input_ids.shape[0], 1 if window == 2 else 3))
    require_tensor("position_embeddings", position_embeddings, torch.float32, (None, None))
    hidden_size = position_embeddings.shape[1]
    if hidden_size == 0:
        raise ValueError("position_embeddings must have at least one column")
    for i, table in enumerate(row_tables):
        require_tensor(f"row_tables[{i}]", table, FLOATS, (None, window, hidden_size))
    for i, table in enumerate(unigram_tables):
        require_tensor(f"unigram_tables[{i}]", table, FLOATS, (None, hidden_size))
    num_sequences = sequence_offsets.shape[0] - 1
    require_tensor("sequence_unigram_tables", sequence_unigram_tables, torch.int32, (num_sequences,))
    require_tensor("layer_norm_weight", layer_norm_weight, torch.float32, (hidden_size,))
    require_tensor("layer_norm_bias", layer_norm_bias, torch.float32, (hidden_size,))
    require_one_device(
        input_ids=input_ids,
        sequence_offsets=sequence_offsets,
        references=references,
        row_tables=row_tables,
        unigram_tables=unigram_tables,
        sequence_unigram_tables=sequence_unigram_tables,
        position_embeddings=position_embeddings,
        layer_norm_weight=layer_norm_weight,
        layer_norm_bias=layer_norm_bias,
    )


def _merge_on_cpu(
    input_ids: Tensor,
    sequence_offsets: Tensor,
    references: Tensor,
    row_tables: list[Tensor],
    unigram_tables: list[Tensor],
    sequence_unigram_tables: Tensor,
    position_embeddings: Tensor,
    layer_norm_weight: Tensor,
    layer_norm_bias: Tensor,
    *,
    layer_norm_eps: float,
    window: int,
) -> Tensor:
    num_tokens, (num_positions, hidden_size) = input_ids.shape[0], position_embeddings.shape
    output = torch.empty(num_tokens, hidden_size)
    native.plot_merge(
        input_ids.data_ptr(),
        num_tokens,
        sequence_offsets.data_ptr(),
        sequence_offsets.shape[0] - 1,
        references.data_ptr(),
        [_native_table(table) for table in row_tables],
        [_native_table(table) for table in unigram_tables],
        sequence_unigram_tables.data_ptr(),
        position_embeddings.data_ptr(),
        num_positions,
        layer_norm_weight.data_ptr(),
        layer_norm_bias.data_ptr(),
        layer_norm_eps,
        window,
        hidden_size,
        output.data_ptr(),
        torch.get_num_threads(),
    )
    return output


def _native_table(table: Tensor) -> tuple[int, int, bool]:
    return table.data_ptr(), table.shape[0], table.dtype == torch.float16


def _fake_merge(
    input_ids: Tensor,
    sequence_offsets: Tensor,
    references: Tensor,
    row_tables: list[Tensor],
    unigram_tables: list[Tensor],
    sequence_unigram_tables: Tensor,
    position_embeddings: Tensor,
    layer_norm_weight: Tensor,
    layer_norm_bias: Tensor,
    *,
    layer_norm_eps: float,
    window: int,
) -> Tensor:
    return position_embeddings.new_empty(input_ids.shape[0], position_embeddings.shape[1])


_plot_index_build = define(
    "plot_index_build(Tensor keys) -> Tensor",
    check=_check_build,
    cpu=_build_on_cpu,
    reference=reference.plot_index_build,
    fake=_fake_build,
)
_plot_index_insert = define(
    "plot_index_insert(Tensor(a!) index, Tensor keys, Tensor rows) -> ()",
    check=_check_insert,
    cpu=_insert_on_cpu,
    reference=reference.plot_index_insert,
    fake=_fake_insert,
)
_plot_index_find = define(
    "plot_index_find(Tensor index, Tensor keys) -> Tensor",
    check=_check_find,
    cpu=_find_on_cpu,
    reference=reference.plot_index_find,
    fake=_fake_find,
)
_plot_lookup = define(
    "plot_lookup(Tensor input_ids, Tensor sequence_offsets, Tensor[] indexes, Tensor chains, *, int window) -> Tensor",
    check=_check_lookup,
    cpu=_lookup_on_cpu,
    reference=reference.plot_lookup,
    fake=_fake_lookup,
)
_plot_merge = define(
    "plot_merge(Tensor input_ids, Tensor sequence_offsets, Tensor references, Tensor[] row_tables, "
    "Tensor[] unigram_tables, Tensor sequence_unigram_tables, Tensor position_embeddings, Tensor layer_norm_weight, "
    "Tensor layer_norm_bias, *, float layer_norm_eps, int window) -> Tensor",
    check=_check_merge,
    cpu=_merge_on_cpu,
    reference=reference.plot_merge,
    fake=_fake_merge,
)
