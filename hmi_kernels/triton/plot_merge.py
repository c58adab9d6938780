"""PLOT merge: a program makes the hidden states of a few tokens, from rows to layer norm, in registers.

Data movement: the references of a token and its neighbours say which rows are needed; each needed row is
read once, from wherever its table lies (device memory, or page-locked host memory that the device can read),
summed in float32 with the position's row, normalized and written once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmi_kernels.triton.language import rounded
from hmi_kernels.triton.layer_norm import normalized, row_tile
from hmi_kernels.triton.plot_rows import MISSING, MergeTables, add_vector, first_found, merge_refuses
from hmi_kernels.triton.segments import last_at_most

if TYPE_CHECKING:
    from hmi_kernels.plot import MergeArguments

__all__ = ["plot_merge", "plot_merge_refuses"]

_UNIGRAM_SLOTS = tl.constexpr(3)


def plot_merge(arguments: MergeArguments) -> Tensor:
    """See :func:`hmi_kernels.plot_merge`."""
    positions, input_ids = arguments.position_embeddings, arguments.input_ids
    num_tokens, num_sequences = input_ids.shape[0], arguments.sequence_offsets.shape[0] - 1
    num_positions, hidden_size = positions.shape
    output = arguments.new_hidden_states()
    if 0 in (num_tokens, num_sequences):
        return output.zero_()
    tables = MergeTables.of(arguments)
    tile_rows, num_warps = row_tile(hidden_size)
    with torch.cuda.device_of(input_ids):
        _merge_kernel[(triton.cdiv(num_tokens, tile_rows),)](
            output,
            input_ids,
            num_tokens,
            arguments.sequence_offsets,
            num_sequences,
            arguments.references,
            tables.addresses,
            tables.num_rows,
            tables.num_unigrams,
            arguments.sequence_unigram_tables,
            positions,
            num_positions,
            arguments.layer_norm_weight,
            arguments.layer_norm_bias,
            arguments.layer_norm_eps,
            window=arguments.window,
            hidden_size=hidden_size,
            block=triton.next_power_of_2(hidden_size),
            **tables.constants,
            tile_rows=tile_rows,
            num_warps=num_warps,
        )
    return output


plot_merge_refuses = merge_refuses


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_sequences", "num_row_tables", "num_unigram_tables", "num_positions"
    ]
)  # fmt: skip
def _merge_kernel(
    output: tl.tensor,
    input_ids: tl.tensor,
    num_tokens: tl.tensor,
    sequence_offsets: tl.tensor,
    num_sequences: tl.tensor,
    references: tl.tensor,
    tables: tl.tensor,
    num_row_tables: tl.tensor,
    num_unigram_tables: tl.tensor,
    sequence_unigram_tables: tl.tensor,
    positions: tl.tensor,
    num_positions: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    epsilon: tl.tensor,
    window: tl.constexpr,
    hidden_size: tl.constexpr,
    block: tl.constexpr,
    types: tl.constexpr,
    is_aligned: tl.constexpr,
    tile_rows: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    sequence = last_at_most(sequence_offsets, num_sequences, t)
    begin = tl.load(sequence_offsets + sequence)
    end = tl.load(sequence_offsets + sequence + 1)
    is_sane = (begin >= 0) & (begin <= t) & (t < end) & (end <= num_tokens) & (t - begin < num_positions)
    has_left = is_sane & (t > begin)
    has_right = is_sane & (t + 1 < end)
    columns = tl.arange(0, block)[None, :]

    unigram_table = tl.load(sequence_unigram_tables + sequence).to(tl.int64)
    token_id = tl.load(input_ids + t, mask=is_sane, other=0).to(tl.int64)

    if window == 2:
        before = tl.load(references + t - 1, mask=has_left, other=MISSING)
        after = tl.load(references + t, mask=has_right, other=MISSING)
        # U + (before - U) + (after - U), without the bracket of a neighbor that is not: U counts 1, 0 or -1.
        num_unigrams = 1 - has_left.to(tl.int32) - has_right.to(tl.int32)
    else:
        row = references + 3 * t
        before = first_found(row - 3, row - 1, has_left)
        after = first_found(row + 3, row + 4, has_right)
        own = first_found(row, row + 1, is_sane)
        is_composed = is_sane & (tl.load(row, mask=is_sane, other=0) == MISSING)
        composed = tl.load(row + 2, mask=is_composed, other=MISSING)
        num_unigrams = is_composed.to(tl.int32) * (1 - _is_found(own) - _is_found(composed))

    nothing = tl.zeros([tile_rows, block], tl.float32)
    missing = tl.full([tile_rows], MISSING, tl.int64)
    state, is_sane = add_vector(
        nothing, is_sane, missing, 0, num_unigrams != 0, window - 2, _UNIGRAM_SLOTS, unigram_table, token_id,
        tables, num_row_tables, num_unigram_tables, window, hidden_size, columns, types, is_aligned,
    )  # fmt: skip
    state *= num_unigrams[:, None]
    state, is_sane = add_vector(
        state, is_sane, before, window - 1, has_left, window - 1, _UNIGRAM_SLOTS, unigram_table, token_id,
        tables, num_row_tables, num_unigram_tables, window, hidden_size, columns, types, is_aligned,
    )  # fmt: skip
    state, is_sane = add_vector(
        state, is_sane, after, 0, has_right, 2 if window == 2 else 0, _UNIGRAM_SLOTS, unigram_table, token_id,
        tables, num_row_tables, num_unigram_tables, window, hidden_size, columns, types, is_aligned,
    )  # fmt: skip
    if window == 3:
        nowhere = missing != MISSING
        state, is_sane = add_vector(
            state, is_sane, own, 1, nowhere, 0, _UNIGRAM_SLOTS, unigram_table, token_id,
            tables, num_row_tables, num_unigram_tables, window, hidden_size, columns, types, is_aligned,
        )  # fmt: skip
        state, is_sane = add_vector(
            state, is_sane, composed, 1, nowhere, 0, _UNIGRAM_SLOTS, unigram_table, token_id,
            tables, num_row_tables, num_unigram_tables, window, hidden_size, columns, types, is_aligned,
        )  # fmt: skip

    is_column = columns < hidden_size
    position = positions + (tl.where(is_sane, t - begin, 0) * hidden_size)[:, None] + columns
    state += tl.load(position, mask=is_column, other=0.0).to(tl.float32)
    result = normalized(state, columns, hidden_size, weight, bias, epsilon)
    result = rounded(tl.where(is_sane[:, None], result, 0.0), output.dtype.element_ty)
    place = output + (t * hidden_size)[:, None] + columns
    tl.store(place, result, mask=(t < num_tokens)[:, None] & is_column)


@triton.jit
def _is_found(reference: tl.tensor) -> tl.tensor:
    return (reference != MISSING).to(tl.int32)
