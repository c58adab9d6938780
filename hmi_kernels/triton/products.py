"""Grouped products and their matrices' gradients.

Data movement: a program of the product streams a tile's inputs and the slot's matrix by, in chunks of the
depth, into sums in registers, and writes each output once. A program of the gradient owns one tile of one
slot's matrix and streams the tokens of all of the slot's segments by, in their order: no atomics, and the
same bits every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmi_kernels.host_indexes import MatrixTable, check_matrices_on_host, on_device
from hmi_kernels.settings import is_triton_interpreted
from hmi_kernels.triton.language import dot, rounded
from hmi_kernels.triton.segments import find_segment_tile, num_segment_tiles

if TYPE_CHECKING:
    from hmi_kernels.products import ProductArguments, WeightGradientArguments

__all__ = [
    "grouped_product",
    "grouped_product_refuses",
    "grouped_weight_gradient",
    "grouped_weight_gradient_refuses",
]

DEPTH = 32
"""Tokens or columns that are multiplied at a time."""
PRODUCT_CONFIGS = [
    triton.Config({"tile_rows": 16, "tile_columns": 64}, num_warps=4, num_stages=3),
    triton.Config({"tile_rows": 64, "tile_columns": 32}, num_warps=4, num_stages=3),
    triton.Config({"tile_rows": 64, "tile_columns": 64}, num_warps=4, num_stages=3),
]
GRADIENT_CONFIGS = [
    triton.Config({"tile_rows": 32, "tile_columns": 32}, num_warps=4, num_stages=3),
    triton.Config({"tile_rows": 64, "tile_columns": 16}, num_warps=4, num_stages=3),
    triton.Config({"tile_rows": 16, "tile_columns": 64}, num_warps=4, num_stages=3),
    triton.Config({"tile_rows": 64, "tile_columns": 64}, num_warps=4, num_stages=2),
]
"""Tried for each new shape."""


def grouped_product_refuses(arguments: ProductArguments | WeightGradientArguments) -> str:
    """Why these kernels cannot take the arguments; "" if they can."""
    return "inputs must not be torch.float64" if arguments.inputs.dtype is torch.float64 else ""


grouped_weight_gradient_refuses = grouped_product_refuses


def grouped_product(arguments: ProductArguments) -> Tensor:
    """See :func:`hmi_kernels.grouped_product`."""
    inputs, arena, output_size = arguments.inputs, arguments.arena, arguments.output_size
    num_tokens, input_size = inputs.shape
    most = (output_size, input_size) if arguments.transposed else (input_size, output_size)
    check_matrices_on_host(arguments, MatrixTable.of(arguments, arena.shape[0], most, 1))
    output = inputs.new_zeros(num_tokens, output_size)
    num_segments, num_slots = arguments.segment_slots.shape[0], arguments.slot_offsets.shape[0]
    if 0 in (num_tokens, output_size, input_size, num_segments, num_slots):
        return output

    def grid(chosen: dict[str, Any]) -> tuple[int, int]:
        tiles = num_segment_tiles(num_tokens, num_segments, chosen["tile_rows"])
        return tiles, triton.cdiv(output_size, chosen["tile_columns"])

    with torch.cuda.device_of(inputs):
        _product_kernel[grid](
            output,
            inputs,
            inputs.stride(0),
            num_tokens,
            arena,
            arena.shape[0],
            *_segments(arguments),
            num_segments,
            *_slots(arguments),
            num_slots,
            min(64, max(16, triton.next_power_of_2(triton.cdiv(num_tokens, num_segments)))),
            input_size=input_size,
            output_size=output_size,
            is_transposed=arguments.transposed,
            depth_chunk=DEPTH,
        )
    return output


def grouped_weight_gradient(arguments: WeightGradientArguments) -> Tensor:
    """See :func:`hmi_kernels.grouped_weight_gradient`."""
    inputs, gradients, arena_size = arguments.inputs, arguments.output_gradients, arguments.arena_size
    most = (inputs.shape[1], gradients.shape[1])
    table = MatrixTable.of(arguments, arena_size, most, 1)
    check_matrices_on_host(arguments, table, must_be_disjoint=True)
    result = inputs.new_zeros(arena_size)
    num_segments, num_slots = arguments.segment_slots.shape[0], arguments.slot_offsets.shape[0]
    if 0 in (inputs.shape[0], *most, num_segments, num_slots):
        return result

    def grid(chosen: dict[str, Any]) -> tuple[int, int, int]:
        tiles = (triton.cdiv(most[0], chosen["tile_rows"]), triton.cdiv(most[1], chosen["tile_columns"]))
        return num_slots, *tiles

    with torch.cuda.device_of(inputs):
        _weight_gradient_kernel[grid](
            result,
            arena_size,
            inputs,
            inputs.stride(0),
            gradients,
            gradients.stride(0),
            inputs.shape[0],
            *_segments(arguments),
            num_segments,
            *_slots(arguments),
            input_size=most[0],
            output_size=most[1],
            depth_chunk=DEPTH,
        )
    return result


def _segments(arguments: ProductArguments | WeightGradientArguments) -> tuple[Tensor, Tensor]:
    device = arguments.inputs.device
    return on_device(arguments.segment_offsets, device), on_device(arguments.segment_slots, device)


def _slots(arguments: ProductArguments | WeightGradientArguments) -> tuple[Tensor, Tensor, Tensor]:
    device = arguments.inputs.device
    return (
        on_device(arguments.slot_offsets, device),
        on_device(arguments.slot_rows, device),
        on_device(arguments.slot_columns, device),
    )


@triton.jit
def _load_matrix(
    slot: tl.tensor,
    is_slot: tl.tensor,
    slot_offsets: tl.tensor,
    slot_rows: tl.tensor,
    slot_columns: tl.tensor,
    most_rows: tl.tensor,
    most_columns: tl.tensor,
    arena_size: tl.tensor,
) -> tuple[tl.tensor, ...]:
    """The (offset, rows, columns) of a slot's matrix; no rows if there is none, or it cannot be."""
    place = tl.where(is_slot, slot, 0)
    rows = tl.load(slot_rows + place, mask=is_slot, other=0).to(tl.int64)
    columns = tl.load(slot_columns + place, mask=is_slot, other=0).to(tl.int64)
    offset = tl.load(slot_offsets + place, mask=is_slot, other=0)
    fits = (rows > 0) & (rows <= most_rows) & (columns > 0) & (columns <= most_columns)
    fits = fits & (offset >= 0) & (offset <= arena_size - rows * columns)
    return offset, tl.where(fits, rows, 0), tl.where(fits, columns, 0)


@triton.autotune(
    configs=PRODUCT_CONFIGS[:1] if is_triton_interpreted() else PRODUCT_CONFIGS,
    key=["tokens_per_segment", "input_size", "output_size", "is_transposed"],
)
@triton.jit(do_not_specialize=["num_tokens", "arena_size", "num_segments", "num_slots", "tokens_per_segment"])
def _product_kernel(
    output: tl.tensor,
    inputs: tl.tensor,
    input_stride: tl.tensor,
    num_tokens: tl.tensor,
    arena: tl.tensor,
    arena_size: tl.tensor,
    segment_offsets: tl.tensor,
    segment_slots: tl.tensor,
    num_segments: tl.tensor,
    slot_offsets: tl.tensor,
    slot_rows: tl.tensor,
    slot_columns: tl.tensor,
    num_slots: tl.tensor,
    tokens_per_segment: tl.tensor,  # only chooses the config
    input_size: tl.constexpr,
    output_size: tl.constexpr,
    is_transposed: tl.constexpr,
    depth_chunk: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """One tile of a segment's rows (axis 0, see ``find_segment_tile``) and of output columns (axis 1)."""
    tile = tl.program_id(0).to(tl.int64)
    segment, row, end = find_segment_tile(segment_offsets, num_segments, num_tokens, tile, tile_rows)
    slot = tl.load(segment_slots + segment).to(tl.int64)
    most_rows = output_size if is_transposed else input_size
    most_columns = input_size if is_transposed else output_size
    offset, matrix_rows, matrix_columns = _load_matrix(
        slot, (slot >= 0) & (slot < num_slots), slot_offsets, slot_rows, slot_columns, most_rows,
        most_columns, arena_size,
    )  # fmt: skip
    depth = matrix_columns if is_transposed else matrix_rows
    width = matrix_rows if is_transposed else matrix_columns
    columns = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
    if (row < end) & (tl.program_id(1) * tile_columns < width):
        rows = row + tl.arange(0, tile_rows)
        is_row, is_column = (rows < end)[:, None], (columns < width)[None, :]
        sums = tl.zeros([tile_rows, tile_columns], tl.float32)
        for start in range(0, input_size, depth_chunk):
            places = start + tl.arange(0, depth_chunk)
            is_place = places < depth
            values = tl.load(
                inputs + rows[:, None] * input_stride + places[None, :],
                mask=is_row & is_place[None, :],
                other=0.0,
            )
            if is_transposed:
                elements = columns[None, :] * matrix_columns + places[:, None]
            else:
                elements = places[:, None] * matrix_columns + columns[None, :]
            weights = tl.load(arena + offset + elements, mask=is_place[:, None] & is_column, other=0.0)
            sums = dot(values, weights, sums)
        tl.store(
            output + rows[:, None] * output_size + columns[None, :],
            rounded(sums, output.dtype.element_ty),
            mask=is_row & is_column,
        )


@triton.autotune(
    configs=GRADIENT_CONFIGS[:1] if is_triton_interpreted() else GRADIENT_CONFIGS,
    key=["input_size", "output_size"],
)
@triton.jit(do_not_specialize=["num_tokens", "arena_size", "num_segments"])
def _weight_gradient_kernel(
    gradient: tl.tensor,
    arena_size: tl.tensor,
    inputs: tl.tensor,
    input_stride: tl.tensor,
    output_gradients: tl.tensor,
    output_stride: tl.tensor,
    num_tokens: tl.tensor,
    segment_offsets: tl.tensor,
    segment_slots: tl.tensor,
    num_segments: tl.tensor,
    slot_offsets: tl.tensor,
    slot_rows: tl.tensor,
    slot_columns: tl.tensor,
    input_size: tl.constexpr,
    output_size: tl.constexpr,
    depth_chunk: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """One tile (axes 1 and 2 of the grid) of one slot's matrix (axis 0)."""
    slot = tl.program_id(0).to(tl.int64)
    offset, matrix_rows, matrix_columns = _load_matrix(
        slot, slot >= 0, slot_offsets, slot_rows, slot_columns, input_size, output_size, arena_size
    )
    rows = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    columns = tl.program_id(2) * tile_columns + tl.arange(0, tile_columns)
    is_row, is_column = (rows < matrix_rows)[:, None], (columns < matrix_columns)[None, :]
    is_inside = (tl.program_id(1) * tile_rows < matrix_rows) & (
        tl.program_id(2) * tile_columns < matrix_columns
    )
    if is_inside:
        sums = tl.zeros([tile_rows, tile_columns], tl.float32)
        segment = slot * 0
        while segment < num_segments:
            begin = tl.load(segment_offsets + segment)
            end = tl.load(segment_offsets + segment + 1)
            is_ours = tl.load(segment_slots + segment).to(tl.int64) == slot
            is_ours = is_ours & (begin >= 0) & (begin <= end) & (end <= num_tokens)
            token = tl.where(is_ours, begin, end)
            while token < end:
                tokens = token + tl.arange(0, depth_chunk)
                left_mask = (tokens < end)[None, :] & is_row
                left = tl.load(
                    inputs + tokens[None, :] * input_stride + rows[:, None], mask=left_mask, other=0.0
                )
                right_mask = (tokens < end)[:, None] & is_column
                right = tl.load(
                    output_gradients + tokens[:, None] * output_stride + columns[None, :],
                    mask=right_mask,
                    other=0.0,
                )
                sums = dot(left, right, sums)
                token += depth_chunk
            segment += 1
        places = gradient + offset + rows[:, None] * matrix_columns + columns[None, :]
        tl.store(places, rounded(sums, gradient.dtype.element_ty), mask=is_row & is_column)
