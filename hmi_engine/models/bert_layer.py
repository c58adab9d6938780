"""The parts of a BERT-architecture encoder over packed sequences: embeddings, one layer."""

from __future__ import annotations

import torch
from torch.nn import functional

import hmi_kernels
from hmi_engine.models.bert_loading import BertConfiguration
from hmi_engine.models.layer_parts import AdapterApplication, AdapterPlaces, LayerNorm
from hmi_engine.models.linear import SharedLinear
from hmi_engine.models.packing import RowSelection, SequenceBounds

__all__ = ["BertEmbeddings", "BertLayer"]


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
        sequences: SequenceBounds,
        adapters: AdapterApplication | None = None,
        readout: RowSelection | None = None,
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
            max_length=sequences.max_length,
        )
        at = AdapterPlaces(self.index, adapters, at_readout=readout is not None)
        at.change("attention_output.input_scale", context)
        attended = self.attention_output(context)
        at.after_linear("attention_output", attended, context)
        at.add("after_attention", attended, attended)
        attended = self.attention_norm(attended.add_(residual))
        at.change("attention_norm.bias", attended)
        return self._feed_forward(attended, at)

    def _project(
        self, hidden_states: torch.Tensor, adapters: AdapterApplication | None, readout: RowSelection | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (of the read rows), keys, values, and the rows that the residual connection carries."""
        size = hidden_states.shape[-1]
        every_token = AdapterPlaces(self.index, adapters, at_readout=False)
        if readout is None:
            projections = self.query_key_value(hidden_states)
            every_token.after_projections(projections, hidden_states)
            return *projections.split(size, dim=-1), hidden_states
        residual = hidden_states[readout.rows]
        query = self.query(residual)
        key, value = self.key_value(hidden_states).split(size, dim=-1)
        AdapterPlaces(self.index, adapters, at_readout=True).after_linear("query", query, residual)
        every_token.after_linear("key", key, hidden_states)
        every_token.after_linear("value", value, hidden_states)
        return query, key, value, residual

    def _feed_forward(self, attended: torch.Tensor, at: AdapterPlaces) -> torch.Tensor:
        inner = self._feed_forward_inner(attended, at)
        at.change("ffn_down.input_scale", inner)
        output = self.ffn_down(inner)
        at.after_linear("ffn_down", output, inner)
        at.add("after_ffn", output, output)
        at.add("parallel_ffn", output, attended)
        if at.is_used("after_ffn_normalized"):
            at.add("after_ffn_normalized", output, self._normalize(output + attended, at))
        return self._normalize(output.add_(attended), at)

    def _feed_forward_inner(self, attended: torch.Tensor, at: AdapterPlaces) -> torch.Tensor:
        """The feed-forward network's inner state [*, 4H], after the activation."""
        if at.is_used("ffn_up.input_scale"):
            attended = attended.clone()  # the residual connection carries it unscaled
            at.change("ffn_up.input_scale", attended)
        if not at.is_used_after_linear("ffn_up"):
            return self.ffn_up(attended, gelu="none")
        inner = self.ffn_up(attended)
        at.after_linear("ffn_up", inner, attended)
        return functional.gelu(inner)

    def _normalize(self, output: torch.Tensor, at: AdapterPlaces) -> torch.Tensor:
        """The last LayerNorm, whose bias may be a tenant's own."""
        normalized = self.ffn_norm(output)
        at.change("ffn_norm.bias", normalized)
        return normalized
