"""The parts of a BERT-architecture encoder over packed sequences: embeddings, LayerNorm, one layer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

import hmi_kernels
from hmi_engine.models.linear import SharedLinear
from hmi_engine.models.loading import BertConfiguration
from hmi_engine.models.packing import PackedSequences, Readout

__all__ = ["AdapterApplication", "BertEmbeddings", "BertLayer", "LayerNorm"]


class AdapterApplication(Protocol):
    """What a layer asks of a batch's adapters. Sites are named as in ``hmi_engine.knowledge.adapters``."""

    def is_used(self, layer: int, site: str) -> bool:
        """Whether any tenant of the batch has a block at this place."""

    def apply(
        self, layer: int, site: str, output: torch.Tensor, hidden_states: torch.Tensor, *, readout: bool
    ) -> None:
        """Adds each token's adapter output to ``output`` [*, out], in place.

        ``readout`` tells that the rows are those of the batch's :class:`Readout`, not all its tokens.
        """


class LayerNorm:
    """LayerNorm over the last dimension, with weight and bias [H]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., H]."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class BertEmbeddings:
    """Word, position and token type (always type 0) added up and normalized."""

    def __init__(self, tensors: dict[str, torch.Tensor], configuration: BertConfiguration) -> None:
        self._words = tensors["embeddings.word_embeddings.weight"]
        self._positions = tensors["embeddings.position_embeddings.weight"]
        self._token_type = tensors["embeddings.token_type_embeddings.weight"][0]
        self._norm = LayerNorm(
            tensors["embeddings.LayerNorm.weight"],
            tensors["embeddings.LayerNorm.bias"],
            configuration.layer_norm_eps,
        )

    @property
    def vocab_size(self) -> int:
        """How many tokens there are embeddings for."""
        return self._words.shape[0]

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids, positions [...] -> [..., H]."""
        return self._norm(
            functional.embedding(input_ids.long(), self._words)
            + self._positions[positions]
            + self._token_type
        )


class BertLayer:
    """One transformer layer: attention and feed-forward network, with the places where adapters act."""

    def __init__(
        self, tensors: dict[str, torch.Tensor], index: int, configuration: BertConfiguration
    ) -> None:
        def linear(name: str) -> SharedLinear:
            prefix = f"encoder.layer.{index}.{name}"
            return SharedLinear(tensors[f"{prefix}.weight"], tensors[f"{prefix}.bias"])

        def layer_norm(name: str) -> LayerNorm:
            prefix = f"encoder.layer.{index}.{name}.LayerNorm"
            return LayerNorm(
                tensors[f"{prefix}.weight"], tensors[f"{prefix}.bias"], configuration.layer_norm_eps
            )

        self.index = index
        self.num_heads = configuration.num_heads
        self.query = linear("attention.self.query")
        self.key_value = SharedLinear.stacked([linear("attention.self.key"), linear("attention.self.value")])
        self.query_key_value = SharedLinear.stacked([self.query, self.key_value])
        self.attention_output = linear("attention.output.dense")
        self.attention_norm = layer_norm("attention.output")
        self.ffn_up = linear("intermediate.dense")
        self.ffn_down = linear("output.dense")
        self.ffn_norm = layer_norm("output")

    def forward(
        self,
        hidden_states: torch.Tensor,
        sequences: PackedSequences,
        adapters: AdapterApplication | None = None,
        readout: Readout | None = None,
    ) -> torch.Tensor:
        """hidden_states [T, H] -> [T, H], or [Q, H] for the rows of ``readout`` alone."""
        query, key, value, residual = self._project(hidden_states, adapters, readout)
        context = hmi_kernels.packed_attention(
            query,
            key,
            value,
            sequences.offsets if readout is None else readout.offsets,
            sequences.offsets,
            num_heads=self.num_heads,
        )
        at_readout = readout is not None
        attended = self.attention_output(context)
        self._adapt(adapters, "attention_output", attended, context, at_readout)
        self._adapt(adapters, "after_attention", attended, attended, at_readout)
        attended = self.attention_norm(attended.add_(residual))
        return self._feed_forward(attended, adapters, at_readout)

    def _project(
        self, hidden_states: torch.Tensor, adapters: AdapterApplication | None, readout: Readout | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (of the read rows), keys, values, and the rows that the residual connection carries."""
        size = hidden_states.shape[-1]
        if readout is None:
            query, key, value = self.query_key_value(hidden_states).split(size, dim=-1)
            residual = hidden_states
        else:
            residual = hidden_states[readout.rows]
            query = self.query(residual)
            key, value = self.key_value(hidden_states).split(size, dim=-1)
        self._adapt(adapters, "query", query, residual, readout is not None)
        self._adapt(adapters, "key", key, hidden_states, False)
        self._adapt(adapters, "value", value, hidden_states, False)
        return query, key, value, residual

    def _feed_forward(
        self, attended: torch.Tensor, adapters: AdapterApplication | None, at_readout: bool
    ) -> torch.Tensor:
        if adapters is not None and adapters.is_used(self.index, "ffn_up"):
            inner = self.ffn_up(attended)
            self._adapt(adapters, "ffn_up", inner, attended, at_readout)
            inner = functional.gelu(inner)
        else:
            inner = self.ffn_up(attended, gelu=True)
        output = self.ffn_down(inner)
        self._adapt(adapters, "ffn_down", output, inner, at_readout)
        self._adapt(adapters, "after_ffn", output, output, at_readout)
        if adapters is not None and adapters.is_used(self.index, "after_ffn_normalized"):
            normalized = self.ffn_norm(output + attended)
            self._adapt(adapters, "after_ffn_normalized", output, normalized, at_readout)
        return self.ffn_norm(output.add_(attended))

    def _adapt(
        self,
        adapters: AdapterApplication | None,
        site: str,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        at_readout: bool,
    ) -> None:
        if adapters is not None and adapters.is_used(self.index, site):
            if hidden_states is output:
                hidden_states = output.clone()
            adapters.apply(self.index, site, output, hidden_states, readout=at_readout)
