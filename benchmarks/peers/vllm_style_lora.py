"""LoRA by two Triton kernels, shrink and expand, in the design of vLLM's ``lora/ops/triton_ops``.

The design is theirs (vLLM project, after Punica, Chen et al., arXiv 2310.18547), written anew: tokens sorted
by adapter, one program for a tile of one adapter's tokens; shrink splits the depth over programs that add to
a zeroed float32 buffer atomically; expand reads that buffer, casts, multiplies, adds to the output. Weights
are stacked, ``a`` [adapters, rank, in] and ``b`` [adapters, out, rank], all padded to the largest rank, with
the scale folded into ``b``, as vLLM does when it loads them. Two things are easier on it here than there: the
grid is as deep as the longest segment, not as all tokens, and of a few tilings, their default first, the one
that is fastest on the very inputs is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmi_kernels.triton.language import dot, rounded

__all__ = ["Tiling", "VllmStyleLora"]


class Tiling(NamedTuple):
    """Sizes of a program's tile, over how many programs the depth is split, and Triton's two numbers."""

    rows: int
    columns: int
    depth: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 2


def shrink_tilings(num_tokens: int) -> tuple[Tiling, ...]:
    """vLLM's default for this number of tokens, then others."""
    default = Tiling(32, 16, 256, 64) if num_tokens < 128 else Tiling(32, 16, 32, 8)
    return (default, Tiling(16, 16, 128, 4, num_stages=3), Tiling(32, 32, 64, 2, num_stages=4))


RANK_MULTIPLE = 16
"""What ranks are padded to: Triton reads 16 bytes at a time only of strides that are multiples of 16."""

EXPAND_TILINGS = (Tiling(64, 128, 32), Tiling(16, 128, 16), Tiling(32, 64, 16, num_stages=3))
"""vLLM's default, then others."""


@triton.jit  # type: ignore[untyped-decorator]
def _tile_rows(
    token_order: tl.tensor, num_tokens_of: tl.tensor, first_token_of: tl.tensor, adapter: tl.tensor,
    tile_rows: tl.constexpr, tiles: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """The tokens of this program's tile, cyclically, and how many there are; none: nothing to do."""
    tile = tl.program_id(0) % tiles
    count = tl.minimum(tl.load(num_tokens_of + adapter) - tile * tile_rows, tile_rows)
    places = tl.arange(0, tile_rows) % tl.maximum(count, 1)
    first = tl.load(first_token_of + adapter) + tile * tile_rows
    tokens = tl.load(token_order + first + places, mask=places < count, other=0)
    return tokens.to(tl.int64), count


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(
    hidden_states: tl.tensor, weights: tl.tensor, inner: tl.tensor,
    token_order: tl.tensor, num_tokens_of: tl.tensor, first_token_of: tl.tensor,
    rank: tl.tensor, in_size: tl.tensor, row_stride: tl.tensor, tiles: tl.tensor, column_tiles: tl.tensor,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr, splits: tl.constexpr,
    is_even: tl.constexpr,
) -> None:  # fmt: skip
    adapter = tl.program_id(1)
    tokens, count = _tile_rows(token_order, num_tokens_of, first_token_of, adapter, tile_rows, tiles)
    if count <= 0:
        return
    rest = tl.program_id(0) // tiles
    split, column_tile = rest // column_tiles, rest % column_tiles
    columns = column_tile * tile_columns + tl.arange(0, tile_columns)
    read_columns = columns % rank
    depth = split * tile_depth + tl.arange(0, tile_depth)
    left = hidden_states + tokens[:, None] * row_stride + depth[None, :]
    block = weights + adapter.to(tl.int64) * rank * in_size
    right = block + read_columns[None, :] * in_size + depth[:, None]
    sums = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    for step in range(tl.cdiv(in_size, tile_depth * splits)):
        if is_even:
            a, b = tl.load(left), tl.load(right)
        else:
            remaining = in_size - step * tile_depth * splits
            a = tl.load(left, mask=depth[None, :] < remaining, other=0)
            b = tl.load(right, mask=depth[:, None] < remaining, other=0)
        sums = dot(a, b, sums)
        left += tile_depth * splits
        right += tile_depth * splits
    place = inner + tokens[:, None] * rank + columns[None, :]
    mask = (tl.arange(0, tile_rows)[:, None] < count) & (columns[None, :] < rank)
    if splits == 1:
        tl.store(place, sums, mask=mask)
    else:
        tl.atomic_add(place, sums, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _expand(
    inner: tl.tensor, weights: tl.tensor, output: tl.tensor,
    token_order: tl.tensor, num_tokens_of: tl.tensor, first_token_of: tl.tensor,
    rank: tl.tensor, out_size: tl.tensor, row_stride: tl.tensor, tiles: tl.tensor,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr, is_even: tl.constexpr,
) -> None:  # fmt: skip
    adapter = tl.program_id(1)
    tokens, count = _tile_rows(token_order, num_tokens_of, first_token_of, adapter, tile_rows, tiles)
    if count <= 0:
        return
    columns = (tl.program_id(0) // tiles) * tile_columns + tl.arange(0, tile_columns)
    read_columns = columns % out_size
    depth = tl.arange(0, tile_depth)
    left = inner + tokens[:, None] * rank + depth[None, :]
    block = weights + adapter.to(tl.int64) * rank * out_size
    right = block + read_columns[None, :] * rank + depth[:, None]
    sums = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    for step in range(tl.cdiv(rank, tile_depth)):
        if is_even:
            a, b = tl.load(left), tl.load(right)
        else:
            remaining = rank - step * tile_depth
            a = tl.load(left, mask=depth[None, :] < remaining, other=0)
            b = tl.load(right, mask=depth[:, None] < remaining, other=0)
        sums = dot(rounded(a, b.dtype), b, sums)
        left += tile_depth
        right += tile_depth
    place = output + tokens[:, None] * row_stride + columns[None, :]
    mask = (tl.arange(0, tile_rows)[:, None] < count) & (columns[None, :] < out_size)
    before = tl.load(place, mask=mask)
    total = before.to(tl.float32) + sums
    tl.store(place, rounded(total, before.dtype), mask=mask)


class VllmStyleLora:
    """``output += (x @ a) @ b`` for segments with an adapter each."""

    name = "vLLM-style Triton"
    description = (
        "shrink and expand in the design of vLLM's Triton kernels, the fastest of three tilings each"
    )

    def __init__(
        self,
        blocks: Sequence[tuple[Tensor, Tensor]],
        bounds: Sequence[int],
        *,
        seconds: Callable[[Callable[[], object]], float] | None,
    ) -> None:
        """``blocks[g]``: ``a`` [in, R] and ``b`` [R, out] of tokens ``bounds[g]`` to ``bounds[g+1]``.

        ``seconds`` measures a call, to choose tilings by; None takes vLLM's default.
        """
        a, b = blocks[0]
        self._rank = -(-max(first.shape[1] for first, _ in blocks) // RANK_MULTIPLE) * RANK_MULTIPLE
        self._in_size, self._out_size = a.shape[0], b.shape[1]
        self._a = a.new_zeros(len(blocks), self._rank, self._in_size)
        self._b = a.new_zeros(len(blocks), self._out_size, self._rank)
        for adapter, (first, second) in enumerate(blocks):
            self._a[adapter, : first.shape[1]] = first.T
            self._b[adapter, :, : first.shape[1]] = second.T
        lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
        self._longest = max(lengths)
        self._counts = torch.tensor(lengths, dtype=torch.int32, device=a.device)
        self._starts = torch.tensor(bounds[:-1], dtype=torch.int32, device=a.device)
        self._order = torch.arange(bounds[-1], dtype=torch.int32, device=a.device)
        self._inner = torch.empty(bounds[-1], self._rank, dtype=torch.float32, device=a.device)
        self._shrink_tiling = shrink_tilings(bounds[-1])[0]
        self._expand_tiling = EXPAND_TILINGS[0]
        if seconds is not None:
            self._tune(seconds)

    def run(self, output: Tensor, hidden_states: Tensor) -> None:
        """Adds the adapters' output [T, out] to ``output`` in place."""
        self._run_shrink(self._shrink_tiling, hidden_states)
        self._run_expand(self._expand_tiling, output)

    def _tune(self, seconds: Callable[[Callable[[], object]], float]) -> None:
        x = torch.randn(len(self._order), self._in_size, dtype=self._a.dtype, device=self._a.device)
        output = torch.zeros(len(self._order), self._out_size, dtype=x.dtype, device=x.device)
        shrinks = shrink_tilings(len(self._order))
        self._shrink_tiling = min(shrinks, key=lambda tiling: seconds(lambda: self._run_shrink(tiling, x)))
        expands = EXPAND_TILINGS
        self._expand_tiling = min(
            expands, key=lambda tiling: seconds(lambda: self._run_expand(tiling, output))
        )

    def _segments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._order, self._counts, self._starts

    def _run_shrink(self, tiling: Tiling, hidden_states: Tensor) -> None:
        tiles, column_tiles = triton.cdiv(self._longest, tiling.rows), triton.cdiv(self._rank, tiling.columns)
        if tiling.splits > 1:
            self._inner.zero_()
        kernel: Any = _shrink
        kernel[(tiling.splits * tiles * column_tiles, len(self._counts))](
            hidden_states, self._a, self._inner, *self._segments(),
            self._rank, self._in_size, hidden_states.stride(0), tiles, column_tiles,
            tile_rows=tiling.rows, tile_columns=tiling.columns, tile_depth=tiling.depth, splits=tiling.splits,
            is_even=self._in_size % (tiling.depth * tiling.splits) == 0,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip

    def _run_expand(self, tiling: Tiling, output: Tensor) -> None:
        tiles, column_tiles = (
            triton.cdiv(self._longest, tiling.rows),
            triton.cdiv(self._out_size, tiling.columns),
        )
        kernel: Any = _expand
        kernel[(tiles * column_tiles, len(self._counts))](
            self._inner, self._b, output, *self._segments(),
            self._rank, self._out_size, output.stride(0), tiles,
            tile_rows=tiling.rows, tile_columns=tiling.columns, tile_depth=tiling.depth,
            is_even=self._rank % tiling.depth == 0,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip
