"""Grouped adapters: one program adds one projection's adapter to one tile of one segment's tokens.

Data movement: the tile's inputs and the segment's first matrix stream by, in chunks of columns, into sums of
[rows, rank] in registers; activated and rounded, these stay on chip as the left factor of the second matrix,
which streams by in chunks of output columns, each added to the output in place. Projections of one call are
the second axis of the grid: the inputs that they share come from the cache after the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmi_kernels.settings import is_triton_interpreted
from hmi_kernels.triton.language import Block, Pointer, Scalar, activate, dot, find_segment_tile, rounded
from hmi_kernels.triton.layer_norm import MAX_HIDDEN_SIZE, normalize_segments

if TYPE_CHECKING:
    from hmi_kernels.adapters import BottleneckArguments, LoraArguments

__all__ = ["grouped_bottleneck", "grouped_bottleneck_refuses", "grouped_lora", "grouped_lora_refuses"]

MAX_RANK = 256
UNIT = 8
"""Elements that are read at a time where sizes, strides, offsets and ranks are its multiples."""

TILE_CONFIGS = [
    triton.Config({"tile_rows": 16}, num_warps=2, num_stages=3),
    triton.Config({"tile_rows": 16}, num_warps=4, num_stages=4),
    triton.Config({"tile_rows": 32}, num_warps=4, num_stages=3),
    triton.Config({"tile_rows": 64}, num_warps=4, num_stages=2),
    triton.Config({"tile_rows": 64}, num_warps=8, num_stages=3),
    triton.Config({"tile_rows": 128}, num_warps=8, num_stages=2),
]
"""Tried for each new shape. Those with tiles of more than twice a segment's tokens are left out."""

CHUNKS = {1: 64, 64: 64, 128: 32, 256: 32}
"""Columns of a chunk by the least rank block: with wider ones two stages would not fit 64 KiB of shared memory."""


def _fitting_configs(configs: list[Any], named: dict[str, Any], **_: Any) -> list[Any]:
    limit = max(16, 2 * int(named["tokens_per_segment"]))
    return [config for config in configs if config.kwargs["tile_rows"] <= limit]
