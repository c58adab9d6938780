"""A BERT-architecture encoder as shared tensors, computed on packed sequences and on n-gram windows."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from hmi_engine.models.bert_layer import BertEmbeddings, BertLayer
from hmi_engine.models.bert_loading import BertConfiguration, load_bert_configuration, load_bert_tensors
from hmi_engine.models.general_folder import MERGE_LAYER_NORM_EPS, load_merge
from hmi_engine.models.layer_parts import AdapterApplication, LayerNorm
from hmi_engine.models.linear import SharedLinear, with_products_in
from hmi_engine.models.packing import RowSelection, SequenceBounds
from hmi_engine.models.windows import WindowLayers

__all__ = ["HierarchicalBert"]


class HierarchicalBert:
    """The shared base of hBERT: embeddings, domain layers, merge parameters, upper layers and pooler.

    Method: "SkipBERT" (Wang et al., ACL 2022) and "HMI" (arXiv 2504.17449); see docs/architecture.md.
    All tensors are float32, or of 16 bits on a GPU, but for the pooler, which heads read in float32; every
    tenant shares them. Nothing here follows gradients:
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
        self.embed = BertEmbeddings(tensors, configuration)
        self.layers = [BertLayer(tensors, index, configuration) for index in range(configuration.num_layers)]
        self.merge_positions = merge["position_embeddings"]
        self.merge_norm = LayerNorm(
            merge["layer_norm.weight"], merge["layer_norm.bias"], MERGE_LAYER_NORM_EPS
        )
        self.pooler: SharedLinear | None = None
        if "pooler.dense.weight" in tensors:
            self.pooler = SharedLinear(tensors["pooler.dense.weight"], tensors["pooler.dense.bias"])

    @classmethod
    def load(
        cls,
        directory: Path,
        plot_layers: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> HierarchicalBert:
        """Loads the ``general`` folder of a store onto a device, in ``dtype``.

        Raises:
            StoreCorruptError: a file is missing or damaged.
        """
        configuration = load_bert_configuration(directory)
        tensors, merge = (
            {
                name: tensor.to(torch.float32 if name.startswith("pooler.") else dtype).to(device)
                for name, tensor in loaded.items()
            }
            for loaded in (load_bert_tensors(directory, configuration), load_merge(directory))
        )
        return cls(configuration, tensors, merge, plot_layers)

    def with_products_in(self, dtype: torch.dtype) -> HierarchicalBert:
        """The same model, products of its upper layers in another dtype; float32 between."""
        if dtype is self.merge_norm.weight.dtype:
            return self
        changed = copy.copy(self)
        domain, upper = self.layers[: self.plot_layers], self.layers[self.plot_layers :]
        changed.layers = [*domain, *(with_products_in(layer, dtype) for layer in upper)]
        return changed

    @functools.cached_property
    def window_states(self) -> WindowLayers:
        """The domain layers, as they run over n-gram windows: tokens int32 [M, W] -> float32 [M, W, H]."""
        return WindowLayers(self.embed, self.layers[: self.plot_layers])

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        sequences: SequenceBounds,
        *,
        first: int,
        last: int | None = None,
        adapters: AdapterApplication | None = None,
        readout: RowSelection | None = None,
        around_layer: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> torch.Tensor:
        """Layers ``first`` to ``last`` (exclusive; default: to the end) over packed hidden states [T, H].

        With ``readout``, the last of them computes only the rows that are read, and the result is [Q, H].
        ``around_layer`` gives a context for the layer of an index, to see what it takes.
        """
        layers = self.layers[first:last]
        for layer in layers:
            read_rows = readout if layer is layers[-1] else None
            with nullcontext() if around_layer is None else around_layer(layer.index):
                hidden_states = layer.forward(hidden_states, sequences, adapters, read_rows)
        return hidden_states
