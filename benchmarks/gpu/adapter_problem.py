"""Grouped adapters to be measured: shapes, inputs, and what is right."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

import hmi_kernels
from benchmarks.gpu.costs import Cost, bottleneck_cost, lora_cost, vector_cost
from benchmarks.peers.batched_adapters import AdapterWeights

__all__ = ["AdapterProblem", "AdapterShape", "Kind"]

Kind = Literal["lora", "bottleneck", "vectors"]
LAYER_NORM_EPS = 1e-12
BLOCK_MULTIPLE = 64
"""Elements to which blocks are aligned in the arena, as the engine's are: whole cache lines."""


@dataclass(frozen=True)
class AdapterShape:
    """``lengths`` are tokens of the segments; their ranks are ``ranks`` in turn."""

    kind: Kind
    hidden_size: int
    ranks: tuple[int, ...]
    lengths: tuple[int, ...]
    dtype: torch.dtype

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(tokens, rank) of each segment."""
        return list(zip(self.lengths, itertools.cycle(self.ranks), strict=False))

    @property
    def name(self) -> str:
        """For tables."""
        ranks = "" if self.kind == "vectors" else f", rank {'/'.join(map(str, self.ranks))}"
        tokens = str(self.lengths[0]) if len(set(self.lengths)) == 1 else "ragged"
        type_name = str(self.dtype).removeprefix("torch.")
        batch = f"{len(self.lengths)} x {tokens} tokens"
        return f"{self.kind}: hidden {self.hidden_size}{ranks}, {batch}, {type_name}"

    @property
    def cost(self) -> Cost:
        """The least bytes and operations."""
        element_bytes, size = self.dtype.itemsize, self.hidden_size
        if self.kind == "lora":
            return lora_cost(self.segments, input_size=size, output_sizes=[size], element_bytes=element_bytes)
        if self.kind == "bottleneck":
            return bottleneck_cost(
                self.segments, hidden_size=size, element_bytes=element_bytes, has_layer_norm=True
            )
        return vector_cost(self.lengths, hidden_size=size, element_bytes=element_bytes)


class AdapterProblem:
    """Random inputs of a shape, the same weights for all systems.

    Weights are scaled so that the adapters add about as much as the output holds: an output that lacks an
    adapter is far from right.
    """

    def __init__(self, shape: AdapterShape, device: torch.device) -> None:
        self.shape = shape
        self.bounds = [0, *itertools.accumulate(shape.lengths)]
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(shape.dtype)

        self.hidden_states = random(self.bounds[-1], shape.hidden_size)
        self.output = random(self.bounds[-1], shape.hidden_size)
        sizes = [self._block_size(rank) for _, rank in shape.segments]
        starts = [0, *itertools.accumulate(-(-size // BLOCK_MULTIPLE) * BLOCK_MULTIPLE for size in sizes)]
        self.arena = random(starts[-1])
        self.weights = self._scaled_weights(starts)
        self.segment_offsets = torch.tensor(self.bounds, device=device)
        self.segment_slots = torch.arange(len(shape.lengths), dtype=torch.int32, device=device)
        self.slot_offsets = torch.tensor(starts[:-1], device=device)
        ranks = [rank for _, rank in shape.segments]
        self.slot_ranks = torch.tensor(ranks, dtype=torch.int32, device=device)
        gelu = hmi_kernels.ACTIVATIONS.index("gelu")
        self.slot_activations = torch.full_like(self.slot_ranks, gelu)
        self.slot_scales = torch.ones(len(ranks), device=device)

    def _block_size(self, rank: int) -> int:
        size = self.shape.hidden_size
        return {"lora": 2 * size * rank, "bottleneck": 2 * size * rank + rank + size, "vectors": size}[
            self.shape.kind
        ]

    def _scaled_weights(self, starts: list[int]) -> AdapterWeights:
        """Views of the blocks, which are scaled in the arena."""
        size, kind = self.shape.hidden_size, self.shape.kind
        down, up, biases = [], [], []
        for (_, rank), start in zip(self.shape.segments, starts[:-1], strict=True):
            if kind == "vectors":
                # A sign, and a size that neither vanishes nor overflows in calls on the same rows.
                vector = self.arena[start : start + size]
                vector.copy_(vector.sign() * (1 + 0.05 * vector))
                continue
            has_biases = kind == "bottleneck"
            parts = [size * rank, rank * has_biases, rank * size, size * has_biases]
            block = self.arena[start : start + sum(parts)].split(parts)
            down.append(block[0].view(size, rank).mul_(size**-0.5))
            up.append(block[2].view(rank, size).mul_(rank**-0.5))
            if has_biases:
                biases.append((block[1], block[3]))
        norm = None
        if kind == "bottleneck":
            self.norm_weight = 1 + torch.zeros_like(self.output[0]).normal_(std=0.1)
            self.norm_bias = torch.zeros_like(self.output[0]).normal_(std=0.1)
            norm = self.norm_weight, self.norm_bias, LAYER_NORM_EPS
        return AdapterWeights(down, up, biases, norm, self.bounds)

    def run_ours(self, output: Tensor) -> None:
        """The op, on whatever backend is chosen."""
        segments = self.arena, self.segment_offsets, self.segment_slots, self.slot_offsets
        if self.shape.kind == "vectors":
            hmi_kernels.grouped_scale(output, *segments)
            return
        max_rank = max(self.shape.ranks)
        adapters = output, self.hidden_states, *segments, self.slot_ranks
        if self.shape.kind == "lora":
            hmi_kernels.grouped_lora(*adapters, self.slot_scales, max_rank=max_rank)
            return
        hmi_kernels.grouped_bottleneck(
            *adapters,
            self.slot_activations,
            self.slot_scales,
            layer_norm_weight=self.norm_weight,
            layer_norm_bias=self.norm_bias,
            layer_norm_eps=LAYER_NORM_EPS,
            max_rank=max_rank,
        )

    @cached_property
    def expected(self) -> Tensor:
        """What ``output`` should become, [T, H] float32, computed in float32."""
        result, weights = self.output.float(), self.weights
        x = self.hidden_states.float()
        for segment, (begin, end) in enumerate(itertools.pairwise(self.bounds)):
            if self.shape.kind == "vectors":
                start = int(self.slot_offsets[segment])
                result[begin:end] *= self.arena[start : start + self.shape.hidden_size].float()
                continue
            inner = x[begin:end] @ weights.down[segment].float()
            if self.shape.kind == "bottleneck":
                inner = functional.gelu(inner + weights.biases[segment][0].float())
                result[begin:end] += weights.biases[segment][1].float()
            result[begin:end] += inner @ weights.up[segment].float()
        if weights.layer_norm is not None:
            weight, bias, epsilon = weights.layer_norm
            result = functional.layer_norm(result, weight.shape, weight.float(), bias.float(), epsilon)
        return result
