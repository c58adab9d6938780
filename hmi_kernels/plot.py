"""PLOT: the look-up of a batch in tables of n-grams, and the merge of their rows into hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from hmi_kernels import reference
from hmi_kernels.checks import FLOATS, require_packed, require_tensor, require_vector, require_window
from hmi_kernels.library import Implementation, define
from hmi_kernels.native import native
from hmi_kernels.plot_index import require_index

__all__ = ["plot_lookup", "plot_merge"]


def plot_lookup(
    input_ids: Tensor, sequence_offsets: Tensor, indexes: Sequence[Tensor], chains: Tensor, *, window: int
) -> Tensor:
    """Finds the row of every window of a batch in the tables of its sequence.

    Semantics (``a, b, c = ids[t-1], ids[t], ids[t+1]``, absent outside the sequence):
    window 2: ``references[t, 0] = find(b, c)``, -1 at the last token.
    window 3: ``references[t, 0] = find(a, b, c)``; where that is -1, ``references[t, 1] = find(a, b, -)``
    unless a is absent and ``references[t, 2] = find(-, b, c)`` unless c is; else -1.

    Args:
        input_ids: int32 [tokens], the sequences laid end to end.
        sequence_offsets: int64 [sequences + 1].
        indexes: int64 [slots, 2] each, as :func:`plot_index_build` makes them.
        chains: int32 [sequences, depth]: the indexes to search for each sequence, in order; the first hit
            wins, the first -1 ends the search.
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
    window 2: ``m[t] = U + (R(t-1)[1] - U) + (R(t)[0] - U)``; a bracket whose window is missing, or that
    reaches over an end of the sequence, is zero.
    window 3: ``m[t] = R(t)[1] + R(t-1)[2] + R(t+1)[0]`` inside the sequence. A missing R is composed of the
    bigrams of columns 1 and 2: slot 0 of left, slot 2 of right (zero if missing), and slot 1
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
    Raises TypeError or ValueError on arguments of another kind, ValueError on a sequence longer than there
    are positions and on rows or ids that lie outside the tables.
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


class _LookupArguments(NamedTuple):
    input_ids: Tensor
    sequence_offsets: Tensor
    indexes: list[Tensor]
    chains: Tensor
    window: int


class _MergeArguments(NamedTuple):
    input_ids: Tensor
    sequence_offsets: Tensor
    references: Tensor
    row_tables: list[Tensor]
    unigram_tables: list[Tensor]
    sequence_unigram_tables: Tensor
    position_embeddings: Tensor
    layer_norm_weight: Tensor
    layer_norm_bias: Tensor
    layer_norm_eps: float
    window: int


def _check_lookup(arguments: _LookupArguments) -> None:
    require_window(arguments.window)
    require_packed(arguments.input_ids, arguments.sequence_offsets)
    for i, index in enumerate(arguments.indexes):
        require_index(f"indexes[{i}]", index)
    require_tensor("chains", arguments.chains, torch.int32, (arguments.sequence_offsets.shape[0] - 1, None))


def _new_references(arguments: _LookupArguments) -> Tensor:
    num_columns = 1 if arguments.window == 2 else 3
    return arguments.input_ids.new_empty(arguments.input_ids.shape[0], num_columns, dtype=torch.int64)


def _lookup_on_cpu(arguments: _LookupArguments) -> Tensor:
    references = _new_references(arguments)
    native.plot_lookup(
        arguments.input_ids.data_ptr(),
        arguments.input_ids.shape[0],
        arguments.sequence_offsets.data_ptr(),
        arguments.sequence_offsets.shape[0] - 1,
        [(index.data_ptr(), index.shape[0]) for index in arguments.indexes],
        arguments.chains.data_ptr(),
        arguments.chains.shape[1],
        arguments.window,
        references.data_ptr(),
        torch.get_num_threads(),
    )
    return references


def _check_merge(arguments: _MergeArguments) -> None:
    window = arguments.window
    require_window(window)
    require_packed(arguments.input_ids, arguments.sequence_offsets)
    num_columns = 1 if window == 2 else 3
    require_tensor(
        "references", arguments.references, torch.int64, (arguments.input_ids.shape[0], num_columns)
    )
    require_tensor("position_embeddings", arguments.position_embeddings, torch.float32, (None, None))
    hidden_size = arguments.position_embeddings.shape[1]
    if hidden_size == 0:
        raise ValueError("position_embeddings must have at least one column")
    for i, table in enumerate(arguments.row_tables):
        require_tensor(f"row_tables[{i}]", table, FLOATS, (None, window, hidden_size))
    for i, table in enumerate(arguments.unigram_tables):
        require_tensor(f"unigram_tables[{i}]", table, FLOATS, (None, hidden_size))
    num_sequences = arguments.sequence_offsets.shape[0] - 1
    require_vector("sequence_unigram_tables", arguments.sequence_unigram_tables, torch.int32, num_sequences)
    require_vector("layer_norm_weight", arguments.layer_norm_weight, torch.float32, hidden_size)
    require_vector("layer_norm_bias", arguments.layer_norm_bias, torch.float32, hidden_size)


def _new_hidden_states(arguments: _MergeArguments) -> Tensor:
    positions = arguments.position_embeddings
    return positions.new_empty(arguments.input_ids.shape[0], positions.shape[1])


def _merge_on_cpu(arguments: _MergeArguments) -> Tensor:
    output = _new_hidden_states(arguments)
    num_positions, hidden_size = arguments.position_embeddings.shape
    native.plot_merge(
        arguments.input_ids.data_ptr(),
        arguments.input_ids.shape[0],
        arguments.sequence_offsets.data_ptr(),
        arguments.sequence_offsets.shape[0] - 1,
        arguments.references.data_ptr(),
        [_native_table(table) for table in arguments.row_tables],
        [_native_table(table) for table in arguments.unigram_tables],
        arguments.sequence_unigram_tables.data_ptr(),
        arguments.position_embeddings.data_ptr(),
        num_positions,
        arguments.layer_norm_weight.data_ptr(),
        arguments.layer_norm_bias.data_ptr(),
        arguments.layer_norm_eps,
        arguments.window,
        hidden_size,
        output.data_ptr(),
        torch.get_num_threads(),
    )
    return output


def _native_table(table: Tensor) -> tuple[int, int, bool]:
    return table.data_ptr(), table.shape[0], table.dtype == torch.float16


_plot_lookup = define(
    "plot_lookup(Tensor input_ids, Tensor sequence_offsets, Tensor[] indexes, Tensor chains, *, int window) "
    "-> Tensor",
    arguments=_LookupArguments,
    check=_check_lookup,
    implementations={"cpu": Implementation(_lookup_on_cpu)},
    reference=reference.plot_lookup,
    fake=_new_references,
)
_plot_merge = define(
    "plot_merge(Tensor input_ids, Tensor sequence_offsets, Tensor references, Tensor[] row_tables, "
    "Tensor[] unigram_tables, Tensor sequence_unigram_tables, Tensor position_embeddings, "
    "Tensor layer_norm_weight, Tensor layer_norm_bias, *, float layer_norm_eps, int window) -> Tensor",
    arguments=_MergeArguments,
    check=_check_merge,
    implementations={"cpu": Implementation(_merge_on_cpu)},
    reference=reference.plot_merge,
    fake=_new_hidden_states,
)
