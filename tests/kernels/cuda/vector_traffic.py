"""What the kernel for grouped vectors (IA3, BitFit) moves, counted by the emulator, beside the least."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from emulator.harness import counters, emulated
from kernels.cuda.gemv_traffic import TrafficRow

import hmi_kernels

__all__ = ["traffic_rows"]


class Shape(NamedTuple):
    hidden_size: int
    segments: int
    tokens: int
    """Of each segment."""


SHAPES = (
    Shape(768, 32, 1),
    Shape(768, 8, 20),
    Shape(768, 4, 128),
    Shape(3072, 2, 1024),  # tiles of 8 rows
    Shape(1024, 5, 1000),  # tiles of 16 rows
    Shape(4096, 2, 64),
)
OPERATIONS = {"scale": hmi_kernels.grouped_scale, "bias": hmi_kernels.grouped_bias}


def traffic_rows() -> list[TrafficRow]:
    """Least: rows read and written once, the vector once a segment, however many tiles that has."""
    return [_traffic_row(name, shape) for name in OPERATIONS for shape in SHAPES]


def _traffic_row(name: str, shape: Shape) -> TrafficRow:
    hidden_size, segments, tokens = shape
    rows, arena = (
        torch.randn(segments * tokens, hidden_size).half(),
        torch.randn(segments * hidden_size).half(),
    )
    offsets = torch.tensor([0, *accumulate([tokens] * segments)])
    slots, slot_offsets = torch.arange(segments, dtype=torch.int32), torch.arange(segments) * hidden_size
    with emulated("count"):
        OPERATIONS[name](rows, arena, offsets, slots, slot_offsets)
        launches = counters()
    return TrafficRow(
        f"{name} {hidden_size}; {segments} x {tokens} token{'s' * (tokens > 1)}",
        len(launches),
        sum(launch.block_bytes for launch in launches),
        2 * rows.nbytes + arena.nbytes,
        sum(launch.excess_wavefronts for launch in launches),
    )
