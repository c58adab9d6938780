"""What the adapter kernel on tensor cores moves, counted by the emulator, beside the least."""

from __future__ import annotations

from typing import Any, NamedTuple

from emulator.harness import counters, emulated
from kernels.cuda.adapter_cases import AdapterCase, make_case
from kernels.cuda.gemv_traffic import TrafficRow

__all__ = ["traffic_rows"]

SEGMENTS = 2
TOKENS_OF_CALL = {16: 150, 32: 2000, 64: 3500}
"""Calls with so many tokens have tiles of so many rows; those beside the segments' own cost nothing."""


class Bottleneck(NamedTuple):
    hidden_size: int
    rank: int
    tile_rows: int
    tokens: int
    """Of each segment."""
    has_layer_norm: bool = False


class Lora(NamedTuple):
    input_size: int
    output_sizes: tuple[int, ...]
    rank: int
    tile_rows: int
    tokens: int


SHAPES: tuple[Bottleneck | Lora, ...] = (
    Bottleneck(384, 16, 64, 64),
    Bottleneck(768, 16, 16, 16),
    Bottleneck(768, 48, 32, 32),
    Bottleneck(768, 64, 64, 64),
    Bottleneck(768, 64, 64, 256),
    Bottleneck(768, 64, 32, 32, has_layer_norm=True),
    Bottleneck(1024, 128, 64, 64),
    Bottleneck(1024, 256, 64, 64),
    Bottleneck(1032, 64, 64, 50),
    Bottleneck(4096, 64, 64, 64),
    Bottleneck(4096, 16, 16, 16, has_layer_norm=True),
    Bottleneck(4096, 256, 16, 16, has_layer_norm=True),
    Lora(768, (768, 768, 768), 16, 64, 64),
    Lora(768, (768, 768, 768), 8, 64, 200),
    Lora(1024, (1024, 1024, 1024), 128, 64, 64),
    Lora(4096, (4096, 1024, 1024), 16, 64, 64),
    Lora(4096, (4096,), 64, 64, 64),
)


def traffic_rows() -> list[TrafficRow]:
    """Least: inputs and outputs read once, outputs written once, weights once for each tile.

    Tiles of one segment read the same weights, from the second-level cache if it holds them. On both sides
    they count each time here, as the emulator has no caches.
    """
    return [_traffic_row(shape) for shape in SHAPES]


def _traffic_row(shape: Bottleneck | Lora) -> TrafficRow:
    case = _case(shape)
    with emulated("count"):
        plan = case.plan()
        case.run()
        launches = counters()
    if plan.kernel == "tiles" and plan.tile_rows != shape.tile_rows:
        raise ValueError(f"{shape} has {plan.kernel} of {plan.tile_rows} rows: change its tile_rows")
    tiles = -(-shape.tokens // plan.tile_rows)
    blocks = f"{tiles} {plan.kernel} of {plan.tile_rows} rows each"
    return TrafficRow(
        f"{_name(shape)}; {SEGMENTS} x {shape.tokens} tokens, {blocks}",
        len(launches),
        sum(launch.block_bytes for launch in launches),
        _least_bytes(case, tiles),
        sum(launch.excess_wavefronts for launch in launches),
    )


def _case(shape: Bottleneck | Lora) -> AdapterCase:
    lengths = [shape.tokens] * SEGMENTS
    options: dict[str, Any] = {"num_tokens": TOKENS_OF_CALL[shape.tile_rows], "is_aligned": True}
    if isinstance(shape, Bottleneck):
        ranks, activations = [[shape.rank] * SEGMENTS], ["gelu"] * SEGMENTS
        options |= {"activations": activations, "has_layer_norm": shape.has_layer_norm}
        return make_case(lengths, hidden_size=shape.hidden_size, ranks=ranks, **options)
    ranks = [[shape.rank] * SEGMENTS for _ in shape.output_sizes]
    return make_case(
        lengths, hidden_size=shape.input_size, output_sizes=shape.output_sizes, ranks=ranks, **options
    )


def _name(shape: Bottleneck | Lora) -> str:
    if isinstance(shape, Bottleneck):
        norm = " and layer norm" if shape.has_layer_norm else ""
        return f"bottleneck {shape.hidden_size}, rank {shape.rank}{norm}"
    sizes = ", ".join(map(str, shape.output_sizes))
    return f"LoRA {shape.input_size} to {sizes}, rank {shape.rank}"


def _least_bytes(case: AdapterCase, tiles: int) -> int:
    input_size, output_size = case.hidden_states.shape[1], case.output.shape[1]
    has_biases = case.slot_activations is not None
    elements: int = 0
    for rows, slot in case.segments():
        ranks = case.slot_ranks[:, slot].tolist()
        weights = sum(
            rank * (input_size + size) + (rank + size) * has_biases
            for rank, size in zip(ranks, case.output_sizes, strict=True)
        )
        layer_norm = 0 if case.layer_norm is None else 2 * output_size
        elements += (rows.stop - rows.start) * (input_size + 2 * output_size) + tiles * (weights + layer_norm)
    return elements * int(case.output.element_size())
