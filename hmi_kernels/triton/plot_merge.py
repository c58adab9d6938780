"""PLOT merge: a program makes the hidden states of a few tokens, from rows to layer norm, in registers.

Data movement: the references of a token and its neighbours say which rows are needed; each needed row is
read once, from wherever its table lies (device memory, or page-locked host memory that the device can read),
summed in float32 with the position's row, normalized and written once.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmi_kernels.reference import ROW_BITS
from hmi_kernels.triton.address_table import WORDS_PER_TABLE, address_table
from hmi_kernels.triton.language import rounded
from hmi_kernels.triton.layer_norm import MAX_HIDDEN_SIZE, normalized, row_tile
from hmi_kernels.triton.segments import last_at_most

if TYPE_CHECKING:
    from hmi_kernels.plot import MergeArguments

__all__ = ["plot_merge", "plot_merge_refuses"]

ELEMENT_TYPES = {torch.float16: 1, torch.float32: 2, torch.bfloat16: 4, torch.int8: 8}
CODE_TYPES = {4: 16, 8: 32}
"""Of rows, those of codes by the size of their pieces; one bit each: a kernel is compiled for the types that
its call has."""

_FLOAT16 = tl.constexpr(1)
_FLOAT32 = tl.constexpr(2)
_BFLOAT16 = tl.constexpr(4)
_INT8 = tl.constexpr(8)
_CODES_OF_4 = tl.constexpr(16)
_CODES_OF_8 = tl.constexpr(32)
_CODEBOOK_SIZE = tl.constexpr(256)
_ROW_BITS = tl.constexpr(ROW_BITS)
_MISSING = tl.constexpr(-1)
_UNIGRAM_SLOTS = tl.constexpr(3)
_VECTOR_BYTES = tl.constexpr(16)


def plot_merge(arguments: MergeArguments) -> Tensor:
    """See :func:`hmi_kernels.plot_merge`."""
    positions, input_ids = arguments.position_embeddings, arguments.input_ids
    num_tokens, num_sequences = input_ids.shape[0], arguments.sequence_offsets.shape[0] - 1
    num_positions, hidden_size = positions.shape
    output = arguments.new_hidden_states()
    if 0 in (num_tokens, num_sequences):
        return output.zero_()
    rows = [_words(*table) for table in arguments.row_tables_with_decoding()]
    unigrams = [_words(table, None) for table in arguments.unigram_tables]
    tile_rows, num_warps = row_tile(hidden_size)
    with torch.cuda.device_of(input_ids):
        _merge_kernel[(triton.cdiv(num_tokens, tile_rows),)](
            output,
            input_ids,
            num_tokens,
            arguments.sequence_offsets,
            num_sequences,
            arguments.references,
            address_table([*rows, *unigrams], input_ids.device),
            len(rows),
            len(unigrams),
            arguments.sequence_unigram_tables,
            positions,
            num_positions,
            arguments.layer_norm_weight,
            arguments.layer_norm_bias,
            arguments.layer_norm_eps,
            window=arguments.window,
            hidden_size=hidden_size,
            block=triton.next_power_of_2(hidden_size),
            types=reduce(or_, (words[2] for words in (*rows, *unigrams)), 0),
            is_aligned=all(words[0] % 16 == 0 for words in (*rows, *unigrams)),
            tile_rows=tile_rows,
            num_warps=num_warps,
        )
    return output


def plot_merge_refuses(arguments: MergeArguments) -> str:
    """Why these kernels cannot take the arguments; "" if they can."""
    hidden_size = arguments.position_embeddings.shape[1]
    if hidden_size > MAX_HIDDEN_SIZE:
        return f"position_embeddings must have at most {MAX_HIDDEN_SIZE} columns, not {hidden_size}"
    return arguments.refused_pieces()


def _words(table: Tensor, decoding: Tensor | None) -> tuple[int, int, int, int]:
    """Address, rows, element type and address of the scales or codebooks, as the kernel reads them."""
    address, num_rows = table.data_ptr(), table.shape[0]
    if decoding is None:
        return address, num_rows, ELEMENT_TYPES[table.dtype], 0
    if table.dtype is torch.uint8:
        return address, num_rows, CODE_TYPES[decoding.shape[3]], decoding.data_ptr()
    return address, num_rows, ELEMENT_TYPES[table.dtype], decoding.data_ptr()


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
        before = tl.load(references + t - 1, mask=has_left, other=_MISSING)
        after = tl.load(references + t, mask=has_right, other=_MISSING)
        # U + (before - U) + (after - U), without the bracket of a neighbor that is not: U counts 1, 0 or -1.
        num_unigrams = 1 - has_left.to(tl.int32) - has_right.to(tl.int32)
    else:
        row = references + 3 * t
        before = _first_found(row - 3, row - 1, has_left)
        after = _first_found(row + 3, row + 4, has_right)
        own = _first_found(row, row + 1, is_sane)
        is_composed = is_sane & (tl.load(row, mask=is_sane, other=0) == _MISSING)
        composed = tl.load(row + 2, mask=is_composed, other=_MISSING)
        num_unigrams = is_composed.to(tl.int32) * (1 - _is_found(own) - _is_found(composed))

    nothing = tl.zeros([tile_rows, block], tl.float32)
    missing = tl.full([tile_rows], _MISSING, tl.int64)
    state, is_sane = _add(
        nothing, is_sane, missing, 0, num_unigrams != 0, window - 2, unigram_table, token_id,
        tables, num_row_tables, num_unigram_tables, window, hidden_size, columns, types, is_aligned,
    )  # fmt: skip
    state *= num_unigrams[:, None]
    state, is_sane = _add(
        state, is_sane, before, window - 1, has_left, window - 1, unigram_table, token_id,
        tables, num_row_tables, num_unigram_tables, window, hidden_size, columns, types, is_aligned,
    )  # fmt: skip
    state, is_sane = _add(
        state, is_sane, after, 0, has_right, 2 if window == 2 else 0, unigram_table, token_id,
        tables, num_row_tables, num_unigram_tables, window, hidden_size, columns, types, is_aligned,
    )  # fmt: skip
    if window == 3:
        nowhere = missing != _MISSING
        state, is_sane = _add(
            state, is_sane, own, 1, nowhere, 0, unigram_table, token_id,
            tables, num_row_tables, num_unigram_tables, window, hidden_size, columns, types, is_aligned,
        )  # fmt: skip
        state, is_sane = _add(
            state, is_sane, composed, 1, nowhere, 0, unigram_table, token_id,
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
    return (reference != _MISSING).to(tl.int32)


@triton.jit
def _first_found(first: tl.tensor, second: tl.tensor, is_wanted: tl.tensor) -> tl.tensor:
    """The reference at the first place or, if that is missing, at the second."""
    whole = tl.load(first, mask=is_wanted, other=_MISSING)
    return tl.load(second, mask=is_wanted & (whole == _MISSING), other=whole)


@triton.jit
def _add(
    state: tl.tensor,
    is_sane: tl.tensor,
    reference: tl.tensor,
    slot: tl.constexpr,
    needs_unigram: tl.tensor,
    unigram_slot: tl.constexpr,
    unigram_table: tl.tensor,
    token_id: tl.tensor,
    tables: tl.tensor,
    num_row_tables: tl.tensor,
    num_unigram_tables: tl.tensor,
    window: tl.constexpr,
    hidden_size: tl.constexpr,
    columns: tl.tensor,
    types: tl.constexpr,
    is_aligned: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The (state, is_sane) with one slot of each reference's row added.

    Where it is missing, a slot of the token's unigram rows stands in if it is needed; else they stay as they
    are. Tables of rows come first, then those of unigrams.
    """
    is_found = reference != _MISSING
    is_unigram = needs_unigram & ~is_found
    row_table = reference >> _ROW_BITS
    table = tl.where(is_unigram, unigram_table, row_table)
    row = tl.where(is_unigram, token_id, reference - (row_table << _ROW_BITS))
    vector = tl.where(is_unigram, token_id * _UNIGRAM_SLOTS + unigram_slot, row * window + slot)
    num_tables = tl.where(is_unigram, num_unigram_tables, num_row_tables)
    is_wanted = is_found | is_unigram
    is_table = is_sane & is_wanted & (table >= 0) & (table < num_tables)
    place = table + tl.where(is_unigram, num_row_tables, 0)
    words = tables + tl.where(is_table, place, 0) * WORDS_PER_TABLE
    values, is_there = _read(words, is_table, row, vector, slot, hidden_size, columns, types, is_aligned)
    return state + values, is_sane & (is_there | ~is_wanted)


@triton.jit
def _read(
    words: tl.tensor,
    is_table: tl.tensor,
    row: tl.tensor,
    vector: tl.tensor,
    slot: tl.constexpr,
    hidden_size: tl.constexpr,
    columns: tl.tensor,
    types: tl.constexpr,
    is_aligned: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The (float32 [tokens, columns], is_there) of one vector of each row; zeros, not read, if not there.

    ``slot`` is the vector's in rows of codes.
    """
    is_there = is_table & (row >= 0) & (row < tl.load(words + 1, mask=is_table, other=0))
    address = tl.load(words, mask=is_there, other=0)
    kind = tl.load(words + 2, mask=is_there, other=0)
    places = (vector * hidden_size)[:, None] + columns
    values = tl.zeros(places.shape, tl.float32)
    mask = is_there[:, None] & (columns < hidden_size)
    if _FLOAT16 & types:
        values += _elements(address, tl.float16, places, mask & (kind == _FLOAT16)[:, None], is_aligned)
    if _FLOAT32 & types:
        values += _elements(address, tl.float32, places, mask & (kind == _FLOAT32)[:, None], is_aligned)
    if _BFLOAT16 & types:
        values += _elements(address, tl.bfloat16, places, mask & (kind == _BFLOAT16)[:, None], is_aligned)
    if _INT8 & types:
        is_int8 = is_there & (kind == _INT8)
        scales = tl.load(words + 3, mask=is_there, other=0).to(tl.pointer_type(tl.float32))
        scale = tl.load(scales + vector, mask=is_int8, other=0.0)[:, None]
        values += _elements(address, tl.int8, places, mask & is_int8[:, None], is_aligned) * scale
    if _CODES_OF_4 & types:
        is_code = mask & (kind == _CODES_OF_4)[:, None]
        values += _decoded(words, address, vector, slot, 4, hidden_size, columns, is_code)
    if _CODES_OF_8 & types:
        is_code = mask & (kind == _CODES_OF_8)[:, None]
        values += _decoded(words, address, vector, slot, 8, hidden_size, columns, is_code)
    return values, is_there


@triton.jit
def _decoded(
    words: tl.tensor,
    address: tl.tensor,
    vector: tl.tensor,
    slot: tl.constexpr,
    piece_size: tl.constexpr,
    hidden_size: tl.constexpr,
    columns: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """What the codes of each vector stand for, as float32; zeros where the mask is false."""
    num_codes: tl.constexpr = hidden_size // piece_size
    number = columns // piece_size
    codes = address.to(tl.pointer_type(tl.uint8))[:, None] + (vector * num_codes)[:, None] + number
    code = tl.load(codes, mask=mask, other=0).to(tl.int64)
    piece = (slot * num_codes + number) * _CODEBOOK_SIZE + code
    codebooks = tl.load(words + 3).to(tl.pointer_type(tl.float16))
    return tl.load(codebooks[:, None] + piece * piece_size + columns % piece_size, mask=mask, other=0).to(
        tl.float32
    )


@triton.jit
def _elements(
    address: tl.tensor, dtype: tl.constexpr, places: tl.tensor, mask: tl.tensor, is_aligned: tl.constexpr
) -> tl.tensor:
    """The elements of that type from each row's address on, as float32; zeros where the mask is false."""
    pointer = address.to(tl.pointer_type(dtype))
    if is_aligned:
        pointer = tl.multiple_of(pointer, _VECTOR_BYTES)
    return tl.load(pointer[:, None] + places, mask=mask, other=0).to(tl.float32)
