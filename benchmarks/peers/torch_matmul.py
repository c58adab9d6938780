"""Adapters by torch.matmul: one dense adapter of the same total size, and a loop over the segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["DenseAdapter", "LoopedAdapters"]


class DenseAdapter:
    """The bar: one adapter for all tokens, two products and nothing else; no activation, no grouping.

    It is the fastest that plain torch computes as many multiplications, though not the same function: tenants
    would have to share their weights.
    """

    name = "torch.matmul of the same size"
    description = "one adapter for all tokens: two products, no activation, no bias, no scale"

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """``down`` [in, R], ``up`` [R, out]."""
        self._down, self._up = down, up

    def run(self, output: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds the adapter's output [T, out] to ``output`` in place."""
        output.addmm_(hidden_states @ self._down, self._up)


class LoopedAdapters:
    """What PEFT does: two small products for each segment, one after the other."""

    name = "torch.matmul, segment by segment"
    description = "two products for each segment with its own weights; no activation, no bias"

    def __init__(self, blocks: Sequence[tuple[torch.Tensor, torch.Tensor]], bounds: Sequence[int]) -> None:
        """``blocks[g]``: ``down`` [in, R] and ``up`` [R, out] of tokens ``bounds[g]`` to ``bounds[g+1]``."""
        self._blocks = list(blocks)
        self._bounds = list(bounds)

    def run(self, output: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds each segment's adapter output to ``output`` [T, out] in place."""
        for (down, up), start, end in zip(self._blocks, self._bounds[:-1], self._bounds[1:], strict=True):
            output[start:end].addmm_(hidden_states[start:end] @ down, up)
