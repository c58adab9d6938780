"""One block of a GPT-2-architecture decoder, with the places where adapters act."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from hmi_engine.models.gpt2_loading import Gpt2Configuration
from hmi_engine.models.layer_parts import AdapterApplication, AdapterPlaces, LayerNorm
from hmi_engine.models.linear import SharedLinear

__all__ = ["Attend", "Gpt2Block"]

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of layer i: queries, keys and values [T, H] of new tokens -> [T, H]; it knows who sees whom."""


class Gpt2Block:
    """LayerNorm, attention, LayerNorm, feed-forward network (Radford et al. 2019), for packed tokens.

    Sites have the names of an encoder's (``hmi_engine.knowledge.adapter_kinds.sites``). Residuals are added
    without a LayerNorm behind them here, so a bottleneck ``after_ffn_normalized`` acts on the sum itself, and
    ``attention_norm.bias`` and ``ffn_norm.bias`` belong to ``ln_1`` and ``ln_2``: as in AdapterHub's GPT-2.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], index: int, configuration: Gpt2Configuration
    ) -> None:
        def linear(name: str) -> SharedLinear:
            prefix = f"h.{index}.{name}"
            # transformers' Conv1D keeps [in, out]
            return SharedLinear(tensors[f"{prefix}.weight"].T, tensors[f"{prefix}.bias"])

        def layer_norm(name: str) -> LayerNorm:
            prefix = f"h.{index}.{name}"
            return LayerNorm(
                tensors[f"{prefix}.weight"], tensors[f"{prefix}.bias"], configuration.layer_norm_eps
            )

        self.index = index
        self.num_heads = configuration.num_heads
        self._gelu = configuration.activation
        self.attention_norm = layer_norm("ln_1")
        self.query_key_value = linear("attn.c_attn")
        self.attention_output = linear("attn.c_proj")
        self.ffn_norm = layer_norm("ln_2")
        self.ffn_up = linear("mlp.c_fc")
        self.ffn_down = linear("mlp.c_proj")

    def forward(
        self, hidden_states: torch.Tensor, attend: Attend, adapters: AdapterApplication | None = None
    ) -> torch.Tensor:
        """hidden_states [T, H] -> [T, H]."""
        at = AdapterPlaces(self.index, adapters, at_readout=False)
        normalized = self.attention_norm(hidden_states)
        at.change("attention_norm.bias", normalized)
        projections = self.query_key_value(normalized)
        at.after_projections(projections, normalized)
        context = attend(self.index, *projections.chunk(3, dim=-1))
        at.change("attention_output.input_scale", context)
        attended = self.attention_output(context)
        at.after_linear("attention_output", attended, context)
        at.add("after_attention", attended, attended)
        return self._feed_forward(attended.add_(hidden_states), at)

    def _feed_forward(self, residual: torch.Tensor, at: AdapterPlaces) -> torch.Tensor:
        normalized = self.ffn_norm(residual)
        at.change("ffn_norm.bias", normalized)
        at.change("ffn_up.input_scale", normalized)
        inner = self._inner(normalized, at)
        at.change("ffn_down.input_scale", inner)
        output = self.ffn_down(inner)
        at.after_linear("ffn_down", output, inner)
        at.add("after_ffn", output, output)
        at.add("parallel_ffn", output, residual)
        output.add_(residual)
        at.add("after_ffn_normalized", output, output)
        return output

    def _inner(self, normalized: torch.Tensor, at: AdapterPlaces) -> torch.Tensor:
        """The feed-forward network's inner state [T, inner], after the activation.

        Never in one pass with the product: that rounds otherwise, and a tenant whose neighbors have blocks
        there would get other bits than alone.
        """
        inner = self.ffn_up(normalized)
        at.after_linear("ffn_up", inner, normalized)
        return functional.gelu(inner, approximate=self._gelu)
