"""What layers of every architecture consist of: LayerNorm, and the places where adapters act."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

__all__ = ["AdapterApplication", "AdapterPlaces", "LayerNorm"]


class AdapterApplication(Protocol):
    """What a layer asks of a batch's adapters. Sites are named as in ``hmi_engine.knowledge.adapters``."""

    def is_used(self, layer: int, site: str) -> bool:
        """Whether any tenant of the batch has a block at this place."""

    def apply(
        self, layer: int, site: str, output: torch.Tensor, hidden_states: torch.Tensor, *, readout: bool
    ) -> None:
        """Changes ``output`` [*, out] in place as each token's adapter says; may read ``hidden_states``.

        ``readout`` tells that the rows are those of the batch's :class:`Readout`, not all its tokens.
        """

    def apply_projections(self, layer: int, output: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds LoRA to queries, keys and values [T, 3H], side by side in ``output``, by one call."""


class LayerNorm:
    """LayerNorm over the last dimension, with weight and bias [H]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., H]."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


_AFTER_LINEAR = {
    linear: (linear, f"{linear}.bias", f"{linear}.scale")
    for linear in ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")
}
"""What acts on a linear layer's output, in this order: LoRA, bias, scale."""

_PROJECTIONS = ("query", "key", "value")


class AdapterPlaces:
    """The places of one layer where a batch's adapters act."""

    def __init__(self, layer: int, adapters: AdapterApplication | None, at_readout: bool) -> None:
        self._layer, self._adapters, self._at_readout = layer, adapters, at_readout

    def is_used(self, site: str) -> bool:
        """Whether any tenant of the batch has a block there."""
        return self._adapters is not None and self._adapters.is_used(self._layer, site)

    def is_used_after_linear(self, linear: str) -> bool:
        """Whether one acts on this linear layer's output."""
        return any(self.is_used(site) for site in _AFTER_LINEAR[linear])

    def add(self, site: str, output: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds to ``output`` what blocks with matrices make of ``hidden_states``."""
        if self._adapters is not None and self._adapters.is_used(self._layer, site):
            if hidden_states is output:
                hidden_states = output.clone()  # kernels read rows that others write
            self._adapters.apply(self._layer, site, output, hidden_states, readout=self._at_readout)

    def change(self, site: str, rows: torch.Tensor) -> None:
        """Scales ``rows`` or adds a bias to them; needs nothing else."""
        if self._adapters is not None and self._adapters.is_used(self._layer, site):
            self._adapters.apply(self._layer, site, rows, rows, readout=self._at_readout)

    def after_projections(self, output: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """All that acts on queries, keys and values of all tokens, side by side in ``output`` [T, 3H]."""
        if self._adapters is None:
            return
        if any(map(self.is_used, _PROJECTIONS)):
            self._adapters.apply_projections(self._layer, output, hidden_states)
        for place, linear in enumerate(_PROJECTIONS):
            for site in _AFTER_LINEAR[linear][1:]:
                if self.is_used(site):
                    self.change(site, output.chunk(len(_PROJECTIONS), dim=-1)[place])

    def after_linear(self, linear: str, output: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """All that acts on a linear layer's output."""
        lora, bias, scale = _AFTER_LINEAR[linear]
        self.add(lora, output, hidden_states)
        self.change(bias, output)
        self.change(scale, output)
