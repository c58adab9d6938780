"""Vectors of PLOT rows in whatever format a table has, for kernels that merge them.

Data movement: a vector is read once, from wherever its table lies (device memory, or page-locked host memory
that the device can read).
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmi_kernels.reference import ROW_BITS
from hmi_kernels.row_tables import pageable_tables
from hmi_kernels.settings import is_triton_interpreted
from hmi_kernels.triton.address_table import WORDS_PER_TABLE, address_table
from hmi_kernels.triton.layer_norm import MAX_HIDDEN_SIZE

if TYPE_CHECKING:
    from hmi_kernels.causal import MergeArguments as CausalMergeArguments
    from hmi_kernels.plot import MergeArguments

__all__ = ["MISSING", "MergeTables", "add_vector", "first_found", "merge_refuses"]

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
MISSING = tl.constexpr(-1)
_VECTOR_BYTES = tl.constexpr(16)


class MergeTables(NamedTuple):
    """The tables of a merge as its kernel takes them.

    Attributes:
        addresses: of tables of rows, then of unigrams, on the device.
        num_rows: how many tables of rows.
        num_unigrams: how many of unigrams.
        constants: the element types that there are, and whether all begin at multiples of 16 bytes.
    """

    addresses: Tensor
    num_rows: int
    num_unigrams: int
    constants: dict[str, int | bool]

    @classmethod
    def of(cls, arguments: MergeArguments | CausalMergeArguments) -> MergeTables:
        """Those of a call."""
        rows = [_table_words(*table) for table in arguments.row_tables_with_decoding()]
        unigrams = [_table_words(table, None) for table in arguments.unigram_tables]
        every = [*rows, *unigrams]
        constants = {
            "types": reduce(or_, (words[2] for words in every), 0),
            "is_aligned": all(words[0] % 16 == 0 for words in every),
        }
        addresses = address_table(every, arguments.input_ids.device)
        return cls(addresses, len(rows), len(unigrams), constants)


def merge_refuses(arguments: MergeArguments | CausalMergeArguments) -> str:
    """Why the kernels that merge cannot take the arguments; "" if they can."""
    hidden_size = arguments.position_embeddings.shape[1]
    if hidden_size > MAX_HIDDEN_SIZE:
        return f"position_embeddings must have at most {MAX_HIDDEN_SIZE} columns, not {hidden_size}"
    if not is_triton_interpreted() and (reason := pageable_tables(arguments)):
        return reason
    return arguments.refused_pieces()


def _table_words(table: Tensor, decoding: Tensor | None) -> tuple[int, int, int, int]:
    """Address, rows, element type and address of the scales or codebooks, as the kernel reads them."""
    address, num_rows = table.data_ptr(), table.shape[0]
    if decoding is None:
        return address, num_rows, ELEMENT_TYPES[table.dtype], 0
    if table.dtype is torch.uint8:
        return address, num_rows, CODE_TYPES[decoding.shape[3]], decoding.data_ptr()
    return address, num_rows, ELEMENT_TYPES[table.dtype], decoding.data_ptr()


@triton.jit
def first_found(first: tl.tensor, second: tl.tensor, is_wanted: tl.tensor) -> tl.tensor:
    """The reference at the first place or, if that is missing, at the second."""
    whole = tl.load(first, mask=is_wanted, other=MISSING)
    return tl.load(second, mask=is_wanted & (whole == MISSING), other=whole)


@triton.jit
def add_vector(
    state: tl.tensor,
    is_sane: tl.tensor,
    reference: tl.tensor,
    slot: tl.constexpr,
    needs_unigram: tl.tensor,
    unigram_slot: tl.constexpr,
    unigram_slots: tl.constexpr,
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

    Where it is missing, a slot of the token's ``unigram_slots`` unigram rows stands in if it is needed; else
    they stay as they are. Tables of rows come first, then those of unigrams.
    """
    is_found = reference != MISSING
    is_unigram = needs_unigram & ~is_found
    row_table = reference >> _ROW_BITS
    table = tl.where(is_unigram, unigram_table, row_table)
    row = tl.where(is_unigram, token_id, reference - (row_table << _ROW_BITS))
    vector = tl.where(is_unigram, token_id * unigram_slots + unigram_slot, row * window + slot)
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
