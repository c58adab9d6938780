"""PLOT merge of a decoder: a program makes the hidden states of a few tokens, from rows to layer norm.

Data movement: a token needs one row, that of its window or of the shorter one or its unigram's, which is read
once, added to its position's in float32, normalized in registers and written once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmi_kernels.triton.language import rounded
from hmi_kernels.triton.layer_norm import normalized, row_tile
from hmi_kernels.triton.plot_rows import MergeTables, add_vector, first_found, merge_refuses

if TYPE_CHECKING:
    from hmi_kernels.causal import MergeArguments

__all__ = ["causal_merge", "causal_merge_refuses"]


def causal_merge(arguments: MergeArguments) -> Tensor:
    """See :func:`hmi_kernels.causal_merge`."""
    positions, input_ids = arguments.position_embeddings, arguments.input_ids
    num_tokens = input_ids.shape[0]
    num_positions, hidden_size = positions.shape
    output = arguments.new_hidden_states()
    if num_tokens == 0:
        return output
    tables = MergeTables.of(arguments)
    tile_rows, num_warps = row_tile(hidden_size)
    with torch.cuda.device_of(input_ids):
        _causal_merge_kernel[(triton.cdiv(num_tokens, tile_rows),)](
            output,
            input_ids,
            arguments.positions,
            num_tokens,
            arguments.references,
            tables.addresses,
            tables.num_rows,
            tables.num_unigrams,
            arguments.token_unigram_tables,
            positions,
            num_positions,
            arguments.layer_norm_weight,
            arguments.layer_norm_bias,
            arguments.layer_norm_eps,
            hidden_size=hidden_size,
            block=triton.next_power_of_2(hidden_size),
            **tables.constants,
            tile_rows=tile_rows,
            num_warps=num_warps,
        )
    return output


causal_merge_refuses = merge_refuses


@triton.jit(do_not_specialize=["num_tokens", "num_row_tables", "num_unigram_tables", "num_positions"])
def _causal_merge_kernel(
    output: tl.tensor,
    input_ids: tl.tensor,
    token_positions: tl.tensor,
    num_tokens: tl.tensor,
    references: tl.tensor,
    tables: tl.tensor,
    num_row_tables: tl.tensor,
    num_unigram_tables: tl.tensor,
    token_unigram_tables: tl.tensor,
    positions: tl.tensor,
    num_positions: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    epsilon: tl.tensor,
    hidden_size: tl.constexpr,
    block: tl.constexpr,
    types: tl.constexpr,
    is_aligned: tl.constexpr,
    tile_rows: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    is_token = t < num_tokens
    place = tl.load(token_positions + t, mask=is_token, other=-1)
    is_sane = is_token & (place >= 0) & (place < num_positions)
    columns = tl.arange(0, block)[None, :]

    reference = first_found(references + 2 * t, references + 2 * t + 1, is_sane)
    unigram_table = tl.load(token_unigram_tables + t, mask=is_sane, other=0).to(tl.int64)
    token_id = tl.load(input_ids + t, mask=is_sane, other=0).to(tl.int64)
    nothing = tl.zeros([tile_rows, block], tl.float32)
    state, is_sane = add_vector(
        nothing, is_sane, reference, 0, is_sane, 0, 1, unigram_table, token_id,
        tables, num_row_tables, num_unigram_tables, 1, hidden_size, columns, types, is_aligned,
    )  # fmt: skip

    is_column = columns < hidden_size
    position = positions + (tl.where(is_sane, place, 0) * hidden_size)[:, None] + columns
    state += tl.load(position, mask=is_column, other=0.0).to(tl.float32)
    result = normalized(state, columns, hidden_size, weight, bias, epsilon)
    result = rounded(tl.where(is_sane[:, None], result, 0.0), output.dtype.element_ty)
    tl.store(output + (t * hidden_size)[:, None] + columns, result, mask=is_token[:, None] & is_column)
