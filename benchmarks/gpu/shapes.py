"""What is measured: every shape of the benchmark stands in this file, the most telling first.

What the time does not suffice for is left out from the end, and said to be.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.adapter_problem import AdapterShape, Kind

__all__ = ["adapter_shapes", "has_slow_peers"]

HALF, BFLOAT = torch.float16, torch.bfloat16
MIXED = (8, 16, 64)
PREFILL, MANY, DECODE, FEW, LONG = (64,) * 32, (8,) * 256, (1,) * 1024, (1,) * 32, (512,) * 8
BATCH, STEADY = (64,) * 128, (64,) * 512
"""The largest batch that an engine forms by default, 8,192 tokens; and what keeps a GPU busy for long."""
RAGGED = tuple(max(1, 620 // (place + 1)) for place in range(32))
"""As requests come: few long, many short; 2,500 tokens."""

_FIRST: tuple[tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype], ...] = (
    (768, (16,), PREFILL, HALF),
    (768, (16,), BATCH, HALF),
    (768, (16,), STEADY, HALF),
    (768, (16,), DECODE, HALF),
    (768, (64,), BATCH, BFLOAT),
    (768, (16,), PREFILL, BFLOAT),
    (768, (16,), DECODE, BFLOAT),
    (768, (16,), FEW, HALF),
    (768, (16,), MANY, HALF),
    (768, (16,), LONG, HALF),
    (768, MIXED, RAGGED, BFLOAT),
    (768, MIXED, PREFILL, HALF),
    (768, MIXED, DECODE, HALF),
    (4096, (16,), PREFILL, HALF),
    (4096, (16,), PREFILL, BFLOAT),
    (4096, (16,), DECODE, HALF),
    (4096, (16,), LONG, BFLOAT),
    (384, (16,), PREFILL, HALF),
    (384, (16,), DECODE, HALF),
    (1024, (16,), PREFILL, HALF),
    (1024, (16,), DECODE, HALF),
)
_THEN = tuple(
    (hidden_size, ranks, lengths, dtype)
    for dtype in (HALF, BFLOAT)
    for ranks in ((8,), (64,), MIXED)
    for hidden_size in (768, 4096)
    for lengths in (PREFILL, DECODE, LONG, FEW, MANY)
)
_DRY = ((256, (8, 16), (3, 0, 1), HALF), (264, (8,), (2, 2), BFLOAT), (256, (16,), (40, 17), HALF))


def adapter_shapes(kind: Kind, *, is_dry: bool, is_quick: bool) -> list[AdapterShape]:
    """The shapes of a family, in the order in which they are measured; vectors have no ranks."""
    chosen = _DRY if is_dry else _FIRST[:2] if is_quick else tuple(dict.fromkeys((*_FIRST, *_THEN)))
    if kind == "vectors":
        chosen = tuple(dict.fromkeys((size, (1,), lengths, dtype) for size, _, lengths, dtype in chosen))
    return [AdapterShape(kind, *shape) for shape in chosen]


def has_slow_peers(shape: AdapterShape) -> bool:
    """Whether the peers that Triton must compile first (10 s and more a shape) take part in this shape."""
    return (shape.hidden_size, shape.ranks, shape.lengths, shape.dtype) in {*_FIRST, *_DRY}
