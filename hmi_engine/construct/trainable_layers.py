"""The upper layers with gradients for adapters: the base is frozen.

The serving layers (:mod:`hmi_engine.models.bert`) change packed tensors in place and loop over sequences,
which suits inference. Training changes nothing in place, and lets the batch say how its sequences lie: one
tenant's batch is dense, sequences of nearly equal length padded to one shape; a batch of many tenants is
packed (:mod:`hmi_engine.construct.packed_batch`). Tests hold all of them to the same result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from hmi_engine.construct.hidden_dropout import HiddenDropout
from hmi_engine.construct.training_data import WordPlaces
from hmi_engine.knowledge.adapters import Site
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.bert_layer import BertLayer
from hmi_engine.models.linear import SharedLinear

__all__ = ["Adapters", "DenseBatch", "Reading", "TokenBatch", "TrainableLayers"]

Reading = Literal["cls", "mean", "words"]
"""What heads read of the last layer: first tokens, means over tokens, or tokens one by one."""

_LATE_SITES = (Site.AFTER_FFN, Site.AFTER_FFN_NORMALIZED, Site.PARALLEL_FFN, Site.FFN_NORM_BIAS)


class Adapters(Protocol):
    """What the layers ask of the adapters of a batch's rows."""

    places: tuple[tuple[int, Site], ...]
    """(layer, site) of every block."""

    @property
    def first_layer(self) -> int:
        """The lowest layer with a block."""

    def is_used(self, layer: int, site: str) -> bool:
        """Whether there is a block at this place."""

    def change(self, layer: int, site: str, output: Tensor, hidden_states: Tensor) -> Tensor:
        """What the blocks at this place make of ``output`` [rows, out]; may read hidden_states [rows, in]."""


class TokenBatch(Protocol):
    """Sequences, whose tokens are rows in some order."""

    @property
    def halfway(self) -> bool:
        """Whether the rows are those that :meth:`TrainableLayers.start` made, [T, 2H], or inputs, [T, H]."""

    def rows(self) -> Tensor:
        """One row for each token."""

    def first_rows(self, rows: Tensor) -> Tensor:
        """Of rows [T, *] those of the sequences' first tokens, [S, *]."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
        """Attention within each sequence; query [T, H] or [S, H], key and value [T, H] -> as the query."""

    def read(self, rows: Tensor, reading: Reading, words: WordPlaces | None) -> Tensor:
        """What heads read of the last layer's rows: [S, H] for ``"cls"``, else [T, H]."""


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

    @functools.cached_property
    def _mask(self) -> Tensor | None:
        """The same as bool [B, 1, 1, L] for attention, None where nothing is padded."""
        present = self.present()
        return None if bool(present.all()) else present[:, None, None]

    def rows(self) -> Tensor:
        """See :class:`TokenBatch`; padded places have rows too."""
        return self.hidden_states.flatten(0, 1)

    def first_rows(self, rows: Tensor) -> Tensor:
        """See :class:`TokenBatch`."""
        return self._by_sequence(rows)[:, 0]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
        """See :class:`TokenBatch`."""
        size = query.shape[1]
        heads = (len(self.lengths), -1, num_heads, size // num_heads)
        query, key, value = (part.view(heads).transpose(1, 2) for part in (query, key, value))
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=self._mask)
        return context.transpose(1, 2).reshape(-1, size)

    def read(self, rows: Tensor, reading: Reading, words: WordPlaces | None) -> Tensor:
        """See :class:`TokenBatch`."""
        if reading == "cls":
            return rows
        x = self._by_sequence(rows)
        if reading == "mean":
            return (x * self.present()[:, :, None]).sum(1) / self.lengths[:, None]
        assert words is not None
        return x[words.sequences, words.places]

    def _by_sequence(self, rows: Tensor) -> Tensor:
        return rows.view(len(self.lengths), -1, rows.shape[-1])


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

    def __init__(self, layer: BertLayer, adapter: Adapters, dropout: HiddenDropout) -> None:
        self._layer, self._adapter, self._dropout = layer, adapter, dropout
        self._query, self._key_value = _FrozenLinear(layer.query), _FrozenLinear(layer.key_value)
        self._query_key_value = _FrozenLinear(layer.query_key_value)
        self._attention_output = _FrozenLinear(layer.attention_output)
        self._ffn_up, self._ffn_down = _FrozenLinear(layer.ffn_up), _FrozenLinear(layer.ffn_down)

    def __call__(self, rows: Tensor, batch: TokenBatch, *, first_only: bool) -> Tensor:
        """rows [T, H] -> [T, H], or with ``first_only`` [S, H], of the sequences' first tokens."""
        return self.finish(*self.start(rows, batch, first_only=first_only))

    def start(self, rows: Tensor, batch: TokenBatch, *, first_only: bool) -> tuple[Tensor, Tensor]:
        """The attention's result and the feed-forward network's before its adapters, both [*, H]."""
        residual = batch.first_rows(rows) if first_only else rows
        if first_only:
            query = self._query(residual)
            key, value = self._key_value(rows).chunk(2, dim=-1)
        else:
            query, key, value = self._query_key_value(rows).chunk(3, dim=-1)
        query = self._after_linear("query", query, residual)
        key, value = self._after_linear("key", key, rows), self._after_linear("value", value, rows)
        context = batch.attend(query, key, value, self._layer.num_heads)
        attended = self._after_attention(context, residual)
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
        return self._normalize(self._dropout(output) + attended)

    def _normalize(self, output: Tensor) -> Tensor:
        normalized = self._layer.ffn_norm(output)
        return self._adapt("ffn_norm.bias", normalized, normalized)

    def _after_attention(self, context: Tensor, residual: Tensor) -> Tensor:
        context = self._adapt("attention_output.input_scale", context, context)
        output = self._after_linear("attention_output", self._attention_output(context), context)
        output = self._adapt("after_attention", output, output)
        attended = self._layer.attention_norm(self._dropout(output) + residual)
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

    def __init__(
        self, model: HierarchicalBert, adapter: Adapters, dropout: HiddenDropout | None = None
    ) -> None:
        """Takes, once gradients flow, a transposed copy of the frozen weights of these layers.

        ``dropout`` is where transformers' BERT has its own, but for the attention's probabilities: before
        both residuals of a layer and before the head; and on the first layer's input, or what stands for it.
        """
        layers = model.layers[adapter.first_layer :]
        self._dropout = dropout or HiddenDropout()
        self._layers = [_TrainableLayer(layer, adapter, self._dropout) for layer in layers]

    def read(self, batch: TokenBatch, reading: Reading, words: WordPlaces | None = None) -> Tensor:
        """The rows that a head reads after the last layer.

        Of each sequence the first token or the mean over tokens [S, H], or the tokens ``words`` [W, H].
        """
        rows, layers = self._dropout(batch.rows()), self._layers
        if batch.halfway:
            rows, layers = self.finish(rows), layers[1:]
        for layer in layers:
            is_last = layer is layers[-1]
            rows = layer(rows, batch, first_only=is_last and reading == "cls")
        return self._dropout(batch.read(rows, reading, words))

    @property
    def can_start_halfway(self) -> bool:
        """Whether :meth:`start` may be computed once for all epochs."""
        return len(self._layers) > 1 and self._layers[0].has_frozen_start

    @torch.no_grad()
    def start(self, batch: DenseBatch) -> Tensor:
        """What of the first layer no parameter changes, float32 [B, L, 2H]."""
        states = torch.cat(self._layers[0].start(batch.rows(), batch, first_only=False), dim=-1)
        return states.view(len(batch.lengths), -1, states.shape[-1])

    def finish(self, states: Tensor) -> Tensor:
        """The first layer's result [T, H] from what :meth:`start` gave, as rows [T, 2H]."""
        return self._layers[0].finish(*states.chunk(2, dim=-1))
