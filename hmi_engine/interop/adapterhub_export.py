"""Writes adapters and heads as folders that AdapterHub's `adapters` library loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop.adapter_folder import CONFIG_FILE
from hmi_engine.interop.adapterhub import WEIGHTS_FILE
from hmi_engine.interop.adapterhub_config import ACTIVATION_NAMES
from hmi_engine.interop.adapterhub_heads import HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE
from hmi_engine.interop.bert_modules import LINEAR_SITES, layer_module
from hmi_engine.interop.export_folder import export_error, hold_export_folder
from hmi_engine.knowledge.adapters import Adapter, Block, BottleneckBlock, LoraBlock, ScaleBlock, Site
from hmi_engine.knowledge.atomic import atomic_write, fsync_path
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import (
    EmbeddingHead,
    GenerationHead,
    Head,
    RegressionHead,
    TokenClassificationHead,
)
from hmi_engine.knowledge.tensor_file import write_tensors

__all__ = ["write_adapterhub"]

_VERSION = "adapters.1.3.0"
"""The version whose format this is."""

_ADAPTER_NAME = "hmi"
_LIBRARY_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "silu": "silu",
    "tanh": "tanh",
}
assert {ACTIVATION_NAMES[name] for name in _LIBRARY_ACTIVATIONS.values()} == set(_LIBRARY_ACTIVATIONS)

_OUTPUT_SITES = (Site.AFTER_FFN, Site.AFTER_FFN_NORMALIZED, Site.PARALLEL_FFN)
_ATTENTION_LETTERS = {Site.QUERY: "q", Site.KEY: "k", Site.VALUE: "v"}
_LOW_RANK_SITES = (*_ATTENTION_LETTERS, Site.FFN_UP, Site.FFN_DOWN)

Blocks = Mapping[tuple[int, Site], Block]
Config = dict[str, Any]


def write_adapterhub(
    directory: str | Path, adapter: Adapter, head: Head | None, general: GeneralInfo, *, base_model: str
) -> None:
    """Writes ``adapter_config.json`` and ``adapter.safetensors``, and the head's two files; each atomically.

    Without a head, the two files of one that was written there before are removed: they are another tenant's.
    ``BertAdapterModel.load_adapter(directory, use_safetensors=True)`` loads all of it under the name ``hmi``.
    Layers that differ in settings become a union of configs. Tensors are float32, as they are.

    Args:
        directory: made if missing; files of these names are replaced.
        adapter: bottlenecks, LoRA blocks and scales.
        head: a classification, regression or token classification head, or None.
        general: the base model, against which both are checked.
        base_model: what the library shall record as ``model_name``.

    Raises:
        InvalidAdapterError: no block at all, or one at a place that the library does not have.
        InvalidHeadError: a head that the library does not have.
        StoreBusyError: another export writes into the folder.
        StoreError: a file cannot be written.
    """
    adapter.validate(general)
    if not adapter.blocks:
        raise InvalidAdapterError("the tenant has no adapter, only a head; there is nothing to write")
    config = _config(adapter, general)
    tensors = _adapter_tensors(adapter)
    common = {
        "model_type": general.family,
        "hidden_size": general.hidden_size,
        "model_name": base_model,
        "model_class": "BertAdapterModel",
        "name": _ADAPTER_NAME,
        "version": _VERSION,
    }
    folder = Path(directory)
    if head is not None:
        head.validate(general)
        head_config, head_tensors = _head_config(head), _head_tensors(head)
    with hold_export_folder(folder):
        if head is None:
            _remove_head(folder)
        else:
            _write_json(folder / HEAD_CONFIG_FILE, common | {"config": head_config})
            _write_floats(folder / HEAD_WEIGHTS_FILE, head_tensors)
        _write_floats(folder / WEIGHTS_FILE, tensors)
        _write_json(folder / CONFIG_FILE, common | {"config": config})


def _remove_head(folder: Path) -> None:
    """Removes the files of a head before the adapter is written, so that no crash leaves it beside that."""
    try:
        for path in (folder / HEAD_CONFIG_FILE, folder / HEAD_WEIGHTS_FILE):
            path.unlink(missing_ok=True)
        fsync_path(folder)
    except OSError as error:
        raise export_error(error, folder) from error


def _write_floats(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    floats = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    write_tensors(path, floats, {"format": "pt"}, explain=export_error)


def _write_json(path: Path, fields: Config) -> None:
    text = json.dumps(fields, indent=2, sort_keys=True)

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    atomic_write(path, write, explain=export_error)


def _adapter_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for (layer, site), block in adapter.ordered_blocks():
        if isinstance(block, BottleneckBlock):
            module = "attention.output" if site is Site.AFTER_ATTENTION else "output"
            prefix = f"bert.{layer_module(layer, module)}.adapters.{_ADAPTER_NAME}"
            tensors |= {
                f"{prefix}.adapter_down.0.weight": block.down.T,
                f"{prefix}.adapter_down.0.bias": block.down_bias,
                f"{prefix}.adapter_up.weight": block.up.T,
                f"{prefix}.adapter_up.bias": block.up_bias,
            }
            continue
        prefix = f"bert.{layer_module(layer, LINEAR_SITES[_linear(site)])}.loras.{_ADAPTER_NAME}"
        if isinstance(block, LoraBlock):
            tensors |= {f"{prefix}.lora_A": block.a.T, f"{prefix}.lora_B": block.b.T}
        elif isinstance(block, ScaleBlock):
            tensors[f"{prefix}.lora_B"] = block.vector[:, None]
    return tensors


def _linear(site: Site) -> Site:
    return Site(site.value.partition(".")[0])


def _config(adapter: Adapter, general: GeneralInfo) -> Config:
    configs = [*_bottleneck_configs(adapter.blocks, general), *_low_rank_configs(adapter.blocks, general)]
    return configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}


def _bottleneck_configs(blocks: Blocks, general: GeneralInfo) -> list[Config]:
    """One config for all layers of equal site, activation and scale, of which a config has one each."""
    groups: dict[tuple[Site, str, float], dict[int, int]] = {}
    outputs: set[int] = set()
    for (layer, site), block in sorted(blocks.items()):
        if not isinstance(block, BottleneckBlock):
            continue
        if site in _OUTPUT_SITES and layer in outputs:
            raise InvalidAdapterError(
                f"layer {layer}: AdapterHub has one bottleneck at the feed-forward network, this adapter has "
                f"several (of {', '.join(_OUTPUT_SITES)})"
            )
        outputs |= {layer} if site in _OUTPUT_SITES else set()
        groups.setdefault((site, block.activation, block.scale), {})[layer] = block.rank
    configs = []
    for (site, activation, scale), ranks in groups.items():
        other = {Site.AFTER_ATTENTION: Site.AFTER_FFN, Site.AFTER_FFN: Site.AFTER_ATTENTION}.get(site)
        is_double = other is not None and groups.get((other, activation, scale)) == ranks
        if is_double and site is Site.AFTER_ATTENTION:
            continue  # written together with the other place
        sites = (site, Site.AFTER_ATTENTION) if is_double else (site,)
        configs.append(_bottleneck_config(sites, activation, scale, ranks, general))
    return configs


def _bottleneck_config(
    sites: tuple[Site, ...], activation: str, scale: float, ranks: Mapping[int, int], general: GeneralInfo
) -> Config:
    factors = {str(layer): _reduction_factor(general.hidden_size, rank) for layer, rank in ranks.items()}
    distinct = set(factors.values())
    return {
        "architecture": None,
        "mh_adapter": Site.AFTER_ATTENTION in sites,
        "output_adapter": sites[0] in _OUTPUT_SITES,
        "original_ln_before": Site.AFTER_FFN_NORMALIZED in sites,
        "original_ln_after": True,
        "residual_before_ln": True,
        "is_parallel": Site.PARALLEL_FFN in sites,
        "non_linearity": _LIBRARY_ACTIVATIONS[activation],
        "scaling": float(scale),
        "reduction_factor": distinct.pop() if len(distinct) == 1 else factors,
        "leave_out": [layer for layer in range(general.num_layers) if layer not in ranks],
    }


def _reduction_factor(hidden_size: int, rank: int) -> float:
    """A factor of which the library makes exactly ``rank`` again, rounding ``hidden_size / factor`` down."""
    return hidden_size // rank if hidden_size % rank == 0 else hidden_size / (rank + 0.5)


def _low_rank_configs(blocks: Blocks, general: GeneralInfo) -> list[Config]:
    """One config for all layers of equal places, rank and scale."""
    layers: dict[int, dict[Site, LoraBlock | ScaleBlock]] = {}
    for (layer, site), block in sorted(blocks.items()):
        if isinstance(block, LoraBlock | ScaleBlock):
            layers.setdefault(layer, {})[site] = block
        elif not isinstance(block, BottleneckBlock):
            raise InvalidAdapterError(
                f"layer {layer}, {site}: AdapterHub has no adapters of biases; export in PEFT's format"
            )
    groups: dict[tuple[bool, int, float, tuple[Site, ...]], list[int]] = {}
    for layer, places in layers.items():
        groups.setdefault(_low_rank_settings(layer, places), []).append(layer)
    return [_low_rank_config(*key, members, general) for key, members in groups.items()]


def _low_rank_settings(
    layer: int, places: Mapping[Site, LoraBlock | ScaleBlock]
) -> tuple[bool, int, float, tuple[Site, ...]]:
    """Whether the blocks of a layer scale, their rank and alpha, and the linear layers where they stand."""
    settings = set()
    for site, block in places.items():
        linear, is_scale = _linear(site), isinstance(block, ScaleBlock)
        if linear not in _LOW_RANK_SITES or site.value.endswith(".input_scale"):
            raise InvalidAdapterError(
                f"layer {layer}, {site}: AdapterHub has no such place ({', '.join(_LOW_RANK_SITES)}, and "
                "scales of what these give); export in PEFT's format"
            )
        alpha = 1.0 if isinstance(block, ScaleBlock) else block.scale * block.rank
        settings.add((is_scale, 1 if is_scale else block.rank, alpha))
    if len(settings) > 1:
        raise InvalidAdapterError(
            f"layer {layer}: AdapterHub has one method, rank and alpha for all LoRA and IA3 blocks of a "
            "layer, this adapter has several; export in PEFT's format"
        )
    (is_scale, rank, alpha), sites = settings.pop(), tuple(sorted({_linear(site) for site in places}))
    return is_scale, rank, alpha, sites


def _low_rank_config(
    is_scale: bool, rank: int, alpha: float, sites: tuple[Site, ...], layers: list[int], general: GeneralInfo
) -> Config:
    letters = [letter for site, letter in _ATTENTION_LETTERS.items() if site in sites]
    return {
        "architecture": "lora",
        "selfattn_lora": bool(letters),
        "attn_matrices": letters,
        "intermediate_lora": Site.FFN_UP in sites,
        "output_lora": Site.FFN_DOWN in sites,
        "r": rank,
        "alpha": alpha,
        "composition_mode": "scale" if is_scale else "add",
        "init_weights": "ia3" if is_scale else "lora",
        "dropout": 0.0,
        "leave_out": [layer for layer in range(general.num_layers) if layer not in layers],
    }


def _head_config(head: Head) -> Config:
    if isinstance(head, EmbeddingHead | GenerationHead):
        raise InvalidHeadError(f"the {head.kind} head has no place in an AdapterHub folder: write without it")
    activations = {layer.activation for layer in head.hidden}
    if len(activations) > 1:
        raise InvalidHeadError(
            f"the hidden layers of the {head.kind} head have several activations, the library's heads one: "
            "write without the head"
        )
    activation = activations.pop() if activations else None
    config = {
        "num_labels": len(head.labels),
        "label2id": {label: index for index, label in enumerate(head.labels)},
        "layers": len(head.hidden) + 1,
        "activation_function": None if activation is None else _LIBRARY_ACTIVATIONS[activation],
        "dropout_prob": None,
    }
    if isinstance(head, TokenClassificationHead):
        return config | {"head_type": "tagging"}
    if head.pooling == "mean":
        raise InvalidHeadError(
            f"the {head.kind} head reads the mean of all tokens, the library's heads the pooler or the first "
            "token: write without the head"
        )
    is_regression = isinstance(head, RegressionHead)
    multi_label = not isinstance(head, RegressionHead) and head.multi_label
    if not multi_label and is_regression != (len(head.labels) == 1):
        raise InvalidHeadError(
            f"a {head.kind} head with {len(head.labels)} labels: the library takes one number for regression "
            "and several for classes: write without the head"
        )
    head_type = "multilabel_classification" if multi_label else "classification"
    return config | {"head_type": head_type, "use_pooler": head.pooling == "pooler", "bias": True}


def _head_tensors(head: Head) -> dict[str, torch.Tensor]:
    """Named as in the library's Sequential of dropout, linear and activation."""
    if isinstance(head, EmbeddingHead | GenerationHead):
        return {}
    step = 3 if any(layer.activation for layer in head.hidden) else 2
    tensors: dict[str, torch.Tensor] = {}
    for number, layer in enumerate((*head.hidden, head)):
        name = f"heads.{_ADAPTER_NAME}.{1 + step * number}"
        tensors |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    return tensors
