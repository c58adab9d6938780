"""Adapters of many segments by torch alone: segment by segment, by padded ``bmm``, by ``_grouped_mm``.

Each gets its best case: weights stacked beforehand, scales folded into them, ranks padded with zeros once, no
padding of tokens where all segments are equally long, one layer norm over all tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "AdapterWeights",
    "GroupedProducts",
    "LoopedBottleneck",
    "LoopedLora",
    "PaddedProducts",
    "grouped_mm",
]


@dataclass(frozen=True)
class AdapterWeights:
    """What all systems are given.

    Attributes:
        down: [in, R] of each segment.
        up: [R, out] of each segment.
        biases: of each segment, [R] and [out]; empty for LoRA.
        layer_norm: weight and bias [out], and epsilon; None for LoRA.
        bounds: segment g has the tokens ``bounds[g]`` to ``bounds[g + 1]``.
    """

    down: Sequence[Tensor]
    up: Sequence[Tensor]
    biases: Sequence[tuple[Tensor, Tensor]]
    layer_norm: tuple[Tensor, Tensor, float] | None
    bounds: Sequence[int]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [end - begin for begin, end in itertools.pairwise(self.bounds)]

    def normalize(self, output: Tensor) -> None:
        """The layer norm, if there is one, in place."""
        if self.layer_norm is not None:
            weight, bias, epsilon = self.layer_norm
            output.copy_(functional.layer_norm(output, weight.shape, weight, bias, epsilon))


class LoopedLora:
    """``output += (x @ a) @ b``, one segment after the other."""

    name = "torch, segment by segment"
    description = "two matrix products for each segment"

    def __init__(self, weights: AdapterWeights) -> None:
        """Takes the weights as they are."""
        self._weights = weights

    def run(self, output: Tensor, hidden_states: Tensor) -> None:
        """Adds to ``output`` [T, out] in place."""
        weights = self._weights
        for down, up, begin, end in zip(
            weights.down, weights.up, weights.bounds[:-1], weights.bounds[1:], strict=True
        ):
            output[begin:end].addmm_(hidden_states[begin:end] @ down, up)


class LoopedBottleneck:
    """``output = LayerNorm(output + gelu(x @ down + bias) @ up + bias)``, one segment after the other."""

    name = LoopedLora.name
    description = "two matrix products with biases and a GELU for each segment, one layer norm for all"

    def __init__(self, weights: AdapterWeights) -> None:
        """Takes the weights as they are."""
        self._weights = weights

    def run(self, output: Tensor, hidden_states: Tensor) -> None:
        """Changes ``output`` [T, H] in place."""
        weights = self._weights
        for segment, (begin, end) in enumerate(itertools.pairwise(weights.bounds)):
            down_bias, up_bias = weights.biases[segment]
            inner = torch.addmm(down_bias, hidden_states[begin:end], weights.down[segment])
            output[begin:end] += torch.addmm(up_bias, functional.gelu(inner), weights.up[segment])
        weights.normalize(output)


class _Stacked:
    """Weights of all segments in one tensor each, ranks padded with zeros."""

    def __init__(self, weights: AdapterWeights) -> None:
        self._weights = weights
        rank = max(down.shape[1] for down in weights.down)
        self._down = _stack([functional.pad(down, (0, rank - down.shape[1])) for down in weights.down])
        self._up = _stack([functional.pad(up, (0, 0, 0, rank - up.shape[0])) for up in weights.up])
        self._biases: tuple[Tensor, Tensor] | None = None
        if weights.biases:
            down_bias = _stack([functional.pad(bias, (0, rank - len(bias))) for bias, _ in weights.biases])
            self._biases = down_bias, _stack([bias for _, bias in weights.biases])


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).contiguous()


class PaddedProducts(_Stacked):
    """Segments padded to the longest, then ``torch.bmm``."""

    name = "torch.bmm, padded"
    description = "tokens gathered into [segments, longest, in], two batched products, gathered back"

    def __init__(self, weights: AdapterWeights) -> None:
        """Stacks the weights and makes the indexes by which tokens are padded and found again."""
        super().__init__(weights)
        lengths, longest = weights.lengths, max(weights.lengths)
        self._shape = (len(lengths), longest)
        self._from_tokens: Tensor | None = None
        if min(lengths) == longest:
            return
        device = self._down.device
        places = torch.arange(longest).expand(len(lengths), longest)
        starts, counts = torch.tensor(weights.bounds[:-1])[:, None], torch.tensor(lengths)[:, None]
        is_token = places < counts
        self._from_tokens = torch.where(is_token, starts + places, 0).flatten().to(device)
        self._to_tokens = is_token.flatten().nonzero().squeeze(1).to(device)

    def run(self, output: Tensor, hidden_states: Tensor) -> None:
        """Changes ``output`` [T, out] in place."""
        x = hidden_states if self._from_tokens is None else hidden_states[self._from_tokens]
        x = x.view(*self._shape, -1)
        if self._biases is None:
            added = torch.bmm(torch.bmm(x, self._down), self._up)
        else:
            inner = torch.baddbmm(self._biases[0][:, None], x, self._down)
            added = torch.baddbmm(self._biases[1][:, None], functional.gelu(inner), self._up)
        added = added.flatten(0, 1)
        output += added if self._from_tokens is None else added[self._to_tokens]
        self._weights.normalize(output)


def grouped_mm() -> Callable[..., Tensor] | None:
    """torch's grouped product, where this torch has one."""
    public = getattr(functional, "grouped_mm", None)
    found: Callable[..., Tensor] | None = public or getattr(torch, "_grouped_mm", None)
    return found


class GroupedProducts(_Stacked):
    """torch's own grouped product of ragged segments (CUTLASS on Hopper)."""

    name = "torch grouped_mm"
    description = "torch.nn.functional.grouped_mm or torch._grouped_mm, twice; ranks padded with zeros"

    def __init__(self, weights: AdapterWeights) -> None:
        """Raises RuntimeError where torch has no such product."""
        super().__init__(weights)
        function = grouped_mm()
        if function is None:
            raise RuntimeError(f"torch {torch.__version__} has neither grouped_mm nor _grouped_mm")
        self._product = function
        device = self._down.device
        self._ends = torch.tensor(weights.bounds[1:], dtype=torch.int32, device=device)
        segments = torch.arange(len(weights.lengths), device=device)
        self._segment_of_token = segments.repeat_interleave(torch.tensor(weights.lengths, device=device))

    def run(self, output: Tensor, hidden_states: Tensor) -> None:
        """Changes ``output`` [T, out] in place."""
        inner = self._product(hidden_states, self._down, offs=self._ends)
        if self._biases is not None:
            inner = functional.gelu(inner + self._biases[0][self._segment_of_token])
        output += self._product(inner, self._up, offs=self._ends)
        if self._biases is not None:
            output += self._biases[1][self._segment_of_token]
        self._weights.normalize(output)
