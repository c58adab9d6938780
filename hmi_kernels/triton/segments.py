"""Where a program's rows lie, and what their slot has for them: searches and checks on the device."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["find_segment_tile", "last_at_most", "load_slot", "num_segment_tiles"]


def num_segment_tiles(num_tokens: int, num_segments: int, tile_rows: int) -> int:
    """How many programs hold all tiles of all segments: at most one a segment finds nothing to do."""
    return num_tokens // tile_rows + num_segments


@triton.jit
def last_at_most(starts: tl.tensor, count: tl.tensor, wanted: tl.tensor) -> tl.tensor:
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
    segment_offsets: tl.tensor,
    num_segments: tl.tensor,
    num_tokens: tl.tensor,
    tile: tl.tensor,
    tile_rows: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The (segment, first row, end of the segment's rows) of a tile; no rows if there is no such tile.

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


@triton.jit
def load_slot(
    segment: tl.tensor,
    projection: tl.tensor,
    segment_slots: tl.tensor,
    num_slots: tl.tensor,
    slot_offsets: tl.tensor,
    slot_ranks: tl.tensor,
    slot_activations: tl.tensor,
    max_rank: tl.tensor,
    elements_per_rank: tl.tensor,
    elements_per_block: tl.tensor,
    arena_size: tl.tensor,
) -> tuple[tl.tensor, ...]:
    """The (is_sane, place in the slot tables, offset, rank) of a segment's slot; rank 0 for nothing to do.

    Sane is -1, and a slot whose rank, activation (if there are any) and block can be.
    """
    slot = tl.load(segment_slots + segment).to(tl.int64)
    is_slot = (slot >= 0) & (slot < num_slots)
    place = projection * num_slots + tl.where(is_slot, slot, 0)
    rank = tl.load(slot_ranks + place, mask=is_slot, other=0).to(tl.int64)
    offset = tl.load(slot_offsets + place, mask=is_slot, other=0)
    last_offset = arena_size - (rank * elements_per_rank + elements_per_block)
    is_block = (rank <= max_rank) & (offset >= 0) & (offset <= last_offset)
    if slot_activations is not None:
        activation = tl.load(slot_activations + place, mask=is_slot, other=0)
        is_block = is_block & (activation >= 0) & (activation < 5)
    is_sane = (slot == -1) | (is_slot & ((rank == 0) | ((rank > 0) & is_block)))
    return is_sane, place, offset, tl.where(is_sane, rank, 0)
