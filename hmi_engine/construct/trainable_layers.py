"""The upper layers with gradients for one tenant's adapter: the base is frozen, the batch is dense.

The serving layers (:mod:`hmi_engine.models.bert`) change packed tensors in place and loop over sequences,
which suits inference. Training instead pads sequences of nearly equal length to one shape, masks the padding
in attention, and changes nothing in place. A test holds both to the same result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from hmi_engine.construct.trainable_adapter import TrainableAdapter
from hmi_engine.construct.training_data import WordPlaces
from hmi_engine.knowledge.adapters import Site
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.bert_layer import BertLayer
from hmi_engine.models.linear import SharedLinear

__all__ = ["DenseBatch", "TrainableLayers"]

_LATE_SITES = (Site.AFTER_FFN, Site.AFTER_FFN_NORMALIZED, Site.PARALLEL_FFN, Site.FFN_NORM_BIAS)


@dataclass(frozen=True)
class DenseBatch:
    """Sequences padded to one length.

    Attributes:
        hidden_states: float32 [B, L, H], the input of the first trained layer, or with ``halfway``
            [B, L, 2H], what :meth:`TrainableLayers.start` made of it. What stands in padded places is finite
            and never read.
        lengths: int64 [B].
        halfway: which of the two.
    """

    hidden_states: Tensor
    lengths: Tensor
    halfway: bool = False

    def present(self) -> Tensor:
        """Bool [B, L]: true where there is a token."""
        return torch.arange(self.hidden_states.shape[1]) < self.lengths[:, None]

    def mask(self) -> Tensor | None:
        """The same as bool [B, 1, 1, L] for attention, None where nothing is padded."""
        present = self.present()
        return None if bool(present.all()) else present[:, None, None]


class _FrozenProduct(torch.autograd.Function):
    """A linear layer without gradients for its weights; both ways take the fastest path."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: _FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.shared(x.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.transposed(gradients[0].contiguous()), None


class _FrozenLinear:
    """``x @ weight.T + bias`` of a shared layer; gradients flow to ``x`` only."""

    def __init__(self, shared: SharedLinear) -> None:
        self.shared = shared

    @functools.cached_property
    def transposed(self) -> SharedLinear:
        """Takes gradients back through the layer; made at the first backward pass that reaches it."""
        return SharedLinear(self.shared.weight.T, torch.zeros(self.shared.weight.shape[1]))

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return result


class _TrainableLayer:
    """One layer, the same sites in the same order as :class:`~hmi_engine.models.bert_layer.BertLayer`."""

    def __init__(self, layer: BertLayer, adapter: TrainableAdapter) -> None:
        self._layer, self._adapter = layer, adapter
        self._query, self._key_value = _FrozenLinear(layer.query), _FrozenLinear(layer.key_value)
        self._query_key_value = _FrozenLinear(layer.query_key_value)
        self._attention_output = _FrozenLinear(layer.attention_output)
        self._ffn_up, self._ffn_down = _FrozenLinear(layer.ffn_up), _FrozenLinear(layer.ffn_down)

    def __call__(self, x: Tensor, mask: Tensor | None, *, first_only: bool) -> Tensor:
        """x [B, L, H], mask bool [B, 1, 1, L] -> [B, L, H], or [B, 1, H] with ``first_only``."""
        return self.finish(*self.start(x, mask, first_only=first_only)).view(len(x), -1, x.shape[-1])

    def start(self, x: Tensor, mask: Tensor | None, *, first_only: bool) -> tuple[Tensor, Tensor]:
        """The attention's result and the feed-forward network's before its adapters, both [*, H]."""
        batch, _, size = x.shape
        flat = x.reshape(-1, size)
        residual = x[:, 0] if first_only else flat
        if first_only:
            query = self._query(residual)
            key, value = self._key_value(flat).chunk(2, dim=-1)
        else:
            query, key, value = self._query_key_value(flat).chunk(3, dim=-1)
        query = self._after_linear("query", query, residual)
        key, value = self._after_linear("key", key, flat), self._after_linear("value", value, flat)
        heads = (batch, -1, self._layer.num_heads, size // self._layer.num_heads)
        query, key, value = (part.view(heads).transpose(1, 2) for part in (query, key, value))
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = self._after_attention(context.transpose(1, 2).reshape(-1, size), residual)
        read = self._adapt("ffn_up.input_scale", attended, attended)
        inner = functional.gelu(self._after_linear("ffn_up", self._ffn_up(read), read))
        inner = self._adapt("ffn_down.input_scale", inner, inner)
        return attended, self._after_linear("ffn_down", self._ffn_down(inner), inner)

    @property
    def has_frozen_start(self) -> bool:
        """Whether all blocks of this layer act in :meth:`finish`."""
        sites = [site for layer, site in self._adapter.places if layer == self._layer.index]
        return all(site in _LATE_SITES for site in sites)

    def finish(self, attended: Tensor, output: Tensor) -> Tensor:
        """The layer's result from the two that :meth:`start` gives, [*, H]."""
        output = self._adapt("after_ffn", output, output)
        output = self._adapt("parallel_ffn", output, attended)
        if self._adapter.is_used(self._layer.index, "after_ffn_normalized"):
            normalized = self._normalize(output + attended)
            output = self._adapt("after_ffn_normalized", output, normalized)
        return self._normalize(output + attended)

    def _normalize(self, output: Tensor) -> Tensor:
        normalized = self._layer.ffn_norm(output)
        return self._adapt("ffn_norm.bias", normalized, normalized)

    def _after_attention(self, context: Tensor, residual: Tensor) -> Tensor:
        context = self._adapt("attention_output.input_scale", context, context)
        output = self._after_linear("attention_output", self._attention_output(context), context)
        output = self._adapt("after_attention", output, output)
        attended = self._layer.attention_norm(output + residual)
        return self._adapt("attention_norm.bias", attended, attended)

    def _after_linear(self, linear: str, output: Tensor, hidden_states: Tensor) -> Tensor:
        """All that acts on a linear layer's output: LoRA, bias, scale."""
        for site in (linear, f"{linear}.bias", f"{linear}.scale"):
            output = self._adapt(site, output, hidden_states)
        return output

    def _adapt(self, site: str, output: Tensor, hidden_states: Tensor) -> Tensor:
        if not self._adapter.is_used(self._layer.index, site):
            return output
        return self._adapter.change(self._layer.index, site, output, hidden_states)


class TrainableLayers:
    """Layers from the adapter's first one to the last, and what a head reads of them."""

    def __init__(self, model: HierarchicalBert, adapter: TrainableAdapter) -> None:
        """Takes, once gradients flow, a transposed copy of the frozen weights of these layers."""
        layers = model.layers[adapter.first_layer :]
        self._layers = [_TrainableLayer(layer, adapter) for layer in layers]

    def read(
        self, batch: DenseBatch, reading: Literal["cls", "mean", "words"], words: WordPlaces | None = None
    ) -> Tensor:
        """The rows that a head reads after the last layer.

        Of each sequence the first token or the mean over tokens [B, H], or the tokens ``words`` [W, H].
        """
        x, layers = batch.hidden_states, self._layers
        if batch.halfway:
            x, layers = self.finish(x), layers[1:]
        mask = batch.mask()
        for layer in layers:
            is_last = layer is layers[-1]
            x = layer(x, mask, first_only=is_last and reading == "cls")
        if reading == "cls":
            return x[:, 0]
        if reading == "mean":
            return (x * batch.present()[:, :, None]).sum(1) / batch.lengths[:, None]
        assert words is not None
        return x[words.sequences, words.places]

    @property
    def can_start_halfway(self) -> bool:
        """Whether :meth:`start` may be computed once for all epochs."""
        return len(self._layers) > 1 and self._layers[0].has_frozen_start

    @torch.no_grad()
    def start(self, batch: DenseBatch) -> Tensor:
        """What of the first layer no parameter changes, float32 [B, L, 2H]."""
        x = batch.hidden_states
        states = torch.cat(self._layers[0].start(x, batch.mask(), first_only=False), dim=-1)
        return states.view(len(x), -1, states.shape[-1])

    def finish(self, states: Tensor) -> Tensor:
        """The first layer's result [*, H] from what :meth:`start` gave, [*, 2H]."""
        return self._layers[0].finish(*states.flatten(0, -2).chunk(2, dim=-1)).view(*states.shape[:-1], -1)
