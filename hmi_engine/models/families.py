"""Which architecture a base model has, and its domain layers whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.causal_windows import CausalWindowLayers
from hmi_engine.models.general_folder import loading_error
from hmi_engine.models.gpt2 import HierarchicalGpt2
from hmi_engine.models.windows import WindowLayers

__all__ = ["AnyWindowLayers", "HierarchicalModel", "load_model", "read_model_type"]

AnyWindowLayers: TypeAlias = WindowLayers | CausalWindowLayers
"""Domain layers over windows: int32 [M, W] -> float32 [M, W, H], or [M, 1, H] of a decoder."""

HierarchicalModel: TypeAlias = HierarchicalBert | HierarchicalGpt2


def read_model_type(source: str) -> str:
    """The architecture of a folder or hub id, by transformers' name.

    Raises:
        UnsupportedModelError: it holds no readable configuration.
    """
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(source).model_type)
    except Exception as error:  # of what is wrong in a file, each library has errors of its own
        raise loading_error(source, "a base model", error) from error


def load_model(folder: Path, plot_layers: int, *, is_causal: bool) -> HierarchicalModel:
    """Loads the base model, a decoder if ``is_causal``, from a store's folder, onto the CPU.

    Raises:
        StoreCorruptError: a file is missing or damaged.
    """
    if is_causal:
        return HierarchicalGpt2.load(folder, plot_layers)
    return HierarchicalBert.load(folder, plot_layers)
