"""The PLOT of a decoder: look-up by a token and those before it, and the rows as hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from hmi_kernels import reference
from hmi_kernels.checks import COMPUTE_TYPES, require_tensor, require_vector
from hmi_kernels.library import Implementation, define, implemented_in
from hmi_kernels.native import native
from hmi_kernels.plot import native_row_table, native_row_tables, refused_pieces, with_decoding
from hmi_kernels.plot_index import require_index
from hmi_kernels.row_tables import require_row_tables

__all__ = ["MergeArguments", "causal_lookup", "causal_merge"]

_WINDOW = 3
_COLUMNS = 2


def causal_lookup(windows: Tensor, indexes: Sequence[Tensor], chains: Tensor, token_chains: Tensor) -> Tensor:
    """Finds the row of each token's window, which ends with the token; every token stands by itself.

    Semantics, for a window (a, b, c): ``references[t, 0] = find(a, b, c)``, and where that is -1
    ``references[t, 1] = find(b, c)``, else -1. For (a, b): ``references[t] = find(a, b), -1``. A single token
    gives -1, -1: its row is its unigram's.

    Args:
        windows: int32 [tokens, 3]: 1 to 3 token ids in the order of the text, and -1 behind them.
        indexes: int64 [slots, 2] each, as :func:`plot_index_build` makes them; the key of (b, c) is that of
            ``(b, c, -1)``.
        chains: int32 [chains, depth]: the indexes to search, in order; the first hit wins, the first -1 ends
            the search.
        token_chains: int32 [tokens]: which of the chains a token uses.

    Returns: references int64 [tokens, 2], each ``table << ROW_BITS | row`` or -1.
    Raises TypeError or ValueError on arguments of another kind, ValueError on windows, chains and tables that
    cannot be.
    """
    return cast(Tensor, _causal_lookup(windows, list(indexes), chains, token_chains))


def causal_merge(
    input_ids: Tensor,
    positions: Tensor,
    references: Tensor,
    row_tables: Sequence[Tensor],
    unigram_tables: Sequence[Tensor],
    token_unigram_tables: Tensor,
    position_embeddings: Tensor,
    layer_norm_weight: Tensor,
    layer_norm_bias: Tensor,
    *,
    layer_norm_eps: float,
    row_scales: Sequence[Tensor] = (),
    codebooks: Sequence[Tensor] = (),
) -> Tensor:
    """Turns the rows that :func:`causal_lookup` found into the hidden states that upper layers start from.

    Semantics, with R(t) the row of the first of ``references[t]`` that is not -1, or else the unigram row of
    ``input_ids[t]``: ``output[t] = LayerNorm(R(t) + position_embeddings[positions[t]])``.

    Args:
        input_ids: int32 [tokens].
        positions: int64 [tokens]: of each token in its sequence.
        references: int64 [tokens, 2].
        row_tables: float16, float32 or int8 [rows, 1, hidden] each, or uint8 [rows, 1, codes]; the table part
            of a reference counts them. The backend ``reference`` takes bfloat16 too.
        unigram_tables: float16 or float32 [vocabulary, 1, hidden] each.
        token_unigram_tables: int32 [tokens]: which of them a token uses.
        position_embeddings: float32 [positions, hidden]; in the reference also of 16 bits. The output has its
            dtype.
        layer_norm_weight: [hidden] of that dtype.
        layer_norm_bias: likewise.
        layer_norm_eps: added to the variance.
        row_scales: as for :func:`plot_merge`, of one slot.
        codebooks: likewise.

    Returns: [tokens, hidden]. Sums are made in float32.
    Raises TypeError or ValueError on arguments of another kind, ValueError on positions, rows or ids that lie
    outside the tables.
    """
    output = _causal_merge(
        input_ids,
        positions,
        references,
        list(row_tables),
        list(unigram_tables),
        token_unigram_tables,
        position_embeddings,
        layer_norm_weight,
        layer_norm_bias,
        layer_norm_eps=layer_norm_eps,
        row_scales=list(row_scales),
        codebooks=list(codebooks),
    )
    return cast(Tensor, output)


class _LookupArguments(NamedTuple):
    windows: Tensor
    indexes: list[Tensor]
    chains: Tensor
    token_chains: Tensor

    def new_references(self) -> Tensor:
        return self.windows.new_empty(self.windows.shape[0], _COLUMNS, dtype=torch.int64)


class MergeArguments(NamedTuple):
    """What :func:`causal_merge` is given."""

    input_ids: Tensor
    positions: Tensor
    references: Tensor
    row_tables: list[Tensor]
    unigram_tables: list[Tensor]
    token_unigram_tables: Tensor
    position_embeddings: Tensor
    layer_norm_weight: Tensor
    layer_norm_bias: Tensor
    layer_norm_eps: float
    row_scales: Sequence[Tensor] = ()
    codebooks: Sequence[Tensor] = ()

    def new_hidden_states(self) -> Tensor:
        """Memory for the result."""
        return self.position_embeddings.new_empty(self.input_ids.shape[0], self.position_embeddings.shape[1])

    def row_tables_with_decoding(self) -> list[tuple[Tensor, Tensor | None]]:
        """The row tables, those of int8 with their scales, those of codes with their codebooks."""
        return with_decoding(self.row_tables, self.row_scales, self.codebooks)

    def refused_pieces(self) -> str:
        """Why no kernel but the reference takes the codebooks; "" if they can."""
        return refused_pieces(self.codebooks)


def _check_lookup(arguments: _LookupArguments) -> None:
    require_tensor("windows", arguments.windows, torch.int32, (None, _WINDOW))
    for i, index in enumerate(arguments.indexes):
        require_index(f"indexes[{i}]", index)
    require_tensor("chains", arguments.chains, torch.int32, (None, None))
    require_vector("token_chains", arguments.token_chains, torch.int32, arguments.windows.shape[0])


def _lookup_on_cpu(arguments: _LookupArguments) -> Tensor:
    references = arguments.new_references()
    native.causal_lookup(
        arguments.windows.data_ptr(),
        arguments.windows.shape[0],
        [(index.data_ptr(), index.shape[0]) for index in arguments.indexes],
        arguments.chains.data_ptr(),
        arguments.chains.shape[0],
        arguments.chains.shape[1],
        arguments.token_chains.data_ptr(),
        references.data_ptr(),
        torch.get_num_threads(),
    )
    return references


def _check_merge(arguments: MergeArguments) -> None:
    require_vector("input_ids", arguments.input_ids, torch.int32)
    num_tokens = arguments.input_ids.shape[0]
    require_vector("positions", arguments.positions, torch.int64, num_tokens)
    require_tensor("references", arguments.references, torch.int64, (num_tokens, _COLUMNS))
    embeddings = arguments.position_embeddings
    require_tensor("position_embeddings", embeddings, COMPUTE_TYPES, (None, None))
    hidden_size = embeddings.shape[1]
    if hidden_size == 0:
        raise ValueError("position_embeddings must have at least one column")
    require_row_tables(
        arguments.row_tables, arguments.row_scales, arguments.codebooks, window=1, hidden_size=hidden_size
    )
    for i, table in enumerate(arguments.unigram_tables):
        require_tensor(f"unigram_tables[{i}]", table, COMPUTE_TYPES, (None, 1, hidden_size))
    require_vector("token_unigram_tables", arguments.token_unigram_tables, torch.int32, num_tokens)
    require_vector("layer_norm_weight", arguments.layer_norm_weight, embeddings.dtype, hidden_size)
    require_vector("layer_norm_bias", arguments.layer_norm_bias, embeddings.dtype, hidden_size)


def _merge_on_cpu(arguments: MergeArguments) -> Tensor:
    output = arguments.new_hidden_states()
    num_positions, hidden_size = arguments.position_embeddings.shape
    native.causal_merge(
        arguments.input_ids.data_ptr(),
        arguments.positions.data_ptr(),
        arguments.references.data_ptr(),
        arguments.input_ids.shape[0],
        native_row_tables(arguments.row_tables, arguments.row_scales, arguments.codebooks),
        [native_row_table(table) for table in arguments.unigram_tables],
        arguments.token_unigram_tables.data_ptr(),
        arguments.position_embeddings.data_ptr(),
        num_positions,
        arguments.layer_norm_weight.data_ptr(),
        arguments.layer_norm_bias.data_ptr(),
        arguments.layer_norm_eps,
        hidden_size,
        output.data_ptr(),
        torch.get_num_threads(),
    )
    return output


def _merge_refuses_on_cpu(arguments: MergeArguments) -> str:
    dtype = arguments.position_embeddings.dtype
    if dtype is not torch.float32:
        return f"position_embeddings must be torch.float32, not {dtype}"
    tables = (*arguments.row_tables, *arguments.unigram_tables)
    if any(table.dtype is torch.bfloat16 for table in tables):
        return "row_tables and unigram_tables must not be torch.bfloat16"
    return arguments.refused_pieces()


_causal_lookup = define(
    "causal_lookup(Tensor windows, Tensor[] indexes, Tensor chains, Tensor token_chains) -> Tensor",
    arguments=_LookupArguments,
    check=_check_lookup,
    implementations={"cpu": Implementation(_lookup_on_cpu)},
    reference=reference.causal_lookup,
    fake=_LookupArguments.new_references,
)
_causal_merge = define(
    "causal_merge(Tensor input_ids, Tensor positions, Tensor references, Tensor[] row_tables, "
    "Tensor[] unigram_tables, Tensor token_unigram_tables, Tensor position_embeddings, "
    "Tensor layer_norm_weight, Tensor layer_norm_bias, *, float layer_norm_eps, Tensor[] row_scales, "
    "Tensor[] codebooks) -> Tensor",
    arguments=MergeArguments,
    check=_check_merge,
    implementations={
        "triton": implemented_in("hmi_kernels.triton.causal_merge", "causal_merge"),
        "cpu": Implementation(_merge_on_cpu, _merge_refuses_on_cpu),
    },
    reference=reference.causal_merge,
    fake=MergeArguments.new_hidden_states,
)
