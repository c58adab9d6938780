"""Grouped vectors, in place: IA3 scaling and BitFit biases. A program does some columns of a tile of rows.

Data movement: a tile's piece of its slot's vector is read once, into registers; every element of the rows is
read once and written once. Rounded once, so that no tile shape changes a bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from hmi_kernels.host_indexes import SlotTable, check_on_host, has_segments_on_host, on_device
from hmi_kernels.settings import is_triton_interpreted
from hmi_kernels.triton.language import rounded
from hmi_kernels.triton.segments import find_segment_tile, num_segment_tiles
from hmi_kernels.triton.tuned import tuned_launch

if TYPE_CHECKING:
    from hmi_kernels.vectors import VectorArguments

__all__ = ["grouped_bias", "grouped_bias_refuses", "grouped_scale", "grouped_scale_refuses"]

TILE_CONFIGS = [
    triton.Config({"tile_rows": 8, "tile_columns": 256}, num_warps=4),
    triton.Config({"tile_rows": 1, "tile_columns": 1024}, num_warps=4),
    triton.Config({"tile_rows": 32, "tile_columns": 256}, num_warps=8),
]
"""The first, or by tuning the best for each new shape."""


def grouped_scale(arguments: VectorArguments) -> None:
    """See :func:`hmi_kernels.grouped_scale`."""
    _launch(arguments, is_scale=True)


def grouped_bias(arguments: VectorArguments) -> None:
    """See :func:`hmi_kernels.grouped_bias`."""
    _launch(arguments, is_scale=False)


def grouped_scale_refuses(arguments: VectorArguments) -> str:
    """Why these kernels cannot take the arguments; "" if they can."""
    return "the rows must not be torch.float64" if arguments.rows.dtype is torch.float64 else ""


grouped_bias_refuses = grouped_scale_refuses


def _launch(arguments: VectorArguments, *, is_scale: bool) -> None:
    rows, arena, *indexes = arguments
    (num_tokens, hidden_size), num_segments = rows.shape, arguments.segment_slots.shape[0]
    if has_segments_on_host(rows.device, arguments.segment_offsets, arguments.segment_slots):
        table = SlotTable(arguments.slot_offsets, None, None, arena.shape[0], 0, hidden_size)
        check_on_host(rows.device, arguments.segment_offsets, arguments.segment_slots, num_tokens, table)
    if 0 in (num_tokens, hidden_size, num_segments, arguments.slot_offsets.shape[0]):
        return

    tokens_class = min(32, triton.next_power_of_2(triton.cdiv(num_tokens, num_segments)))

    def grid(chosen: dict[str, Any]) -> tuple[int, int]:
        tiles = num_segment_tiles(num_tokens, num_segments, chosen["tile_rows"])
        return tiles, triton.cdiv(hidden_size, chosen["tile_columns"])

    with torch.cuda.device_of(rows):
        segment_offsets, segment_slots, slot_offsets = (on_device(index, rows.device) for index in indexes)
        tuned_launch(
            _vector_kernel,
            grid,
            (tokens_class, hidden_size, is_scale, rows.dtype),
            rows,
            rows.stride(0),
            num_tokens,
            arena,
            arena.shape[0],
            segment_offsets,
            segment_slots,
            num_segments,
            slot_offsets,
            slot_offsets.shape[0],
            tokens_class,
            hidden_size=hidden_size,
            is_scale=is_scale,
        )


@triton.autotune(
    configs=TILE_CONFIGS[:1] if is_triton_interpreted() else TILE_CONFIGS,
    key=["tokens_per_segment", "hidden_size", "is_scale"],
    restore_value=["output"],
)
@triton.jit(do_not_specialize=["num_tokens", "arena_size", "num_segments", "num_slots", "tokens_per_segment"])
def _vector_kernel(
    output: tl.tensor,
    output_stride: tl.tensor,
    num_tokens: tl.tensor,
    arena: tl.tensor,
    arena_size: tl.tensor,
    segment_offsets: tl.tensor,
    segment_slots: tl.tensor,
    num_segments: tl.tensor,
    slot_offsets: tl.tensor,
    num_slots: tl.tensor,
    tokens_per_segment: tl.tensor,  # only chooses the config
    hidden_size: tl.constexpr,
    is_scale: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    tile = tl.program_id(0).to(tl.int64)
    segment, row, end = find_segment_tile(segment_offsets, num_segments, num_tokens, tile, tile_rows)
    slot = tl.load(segment_slots + segment).to(tl.int64)
    is_slot = (slot >= 0) & (slot < num_slots)
    offset = tl.load(slot_offsets + tl.where(is_slot, slot, 0), mask=is_slot, other=-1)
    if (row < end) & (offset >= 0) & (offset <= arena_size - hidden_size):
        columns = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
        is_column = columns < hidden_size
        vector = tl.load(arena + offset + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        rows = row + tl.arange(0, tile_rows)
        places = output + rows[:, None] * output_stride + columns[None, :]
        mask = (rows < end)[:, None] & is_column[None, :]
        before = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        after = before * vector if is_scale else before + vector
        tl.store(places, rounded(after, output.dtype.element_ty), mask=mask)
