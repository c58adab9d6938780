"""PLOT: the look-up of a batch in tables of n-grams, and the merge of their rows into hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from hmi_kernels import reference
from hmi_kernels.checks import COMPUTE_TYPES, require_packed, require_tensor, require_vector, require_window
from hmi_kernels.cuda.driver import DATA_TYPES
from hmi_kernels.cuda.plot import LOOKUP, MERGE
from hmi_kernels.library import Implementation, define, implemented_in
from hmi_kernels.native import native
from hmi_kernels.plot_index import require_index
from hmi_kernels.row_tables import MAY_BE_ON_HOST, require_row_tables

__all__ = [
    "native_row_table",
    "native_row_tables",
    "plot_lookup",
    "plot_merge",
    "refused_pieces",
    "with_decoding",
]

PIECE_SIZES = (4, 8)
"""Elements that a code can stand for, but in the reference, which takes any."""
NativeTable: TypeAlias = tuple[int, int, int, int, int, int]
"""Address, rows, number of the data type, addresses of scales and codebooks or 0, elements of a piece."""


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
    On a GPU the kernel finds such values and gives their tokens -1; of the backend ``cuda``
    :func:`raise_faults` tells.
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
    row_scales: Sequence[Tensor] = (),
    codebooks: Sequence[Tensor] = (),
) -> Tensor:
    """Merges the rows that :func:`plot_lookup` found into the hidden states that the upper layers start from.

    Semantics, with R(t) the row of the window at t and U the unigram rows of ``input_ids[t]``; what is
    missing is that of the token beside ``[MASK]`` ("some token stands here"), which U holds:
    window 2: ``m[t] = left + right - U[0]`` with left ``R(t-1)[1]``, or ``U[1]`` where that window is
    missing, and right ``R(t)[0]``, or ``U[2]``. At an end of the sequence the neighbor's part is left out:
    ``m[t]`` is the other one; with no neighbor at all it is ``U[0]``.
    window 3: ``m[t] = R(t)[1] + R(t-1)[2] + R(t+1)[0]`` inside the sequence. A missing R is composed of the
    bigrams of columns 1 and 2: slot 0 of left, slot 2 of right (of U where it is missing), and slot 1
    ``(left[1] or U[1]) + (right[1] or U[1]) - U[1]``; a slot always speaks of its own token's U.
    Then ``output[t] = LayerNorm(m[t] + position_embeddings[t - start of its sequence])``.

    Args:
        input_ids: int32 [tokens].
        sequence_offsets: int64 [sequences + 1].
        references: int64 [tokens, 1] for window 2, [tokens, 3] for window 3.
        row_tables: float16, bfloat16, float32 or int8 [rows, window, hidden] each, or uint8 [rows, window,
            codes]; the table part of a reference counts them.
        unigram_tables: float16, bfloat16 or float32 [vocabulary, 3, hidden] each. For window 2: the token
            alone, on the right of ``[MASK]``, on its left. For window 3: the token in this slot of a window
            that holds ``[MASK]`` in the others.
        sequence_unigram_tables: int32 [sequences]: which of them a sequence uses.
        position_embeddings: float32, float16 or bfloat16 [positions, hidden]; the output has its dtype. The
            backend ``cpu`` takes float32.
        layer_norm_weight: [hidden] of that dtype.
        layer_norm_bias: likewise.
        layer_norm_eps: added to the variance.
        window: 2 or 3 tokens.
        row_scales: for each of ``row_tables`` float32 [rows, window] if it is int8, empty otherwise (see
            :func:`quantize_rows`). Needed only if one is int8.
        codebooks: for each of ``row_tables`` float16 [window, codes, 256, hidden / codes] if it is uint8,
            empty otherwise. Code m of slot w stands for the elements from ``m * hidden / codes`` on:
            ``codebooks[w, m, code]``. Needed only if one is uint8. Pieces have 4 or 8 elements (any number on
            the backend ``reference``).

    While the other tensors are on a GPU, ``row_tables``, ``unigram_tables``, ``row_scales`` and
    ``codebooks`` may lie in pinned host memory: the kernel then reads the rows in place. What lies in other
    host memory only the reference reads, and slowly. Sums are made in float32.

    Returns: [tokens, hidden].
    Raises TypeError or ValueError on arguments of another kind, ValueError on a sequence longer than there
    are positions and on rows or ids that lie outside the tables. On a GPU the kernel finds such values and
    gives their tokens zeros; of the backend ``cuda`` :func:`raise_faults` tells.
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
        row_scales=list(row_scales),
        codebooks=list(codebooks),
    )
    return cast(Tensor, output)


def _num_columns(window: int) -> int:
    """Of references: a window of three tokens may be composed of the two bigrams in it."""
    return 1 if window == 2 else 3


class LookupArguments(NamedTuple):
    """What :func:`plot_lookup` is given."""

    input_ids: Tensor
    sequence_offsets: Tensor
    indexes: list[Tensor]
    chains: Tensor
    window: int

    def new_references(self) -> Tensor:
        """Room for the result: int64 [tokens, 1 or 3]."""
        return self.input_ids.new_empty(self.input_ids.shape[0], _num_columns(self.window), dtype=torch.int64)


class MergeArguments(NamedTuple):
    """What :func:`plot_merge` is given."""

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
    row_scales: Sequence[Tensor]
    codebooks: Sequence[Tensor] = ()

    def new_hidden_states(self) -> Tensor:
        """Room for the result: [tokens, hidden] of the type of the position embeddings."""
        return self.position_embeddings.new_empty(self.input_ids.shape[0], self.position_embeddings.shape[1])

    def row_tables_with_decoding(self) -> list[tuple[Tensor, Tensor | None]]:
        """The row tables, those of int8 with their scales, those of codes with their codebooks."""
        return with_decoding(self.row_tables, self.row_scales, self.codebooks)

    def refused_pieces(self) -> str:
        """Why no kernel but the reference takes the codebooks; "" if they can."""
        return refused_pieces(self.codebooks)


def with_decoding(
    row_tables: Sequence[Tensor], row_scales: Sequence[Tensor], codebooks: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor | None]]:
    """Row tables, each with the scales (int8) or codebooks (uint8) that its rows are read with, or None."""
    sides = {torch.int8: row_scales, torch.uint8: codebooks}
    return [
        (table, sides[table.dtype][i] if table.dtype in sides else None) for i, table in enumerate(row_tables)
    ]


def refused_pieces(codebooks: Sequence[Tensor]) -> str:
    """Why no kernel but the reference takes these codebooks; "" if they can."""
    sizes = {codebook.shape[3] for codebook in codebooks if codebook.numel()}
    if sizes <= set(PIECE_SIZES):
        return ""
    return f"codebooks must hold pieces of 4 or 8 elements, not {sorted(sizes)}"


def _check_lookup(arguments: LookupArguments) -> None:
    require_window(arguments.window)
    require_packed(arguments.input_ids, arguments.sequence_offsets)
    for i, index in enumerate(arguments.indexes):
        require_index(f"indexes[{i}]", index)
    require_tensor("chains", arguments.chains, torch.int32, (arguments.sequence_offsets.shape[0] - 1, None))


def _lookup_on_cpu(arguments: LookupArguments) -> Tensor:
    references = arguments.new_references()
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


def _check_merge(arguments: MergeArguments) -> None:
    window = arguments.window
    require_window(window)
    require_packed(arguments.input_ids, arguments.sequence_offsets)
    require_tensor(
        "references", arguments.references, torch.int64, (arguments.input_ids.shape[0], _num_columns(window))
    )
    positions = arguments.position_embeddings
    require_tensor("position_embeddings", positions, COMPUTE_TYPES, (None, None))
    hidden_size = positions.shape[1]
    if hidden_size == 0:
        raise ValueError("position_embeddings must have at least one column")
    require_row_tables(
        arguments.row_tables,
        arguments.row_scales,
        arguments.codebooks,
        window=window,
        hidden_size=hidden_size,
    )
    for i, table in enumerate(arguments.unigram_tables):
        require_tensor(f"unigram_tables[{i}]", table, COMPUTE_TYPES, (None, 3, hidden_size))
    num_sequences = arguments.sequence_offsets.shape[0] - 1
    require_vector("sequence_unigram_tables", arguments.sequence_unigram_tables, torch.int32, num_sequences)
    require_vector("layer_norm_weight", arguments.layer_norm_weight, positions.dtype, hidden_size)
    require_vector("layer_norm_bias", arguments.layer_norm_bias, positions.dtype, hidden_size)


def _merge_on_cpu(arguments: MergeArguments) -> Tensor:
    output = arguments.new_hidden_states()
    num_positions, hidden_size = arguments.position_embeddings.shape
    native.plot_merge(
        arguments.input_ids.data_ptr(),
        arguments.input_ids.shape[0],
        arguments.sequence_offsets.data_ptr(),
        arguments.sequence_offsets.shape[0] - 1,
        arguments.references.data_ptr(),
        native_row_tables(arguments.row_tables, arguments.row_scales, arguments.codebooks),
        [native_row_table(table) for table in arguments.unigram_tables],
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


def native_row_tables(
    tables: Sequence[Tensor], scales: Sequence[Tensor], codebooks: Sequence[Tensor]
) -> list[NativeTable]:
    """Each with its scales or its codebooks, if it has some."""
    return [
        native_row_table(
            table,
            scales=scales[i] if table.dtype is torch.int8 else None,
            codebooks=codebooks[i] if table.dtype is torch.uint8 else None,
        )
        for i, table in enumerate(tables)
    ]


def native_row_table(
    table: Tensor, scales: Tensor | None = None, codebooks: Tensor | None = None
) -> NativeTable:
    """A table as the compiled module takes it."""
    return (
        table.data_ptr(),
        table.shape[0],
        DATA_TYPES[table.dtype],
        0 if scales is None else scales.data_ptr(),
        0 if codebooks is None else codebooks.data_ptr(),
        0 if codebooks is None else codebooks.shape[3],
    )


def _merge_refuses_on_cpu(arguments: MergeArguments) -> str:
    dtype = arguments.position_embeddings.dtype
    if dtype is not torch.float32:
        return f"position_embeddings must be torch.float32, not {dtype}"
    tables = (*arguments.row_tables, *arguments.unigram_tables)
    if any(table.dtype is torch.bfloat16 for table in tables):
        return "row_tables and unigram_tables must not be torch.bfloat16"
    return arguments.refused_pieces()


_plot_lookup = define(
    "plot_lookup(Tensor input_ids, Tensor sequence_offsets, Tensor[] indexes, Tensor chains, *, int window) "
    "-> Tensor",
    arguments=LookupArguments,
    check=_check_lookup,
    implementations={
        "cuda": LOOKUP,
        "triton": implemented_in("hmi_kernels.triton.plot_lookup", "plot_lookup"),
        "cpu": Implementation(_lookup_on_cpu),
    },
    reference=reference.plot_lookup,
    fake=LookupArguments.new_references,
)
_plot_merge = define(
    "plot_merge(Tensor input_ids, Tensor sequence_offsets, Tensor references, Tensor[] row_tables, "
    "Tensor[] unigram_tables, Tensor sequence_unigram_tables, Tensor position_embeddings, "
    "Tensor layer_norm_weight, Tensor layer_norm_bias, *, float layer_norm_eps, int window, "
    "Tensor[] row_scales, Tensor[] codebooks) -> Tensor",
    arguments=MergeArguments,
    check=_check_merge,
    implementations={
        "cuda": MERGE,
        "triton": implemented_in("hmi_kernels.triton.plot_merge", "plot_merge"),
        "cpu": Implementation(_merge_on_cpu, _merge_refuses_on_cpu),
    },
    reference=reference.plot_merge,
    fake=MergeArguments.new_hidden_states,
    may_be_on_host=MAY_BE_ON_HOST,
)
