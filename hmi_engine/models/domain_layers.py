"""A domain's own domain layers: the weights of layers 0 to K-1 in place of the general knowledge's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hmi_engine.errors import StoreCorruptError, UnsupportedModelError
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.bert_layer import BertLayer
from hmi_engine.models.bert_loading import load_bert_tensors
from hmi_engine.models.windows import WindowLayers

__all__ = ["checked_domain_layers", "load_domain_layers"]

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")


def checked_domain_layers(
    tensors: Mapping[str, Tensor], general: Path, model: HierarchicalBert
) -> dict[str, Tensor]:
    """Returns the tensors of layers 0 to K-1 as float32, checked against those of the base model.

    Args:
        tensors: under transformers' names (``encoder.layer.0.attention.self.query.weight``, with or without
            the prefix ``bert.``); those of other layers and of the embeddings are left out.
        general: the store's folder of the base model.
        model: the base model.

    Raises:
        UnsupportedModelError: a tensor is missing, of another shape, or not finite.
    """
    wanted = {
        name: tensor
        for name, tensor in load_bert_tensors(general, model.configuration).items()
        if (found := _LAYER.match(name)) and int(found[1]) < model.plot_layers
    }
    given = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    checked = {}
    for name, tensor in wanted.items():
        if name not in given:
            raise UnsupportedModelError(
                f"domain layers: {name} is missing; give whole layers, such as the model.safetensors of a "
                "folder that `hmi distill --export` wrote (a compact file holds only what differs)"
            )
        if given[name].shape != tensor.shape:
            raise UnsupportedModelError(
                f"domain layers: {name} should be {list(tensor.shape)}, found {list(given[name].shape)}"
            )
        checked[name] = given[name].detach().to(torch.float32).contiguous()
        if not checked[name].isfinite().all():
            raise UnsupportedModelError(f"domain layers: {name} holds NaN or infinity")
    return checked


def load_domain_layers(path: Path, model: HierarchicalBert) -> WindowLayers:
    """Reads the layers that :func:`checked_domain_layers` gave, from a safetensors file.

    Raises:
        StoreCorruptError: the file is missing or damaged.
    """
    try:
        tensors = load_file(path)
        layers = [BertLayer(tensors, index, model.configuration) for index in range(model.plot_layers)]
    except (OSError, SafetensorError, KeyError) as error:
        raise StoreCorruptError(f"{path}: unreadable domain layers: {error}") from error
    return WindowLayers(model.embed, layers)
