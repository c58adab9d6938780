"""A BERT-architecture encoder as shared tensors, computed on packed sequences and on n-gram windows."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional

import hmi_kernels
from hmi_engine.models.linear import SharedLinear
from hmi_engine.models.loading import (
    MERGE_LAYER_NORM_EPS,
    BertConfiguration,
    load_bert_tensors,
    load_configuration,
    load_merge,
)
from hmi_engine.models.packing import PackedSequences, Readout

__all__ = ["AdapterApplication", "HierarchicalBert", "LayerNorm"]


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


class HierarchicalBert:
    """The shared base of hBERT: embeddings, domain layers, merge parameters, upper layers and pooler.

    Method: "SkipBERT" (Wang et al., ACL 2022) and "HMI" (arXiv 2504.17449); see docs/architecture.md.
    All tensors are float32 and shared by every tenant. Nothing here follows gradients:
    training has its own layers (``hmi_engine.construct.trainable_layers``).
    """

    def __init__(
        self,
        configuration: BertConfiguration,
        tensors: dict[str, torch.Tensor],
        merge: dict[str, torch.Tensor],
        plot_layers: int,
    ) -> None:
        self.configuration = configuration
        self.plot_layers = plot_layers
        self.word_embeddings = tensors["embeddings.word_embeddings.weight"]
        self.position_embeddings = tensors["embeddings.position_embeddings.weight"]
        self.token_type_embedding = tensors["embeddings.token_type_embeddings.weight"][0]
        self.embedding_norm = LayerNorm(
            tensors["embeddings.LayerNorm.weight"],
            tensors["embeddings.LayerNorm.bias"],
            configuration.layer_norm_eps,
        )
        self.layers = [BertLayer(tensors, index, configuration) for index in range(configuration.num_layers)]
        self.merge_positions = merge["position_embeddings"]
        self.merge_norm = LayerNorm(
            merge["layer_norm.weight"], merge["layer_norm.bias"], MERGE_LAYER_NORM_EPS
        )
        self.pooler: SharedLinear | None = None
        if "pooler.dense.weight" in tensors:
            self.pooler = SharedLinear(tensors["pooler.dense.weight"], tensors["pooler.dense.bias"])

    @classmethod
    def load(cls, directory: Path, plot_layers: int) -> HierarchicalBert:
        """Loads the ``general`` folder of a store.

        Raises:
            StoreCorruptError: a file is missing or damaged.
        """
        configuration = load_configuration(directory)
        return cls(
            configuration, load_bert_tensors(directory, configuration), load_merge(directory), plot_layers
        )

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embedding layer: input_ids, positions [...] -> [..., H]."""
        return self.embedding_norm(
            functional.embedding(input_ids.long(), self.word_embeddings)
            + self.position_embeddings[positions]
            + self.token_type_embedding
        )

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        sequences: PackedSequences,
        *,
        first: int,
        last: int | None = None,
        adapters: AdapterApplication | None = None,
        readout: Readout | None = None,
    ) -> torch.Tensor:
        """Layers ``first`` to ``last`` (exclusive; default: to the end) over packed hidden states [T, H].

        With ``readout``, the last of them computes only the rows that are read, and the result is [Q, H].
        """
        layers = self.layers[first:last]
        for layer in layers:
            is_last = layer is layers[-1]
            hidden_states = layer.forward(hidden_states, sequences, adapters, readout if is_last else None)
        return hidden_states

    def window_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states of n-gram windows after the domain layers, each window run alone.

        Args:
            tokens: int32 [M, W] token ids by slot, -1 where the slot is absent (masked out, never padded).

        Returns:
            float32 [M, W, H]; zero in absent slots.
        """
        result = torch.zeros(*tokens.shape, self.configuration.hidden_size)
        present = tokens >= 0
        patterns, members = torch.unique(present, dim=0, return_inverse=True)
        for number, pattern in enumerate(patterns):
            slots = pattern.nonzero()[:, 0]
            rows = (members == number).nonzero()[:, 0]
            states = self._dense_window_states(tokens[rows][:, slots], slots)
            result[rows[:, None], slots] = states
        return result

    def _dense_window_states(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """tokens [M, P] with all slots present, at the positions ``slots`` [P] -> [M, P, H]."""
        num_windows, width = tokens.shape
        if width == 0:
            return torch.zeros(num_windows, 0, self.configuration.hidden_size)
        hidden_states = self.embed(tokens, slots.expand(num_windows, -1)).flatten(0, 1)
        for layer in self.layers[: self.plot_layers]:
            hidden_states = _window_layer(layer, hidden_states, width)
        return hidden_states.view(num_windows, width, -1)


def _window_layer(layer: BertLayer, hidden_states: torch.Tensor, width: int) -> torch.Tensor:
    """One layer over windows of ``width`` tokens that follow one another; [M*width, H] -> the same.

    Attention over 2 or 3 tokens is cheaper as elementwise products than as tiny matrix products.
    """
    projected = layer.query_key_value(hidden_states)
    query, key, value = (
        part.view(-1, width, layer.num_heads, hidden_states.shape[-1] // layer.num_heads)
        for part in projected.split(hidden_states.shape[-1], dim=-1)
    )
    if width == 1:
        context = value
    else:
        scores = (query[:, :, None] * key[:, None]).sum(-1) * query.shape[-1] ** -0.5
        weights = scores.softmax(dim=2)
        context = torch.stack([(weights[:, slot, :, :, None] * value).sum(1) for slot in range(width)], dim=1)
    attended = layer.attention_output(context.reshape(hidden_states.shape))
    attended = layer.attention_norm(attended.add_(hidden_states))
    output = layer.ffn_down(layer.ffn_up(attended, gelu=True))
    return layer.ffn_norm(output.add_(attended))
