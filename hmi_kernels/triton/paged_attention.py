"""Attention over a paged cache: new keys and values are written first, then each tile of queries reads.

Method: online softmax over tiles of keys, as in "FlashAttention-2" (Dao, arXiv 2307.08691), with the blocks
of "PagedAttention" (Kwon et al., SOSP 2023).

Data movement: a program has the queries of one head of a tile of one sequence in registers and goes over the
sequence's tokens once, a tile of keys and values at a time, wherever their blocks lie. While texts are
generated a tile has one query, and the kernel moves the cache's bytes once for each head.
The tiles of keys are the same ones whichever queries come together, so that a query's result does not depend
on what came with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmi_kernels.triton.language import dot, rounded
from hmi_kernels.triton.segments import find_segment_tile, last_at_most, num_segment_tiles

if TYPE_CHECKING:
    from hmi_kernels.paged import PagedArguments

__all__ = ["paged_attention", "paged_attention_refuses"]

MAX_HEAD_SIZE = 256
TILE_QUERIES = 16
"""The least that a tensor core multiplies."""
TILE_KEYS = 64
_SMALLEST_FACTOR = 16
_LOG2_E = tl.constexpr(1.4426950408889634)


def paged_attention(arguments: PagedArguments) -> Tensor:
    """See :func:`hmi_kernels.paged_attention`."""
    query, output = arguments.query, arguments.new_output()
    num_tokens, num_sequences = query.shape[0], arguments.context_lengths.shape[0]
    if 0 in (num_tokens, num_sequences):
        return output.zero_()
    num_blocks, num_heads, head_size, block_size = arguments.key_cache.shape
    cache = (arguments.key_cache, arguments.value_cache, num_blocks, num_heads)
    sequences = (
        arguments.block_tables,
        arguments.block_tables.shape[1],
        arguments.query_offsets,
        arguments.context_lengths,
        num_sequences,
    )
    sizes = {"head_size": head_size, "block_size": block_size}
    with torch.cuda.device_of(query):
        _append_kernel[(num_tokens,)](
            arguments.key,
            arguments.key.stride(0),
            arguments.value,
            arguments.value.stride(0),
            num_tokens,
            *cache,
            *sequences,
            **sizes,
            columns=triton.next_power_of_2(query.shape[1]),
        )
        _attention_kernel[(num_segment_tiles(num_tokens, num_sequences, TILE_QUERIES), num_heads)](
            output,
            query,
            query.stride(0),
            num_tokens,
            *cache,
            *sequences,
            head_size**-0.5,
            **sizes,
            head_block=max(_SMALLEST_FACTOR, triton.next_power_of_2(head_size)),
            tile_queries=TILE_QUERIES,
            tile_keys=TILE_KEYS,
            num_warps=4,
        )
    return output


def paged_attention_refuses(arguments: PagedArguments) -> str:
    """Why these kernels cannot take the arguments; "" if they can."""
    head_size = arguments.key_cache.shape[2]
    if head_size > MAX_HEAD_SIZE:
        return f"key_cache must hold heads of at most {MAX_HEAD_SIZE} elements, not {head_size}"
    return ""


_COUNTS = ["num_tokens", "num_blocks", "num_sequences", "table_width"]


@triton.jit
def _find_context(
    sequence: tl.tensor,
    block_tables: tl.tensor,
    table_width: tl.tensor,
    query_offsets: tl.tensor,
    context_lengths: tl.tensor,
    block_size: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The (first of its table, number of its first new token's place less that of its first row, is sane)."""
    begin = tl.load(query_offsets + sequence)
    end = tl.load(query_offsets + sequence + 1)
    length = tl.load(context_lengths + sequence)
    is_sane = (begin >= 0) & (end - begin <= length) & (length <= table_width.to(tl.int64) * block_size)
    return block_tables + sequence * table_width, length - end, is_sane


@triton.jit(do_not_specialize=_COUNTS)
def _append_kernel(
    key: tl.tensor,
    key_stride: tl.tensor,
    value: tl.tensor,
    value_stride: tl.tensor,
    num_tokens: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    num_blocks: tl.tensor,
    num_heads: tl.tensor,
    block_tables: tl.tensor,
    table_width: tl.tensor,
    query_offsets: tl.tensor,
    context_lengths: tl.tensor,
    num_sequences: tl.tensor,
    head_size: tl.constexpr,
    block_size: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    """A token to a program: its keys and values to its place in the cache."""
    t = tl.program_id(0).to(tl.int64)
    sequence = last_at_most(query_offsets, num_sequences, t)
    table, shift, is_sane = _find_context(
        sequence, block_tables, table_width, query_offsets, context_lengths, block_size
    )
    position = t + shift
    is_sane = is_sane & (t < tl.load(query_offsets + sequence + 1)) & (position >= 0)
    block = tl.load(table + position // block_size, mask=is_sane, other=-1).to(tl.int64)
    is_sane = is_sane & (block >= 0) & (block < num_blocks)
    inside = position % block_size
    column = tl.arange(0, columns)
    mask = column < tl.where(is_sane, num_heads * head_size, 0)
    first = block * num_heads * head_size * block_size
    of_key = tl.load(key + t * key_stride + column, mask=mask)
    tl.store(key_cache + first + column * block_size + inside, of_key, mask=mask)
    of_value = tl.load(value + t * value_stride + column, mask=mask)
    place = (column // head_size * block_size + inside) * head_size + column % head_size
    tl.store(value_cache + first + place, of_value, mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def _attention_kernel(
    output: tl.tensor,
    query: tl.tensor,
    query_stride: tl.tensor,
    num_tokens: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    num_blocks: tl.tensor,
    num_heads: tl.tensor,
    block_tables: tl.tensor,
    table_width: tl.tensor,
    query_offsets: tl.tensor,
    context_lengths: tl.tensor,
    num_sequences: tl.tensor,
    scale: tl.tensor,
    head_size: tl.constexpr,
    block_size: tl.constexpr,
    head_block: tl.constexpr,
    tile_queries: tl.constexpr,
    tile_keys: tl.constexpr,
) -> None:
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    sequence, row, end = find_segment_tile(query_offsets, num_sequences, num_tokens, tile, tile_queries)
    if row < end:
        table, shift, is_sane = _find_context(
            sequence, block_tables, table_width, query_offsets, context_lengths, block_size
        )
        rows = row + tl.arange(0, tile_queries)
        columns = tl.arange(0, head_block)
        is_column = columns < head_size
        mask = (rows < end)[:, None] & is_column[None, :]
        of_head = head * head_size + columns[None, :]
        queries = tl.load(query + rows[:, None] * query_stride + of_head, mask=mask, other=0.0)
        # Rows behind the last see what it sees; nobody reads what they find.
        positions = tl.minimum(rows, end - 1) + shift
        num_keys = tl.where(is_sane, tl.minimum(row + tile_queries, end) + shift, 0)

        largest = tl.full([tile_queries], -float("inf"), tl.float32)
        total = tl.zeros([tile_queries], tl.float32)
        attended = tl.zeros([tile_queries, head_block], tl.float32)
        for first in range(0, num_keys, tile_keys):
            keys = first + tl.arange(0, tile_keys).to(tl.int64)
            block = tl.load(table + keys // block_size, mask=keys < num_keys, other=-1).to(tl.int64)
            is_key = (block >= 0) & (block < num_blocks)
            of_block = (tl.where(is_key, block, 0) * num_heads + head) * head_size * block_size
            inside = keys % block_size
            key = tl.load(
                key_cache + of_block[None, :] + (columns * block_size)[:, None] + inside[None, :],
                mask=is_key[None, :] & is_column[:, None],
                other=0.0,
            )
            scores = dot(queries, key, tl.zeros([tile_queries, tile_keys], tl.float32)) * (scale * _LOG2_E)
            is_seen = is_key[None, :] & (keys[None, :] <= positions[:, None])
            scores = tl.where(is_seen, scores, -float("inf"))
            # The first tile has the first token, which every query sees: from then on this is finite.
            new_largest = tl.maximum(tl.maximum(largest, tl.max(scores, axis=1)), -3.0e38)
            weights = tl.exp2(scores - new_largest[:, None])
            kept = tl.exp2(largest - new_largest)
            total = total * kept + tl.sum(weights, axis=1)
            value = tl.load(
                value_cache + of_block[:, None] + (inside * head_size)[:, None] + columns[None, :],
                mask=is_key[:, None] & is_column[None, :],
                other=0.0,
            )
            attended = dot(rounded(weights, value.dtype), value, attended * kept[:, None])
            largest = new_largest
        result = tl.where(is_sane, attended / tl.where(total == 0.0, 1.0, total)[:, None], 0.0)
        place = output + rows[:, None] * (num_heads * head_size) + of_head
        tl.store(place, rounded(result, output.dtype.element_ty), mask=mask)
