"""PLOT merge of a decoder: a program makes the hidden states of a few tokens, from rows to layer norm.

Data movement: a token needs one row, that of its window or of the shorter one or its unigram's, which is read
once, added to its position's in float32, normalized in registers and written once.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmi_kernels.triton.address_table import address_table
from hmi_kernels.triton.language import rounded
from hmi_kernels.triton.layer_norm import MAX_HIDDEN_SIZE, normalized, row_tile
from hmi_kernels.triton.plot_rows import add_vector, first_found, table_words

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
    rows = [table_words(*table) for table in arguments.row_tables_with_decoding()]
    unigrams = [table_words(table, None) for table in arguments.unigram_tables]
    tile_rows, num_warps = row_tile(hidden_size)
    with torch.cuda.device_of(input_ids):
        _causal_merge_kernel[(triton.cdiv(num_tokens, tile_rows),)](
            output,
            input_ids,
            arguments.positions,
            num_tokens,
            arguments.references,
            address_table([*rows, *unigrams], input_ids.device),
            len(rows),
            len(unigrams),
            arguments.token_unigram_tables,
            positions,
            num_positions,
            arguments.layer_norm_weight,
            arguments.layer_norm_bias,
            arguments.layer_norm_eps,
            hidden_size=hidden_size,
            block=triton.next_power_of_2(hidden_size),
            types=reduce(or_, (words[2] for words in (*rows, *unigrams)), 0),
            is_aligned=all(words[0] % 16 == 0 for words in (*rows, *unigrams)),
            tile_rows=tile_rows,
            num_warps=num_warps,
        )
    return output


def causal_merge_refuses(arguments: MergeArguments) -> str:
    """Why this kernel cannot take the arguments; "" if it can."""
    hidden_size = arguments.position_embeddings.shape[1]
    if hidden_size > MAX_HIDDEN_SIZE:
        return f"position_embeddings must have at most {MAX_HIDDEN_SIZE} columns, not {hidden_size}"
    return arguments.refused_pieces()


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
