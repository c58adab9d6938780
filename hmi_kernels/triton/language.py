"""What several kernels share: matrix products, rounding, activations, searches."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from hmi_kernels.settings import is_triton_interpreted

__all__ = ["Block", "Pointer", "Scalar", "activate", "dot", "find_segment_tile", "last_at_most", "rounded"]

Pointer = Any
Scalar = Any
Block = Any
"""Kinds of values inside of a kernel, for the reader; Triton finds out their types at each call."""

INTERPRETED = tl.constexpr(is_triton_interpreted())


@triton.jit
def dot(left: Block, right: Block, sums: Block) -> Block:
    """``sums + left @ right`` with sums in float32; float32 factors are not shortened to tf32."""
    if INTERPRETED:
        left = left.to(tl.float32)  # the interpreter would multiply the bits of bfloat16
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def rounded(values: Block, dtype: tl.constexpr) -> Block:
    """float32 values in ``dtype``, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)  # the interpreter would cut the low half off
        bits = tl.where(values == values, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        values = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def _tanh(x: Block) -> Block:
    # Without libdevice, so that it runs everywhere. Near 0 the quotient would lose digits: a series there.
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    quotient = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    return tl.where(tl.abs(x) < 0.25, series, quotient)


@triton.jit
def activate(x: Block, activation: Scalar) -> Block:
    """The activation of that number in ``hmi_kernels.ACTIVATIONS``, of float32 values."""
    result = x
    if activation == 0:
        result = tl.where(x < 0.0, 0.0, x)  # keeps NaN
    elif activation == 1:
        result = 0.5 * x * (1.0 + tl.erf(x * 0.70710678118654752))
    elif activation == 2:
        result = x / (1.0 + tl.exp(-x))
    elif activation == 3:
        result = 0.5 * x * (1.0 + _tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)))
    else:
        result = _tanh(x)
    return result


@triton.jit
def last_at_most(starts: Pointer, count: Scalar, wanted: Block) -> Block:
    """Of ``count`` rising numbers, at least one, the last that is at most ``wanted``; 0 if none is."""
    low = wanted * 0
    remaining = count * 1
    while remaining > 1:
        half = remaining // 2
        low = tl.where(tl.load(starts + low + half) <= wanted, low + half, low)
        remaining -= half
    return low


@triton.jit
def find_segment_tile(
    segment_offsets: Pointer,
    num_segments: Scalar,
    num_tokens: Scalar,
    tile: Scalar,
    tile_rows: tl.constexpr,
) -> tuple[Scalar, Scalar, Scalar]:
    """The (segment, first row, row after the last of the segment) of a tile; no rows if there is no such tile.

    Segment g's tiles have the numbers from ``offsets[g] // tile_rows + g`` on. They rise with g and never
    meet, so ``tokens // tile_rows + segments`` programs find them all without a table.
    """
    low = tile * 0
    remaining = num_segments * 1
    while remaining > 1:
        half = remaining // 2
        probe = low + half
        low = tl.where(tl.load(segment_offsets + probe) // tile_rows + probe <= tile, probe, low)
        remaining -= half
    begin = tl.load(segment_offsets + low)
    end = tl.load(segment_offsets + low + 1)
    row = begin + (tile - begin // tile_rows - low) * tile_rows
    is_sane = (begin >= 0) & (begin <= end) & (end <= num_tokens) & (row >= begin)
    return low, row, tl.where(is_sane, end, row)
