"""A GPT-2-architecture decoder as shared tensors: domain layers on windows, upper layers on packed tokens."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.nn import functional

from hmi_engine.models.causal_windows import CausalWindowLayers
from hmi_engine.models.general_folder import MERGE_LAYER_NORM_EPS, load_merge
from hmi_engine.models.gpt2_block import Attend, Gpt2Block
from hmi_engine.models.gpt2_loading import Gpt2Configuration, load_gpt2_configuration, load_gpt2_tensors
from hmi_engine.models.layer_parts import AdapterApplication, LayerNorm
from hmi_engine.models.linear import SharedLinear, with_products_in

__all__ = ["HierarchicalGpt2"]


class HierarchicalGpt2:
    """The shared base of hGPT: embeddings, domain layers, merge parameters, upper layers, language head.

    See docs/architecture.md. All tensors are float32, or of 16 bits on a GPU; every tenant shares them.
    Nothing here follows gradients.
    """

    def __init__(
        self,
        configuration: Gpt2Configuration,
        tensors: dict[str, torch.Tensor],
        merge: dict[str, torch.Tensor],
        plot_layers: int,
    ) -> None:
        self.configuration = configuration
        self.plot_layers = plot_layers
        self.words, self.positions = tensors["wte.weight"], tensors["wpe.weight"]
        self.layers = [Gpt2Block(tensors, index, configuration) for index in range(configuration.num_layers)]
        self.merge_positions = merge["position_embeddings"]
        self.merge_norm = LayerNorm(
            merge["layer_norm.weight"], merge["layer_norm.bias"], MERGE_LAYER_NORM_EPS
        )
        self.final_norm = LayerNorm(
            tensors["ln_f.weight"], tensors["ln_f.bias"], configuration.layer_norm_eps
        )
        self.pooler: SharedLinear | None = None
        self._language_head = SharedLinear(self.words, self.words.new_zeros(configuration.vocab_size))

    @classmethod
    def load(
        cls,
        directory: Path,
        plot_layers: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> HierarchicalGpt2:
        """Loads the ``general`` folder of a store onto a device, in ``dtype``.

        Raises:
            StoreCorruptError: a file is missing or damaged.
        """
        configuration = load_gpt2_configuration(directory)
        tensors, merge = (
            {name: tensor.to(dtype).to(device) for name, tensor in loaded.items()}
            for loaded in (load_gpt2_tensors(directory, configuration), load_merge(directory))
        )
        return cls(configuration, tensors, merge, plot_layers)

    def with_products_in(self, dtype: torch.dtype) -> HierarchicalGpt2:
        """The same, products of its upper layers and language head in another dtype; float32 between."""
        if dtype is self.merge_norm.weight.dtype:
            return self
        changed = copy.copy(self)
        changed._language_head = self._language_head.in_dtype(dtype)
        domain, upper = self.layers[: self.plot_layers], self.layers[self.plot_layers :]
        changed.layers = [*domain, *(with_products_in(layer, dtype) for layer in upper)]
        return changed

    @functools.cached_property
    def window_states(self) -> CausalWindowLayers:
        """The domain layers, as they run over windows: tokens int32 [M, W] -> float32 [M, 1, H]."""
        return CausalWindowLayers(self.words, self.positions, self.layers[: self.plot_layers])

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The input of layer 0: input_ids, positions [T] -> [T, H]."""
        return functional.embedding(input_ids.long(), self.words) + self.positions[positions]

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        attend: Attend,
        *,
        first: int,
        last: int | None = None,
        adapters: AdapterApplication | None = None,
        around_layer: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> torch.Tensor:
        """Layers ``first`` to ``last`` - 1, or the end, over hidden states [T, H]; no final LayerNorm.

        ``around_layer`` gives a context for the layer of an index, to see what it takes.
        """
        for layer in self.layers[first:last]:
            with nullcontext() if around_layer is None else around_layer(layer.index):
                hidden_states = layer.forward(hidden_states, attend, adapters)
        return hidden_states

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the language head says of last hidden states [Q, H] (before the final LayerNorm) -> [Q, V]."""
        return self._language_head(self.final_norm(hidden_states))
