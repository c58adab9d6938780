"""The layer norm that may follow a grouped adapter, in place: a program holds a few rows in registers."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from hmi_kernels.triton.language import rounded
from hmi_kernels.triton.segments import find_segment_tile, load_slot, num_segment_tiles

if TYPE_CHECKING:
    from hmi_kernels.triton.adapters import AdapterCall

__all__ = ["MAX_HIDDEN_SIZE", "normalize_segments", "normalized", "row_tile"]

MAX_HIDDEN_SIZE = 16384
"""A row lies in registers."""

ROW_TILES = {1: (8, 4), 512: (4, 4), 1024: (2, 4), 2048: (1, 4), 4096: (1, 8), 8192: (1, 16)}
"""(rows, warps) of a program that holds rows, by the least row size. Not tuned: sums hang on the warps."""


@cache
def row_tile(row_size: int) -> tuple[int, int]:
    """Of :data:`ROW_TILES`."""
    return max((least, tile) for least, tile in ROW_TILES.items() if least <= row_size)[1]


def normalize_segments(call: AdapterCall, weight: Tensor, bias: Tensor, epsilon: float) -> None:
    """``output[t] = LayerNorm(output[t])`` for every token of every segment whose slot can be."""
    (num_tokens, hidden_size), num_segments = call.output.shape, call.segment_slots.shape[0]
    if 0 in (num_tokens, hidden_size, num_segments):
        return
    tile_rows, num_warps = row_tile(hidden_size)
    _normalize_kernel[(num_segment_tiles(num_tokens, num_segments, tile_rows),)](
        call.output,
        call.output.stride(0),
        num_tokens,
        call.segment_offsets,
        call.segment_slots,
        num_segments,
        call.slot_offsets,
        call.slot_ranks,
        call.slot_activations,
        call.slot_offsets.shape[-1],
        call.arena.shape[0],
        call.max_rank,
        weight,
        bias,
        epsilon,
        hidden_size=hidden_size,
        block=triton.next_power_of_2(hidden_size),
        tile_rows=tile_rows,
        num_warps=num_warps,
    )


@triton.jit
def normalized(
    rows: tl.tensor,
    columns: tl.tensor,
    size: tl.constexpr,
    weight: tl.tensor,
    bias: tl.tensor,
    epsilon: tl.tensor,
) -> tl.tensor:
    """The layer norm of float32 rows [rows, columns], whose padding, from ``size`` on, may hold anything."""
    is_column = columns < size
    mean = tl.sum(tl.where(is_column, rows, 0.0), axis=1)[:, None] / size
    centered = tl.where(is_column, rows - mean, 0.0)
    variance = tl.sum(centered * centered, axis=1)[:, None] / size
    scaled = centered * (1.0 / tl.sqrt(variance + epsilon))
    gain = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    return scaled * gain + tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "num_slots", "arena_size", "max_rank"])
def _normalize_kernel(
    output: tl.tensor,
    output_stride: tl.tensor,
    num_tokens: tl.tensor,
    segment_offsets: tl.tensor,
    segment_slots: tl.tensor,
    num_segments: tl.tensor,
    slot_offsets: tl.tensor,
    slot_ranks: tl.tensor,
    slot_activations: tl.tensor,
    num_slots: tl.tensor,
    arena_size: tl.tensor,
    max_rank: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    epsilon: tl.tensor,
    hidden_size: tl.constexpr,
    block: tl.constexpr,
    tile_rows: tl.constexpr,
) -> None:
    tile = tl.program_id(0).to(tl.int64)
    segment, row, end = find_segment_tile(segment_offsets, num_segments, num_tokens, tile, tile_rows)
    is_sane, _, _, _ = load_slot(
        segment, 0, segment_slots, num_slots, slot_offsets, slot_ranks, slot_activations,
        max_rank, 2 * hidden_size + 1, hidden_size, arena_size,
    )  # fmt: skip
    if is_sane & (row < end):
        columns = tl.arange(0, block)[None, :]
        rows = (row + tl.arange(0, tile_rows))[:, None]
        places = output + rows * output_stride + columns
        mask = (rows < end) & (columns < hidden_size)
        values = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        result = normalized(values, columns, hidden_size, weight, bias, epsilon)
        tl.store(places, rounded(result, output.dtype.element_ty), mask=mask)
