"""The kernel of the grouped adapters: a program adds one projection's adapter to one tile of a segment.

Data movement: the tile's inputs and the segment's first matrix stream by, in chunks of columns, into sums of
[rows, rank] in registers; activated and rounded, these stay on chip as the left factor of the second matrix,
which streams by in chunks of output columns, each added to the output in place. Projections of one call are
the second axis of the grid: the inputs that they share come from the cache after the first.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from hmi_kernels.settings import is_triton_interpreted
from hmi_kernels.triton.language import activate, dot, rounded
from hmi_kernels.triton.segments import find_segment_tile, load_slot

__all__ = ["adapter_kernel"]

TILE_CONFIGS = [
    triton.Config({"tile_rows": 16}, num_warps=4, num_stages=4),
    triton.Config({"tile_rows": 16}, num_warps=2, num_stages=3),
    triton.Config({"tile_rows": 16}, num_warps=4, num_stages=2),
    triton.Config({"tile_rows": 32}, num_warps=4, num_stages=3),
    triton.Config({"tile_rows": 64}, num_warps=4, num_stages=2),
    triton.Config({"tile_rows": 64}, num_warps=8, num_stages=3),
    triton.Config({"tile_rows": 128}, num_warps=8, num_stages=2),
]
"""The first, or by tuning the best for each new shape.

Those with tiles of more rows than twice a segment's tokens are left out."""


def _fitting_configs(configs: list[Any], named: dict[str, Any], **_: Any) -> list[Any]:
    return [config for config in configs if config.kwargs["tile_rows"] <= 2 * named["tokens_per_segment"]]


@triton.autotune(
    configs=TILE_CONFIGS[:1] if is_triton_interpreted() else TILE_CONFIGS,
    key=["tokens_per_segment", "input_size", "output_sizes", "is_bottleneck", "rank_block", "unit"],
    prune_configs_by={"early_config_prune": _fitting_configs},
    restore_value=["output"],
)
@triton.jit(
    do_not_specialize=[
        "num_tokens", "arena_size", "num_segments", "num_slots", "max_rank", "tokens_per_segment"
    ]
)  # fmt: skip
def adapter_kernel(
    output: tl.tensor,
    output_stride: tl.tensor,
    inputs: tl.tensor,
    input_stride: tl.tensor,
    num_tokens: tl.tensor,
    arena: tl.tensor,
    arena_size: tl.tensor,
    segment_offsets: tl.tensor,
    segment_slots: tl.tensor,
    num_segments: tl.tensor,
    slot_offsets: tl.tensor,
    slot_ranks: tl.tensor,
    slot_activations: tl.tensor,
    slot_scales: tl.tensor,
    num_slots: tl.tensor,
    max_rank: tl.tensor,
    tokens_per_segment: tl.tensor,  # only chooses the config
    input_size: tl.constexpr,
    output_sizes: tl.constexpr,
    is_bottleneck: tl.constexpr,
    rank_block: tl.constexpr,
    chunk: tl.constexpr,
    unit: tl.constexpr,
    tile_rows: tl.constexpr,
) -> None:
    """One tile (axis 0 of the grid, see ``find_segment_tile``) of one projection (axis 1)."""
    tile = tl.program_id(0).to(tl.int64)
    projection = tl.program_id(1)
    segment, row, end = find_segment_tile(segment_offsets, num_segments, num_tokens, tile, tile_rows)
    column, output_size = _columns_of(projection, output_sizes)
    _, place, offset, rank = load_slot(
        segment, projection, segment_slots, num_slots, slot_offsets, slot_ranks, slot_activations, max_rank,
        input_size + output_size + is_bottleneck, output_size * is_bottleneck, arena_size,
    )  # fmt: skip
    if (row < end) & (rank > 0):
        rows = row + tl.arange(0, tile_rows)
        is_even = (rank % unit == 0) & (offset % unit == 0)
        # The same twice: what is known to be a multiple of the unit is read in vectors.
        if is_even:
            _add_adapter(
                output + column, output_stride, inputs, input_stride, arena, offset, rank, slot_activations,
                slot_scales, place, rows, end, output_size, input_size, is_bottleneck, rank_block, chunk, unit
            )  # fmt: skip
        else:
            _add_adapter(
                output + column, output_stride, inputs, input_stride, arena, offset, rank, slot_activations,
                slot_scales, place, rows, end, output_size, input_size, is_bottleneck, rank_block, chunk, 1,
            )  # fmt: skip


@triton.jit
def _columns_of(projection: tl.tensor, output_sizes: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The (first column, number of columns) of a projection."""
    first = 0
    size = 0
    for p in tl.static_range(len(output_sizes)):
        first += tl.where(p < projection, output_sizes[p], 0)
        size += tl.where(p == projection, output_sizes[p], 0)
    return first, size


@triton.jit
def _add_adapter(
    output: tl.tensor,
    output_stride: tl.tensor,
    inputs: tl.tensor,
    input_stride: tl.tensor,
    arena: tl.tensor,
    offset: tl.tensor,
    rank: tl.tensor,
    slot_activations: tl.tensor,
    slot_scales: tl.tensor,
    place: tl.tensor,
    rows: tl.tensor,
    end: tl.tensor,
    output_size: tl.tensor,
    input_size: tl.constexpr,
    is_bottleneck: tl.constexpr,
    rank_block: tl.constexpr,
    chunk: tl.constexpr,
    unit: tl.constexpr,
) -> None:
    # Changes no value: it tells the compiler of what they are multiples.
    rank = rank // unit * unit
    output_stride = output_stride // unit * unit
    input_stride = input_stride // unit * unit
    first = arena + offset // unit * unit
    first_bias = first + input_size * rank
    second = first_bias + rank * is_bottleneck
    ranks = tl.arange(0, rank_block)
    is_row = (rows < end)[:, None]

    inner = _project(inputs + rows[:, None] * input_stride, is_row, first, rank, ranks, input_size, chunk)
    if is_bottleneck:
        inner += tl.load(first_bias + ranks, mask=ranks < rank, other=0.0).to(tl.float32)[None, :]
        inner = activate(inner, tl.load(slot_activations + place))
    # Beyond the rank stand zeros, whatever the row holds: infinity times a padding's zero would be NaN.
    inner = rounded(tl.where((ranks < rank)[None, :], inner, 0.0), output.dtype.element_ty)

    scale = tl.load(slot_scales + place)
    nothing = tl.zeros([rows.shape[0], chunk], tl.float32)
    for start in range(0, output_size, chunk):
        columns = start + tl.arange(0, chunk)
        is_column = (columns < output_size)[None, :]
        weight_mask = (ranks < rank)[:, None] & is_column
        weight = tl.load(
            second + ranks[:, None] * output_size + columns[None, :], mask=weight_mask, other=0.0
        )
        sums = dot(inner, weight, nothing)
        if is_bottleneck:
            bias = second + rank * output_size + columns
            sums += tl.load(bias, mask=columns < output_size, other=0.0).to(tl.float32)[None, :]
        places = output + rows[:, None] * output_stride + columns[None, :]
        before = tl.load(places, mask=is_row & is_column, other=0.0).to(tl.float32)
        after = rounded(before + scale * sums, output.dtype.element_ty)
        tl.store(places, after, mask=is_row & is_column)


@triton.jit
def _project(
    rows: tl.tensor,
    is_row: tl.tensor,
    weights: tl.tensor,
    rank: tl.tensor,
    ranks: tl.tensor,
    input_size: tl.constexpr,
    chunk: tl.constexpr,
) -> tl.tensor:
    """float32 [rows, ranks]: the rows times weights [input_size, rank], zero beyond the rank."""
    sums = tl.zeros([rows.shape[0], ranks.shape[0]], tl.float32)
    for start in range(0, input_size, chunk):
        columns = start + tl.arange(0, chunk)
        is_column = columns < input_size
        values = tl.load(rows + columns[None, :], mask=is_row & is_column[None, :], other=0.0)
        weight_mask = is_column[:, None] & (ranks < rank)[None, :]
        weight = tl.load(weights + columns[:, None] * rank + ranks[None, :], mask=weight_mask, other=0.0)
        sums = dot(values, weight, sums)
    return sums
