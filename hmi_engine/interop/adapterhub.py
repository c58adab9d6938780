"""Adapters in the folders that AdapterHub's `adapters` library saves (https://github.com/adapter-hub/adapters)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop.adapter_folder import CONFIG_FILE, TensorFile, read_tensors
from hmi_engine.interop.adapterhub_config import (
    AdapterhubSettings,
    BottleneckSettings,
    LowRankSettings,
    Place,
    activation_of,
    read_settings,
)
from hmi_engine.interop.adapterhub_heads import HEAD_CONFIG_FILE, read_head
from hmi_engine.interop.bert_modules import layer_module
from hmi_engine.interop.imported_tenant import (
    ImportedTenant,
    LowerLayers,
    ProblemType,
    check_lower_layers,
    finish_import,
)
from hmi_engine.knowledge.adapters import Block, BottleneckBlock, LoraBlock, ScaleBlock, Site
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import Head

__all__ = ["WEIGHTS_FILE", "read_adapterhub"]

WEIGHTS_FILE = "adapter.safetensors"
_PICKLED_FILE = "pytorch_adapter.bin"
_WAY_OUT = "load it where you trust it and save it again with save_adapter(..., use_safetensors=True)"


def read_adapterhub(
    directory: str | Path,
    general: GeneralInfo,
    *,
    head: str | Path | Head | None = None,
    labels: Sequence[str] | None = None,
    problem_type: ProblemType | None = None,
    lower_layers: LowerLayers = "error",
) -> ImportedTenant:
    """Reads a bottleneck adapter, LoRA, IA3 or a union of these, and a head, saved by the `adapters` library.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter.safetensors``.
        general: the base model that the adapter must fit.
        head: a folder with ``head_config.json`` and ``model_head.safetensors``, or a head; by default what
            lies in ``directory``, if there is one.
        labels: names of the classes; by default those of ``head_config.json``.
        problem_type: what a sequence head's numbers mean; by default as ``head_config.json`` says.
        lower_layers: ``"drop"`` leaves out blocks below ``plot_layers``: those layers are looked up.

    Raises:
        InvalidAdapterError: the folder is not readable, uses a feature that HMI does not compute, or does
            not fit ``general``; the message names the file and the tensor or setting.
        InvalidHeadError: the head does not fit ``general`` or ``labels``.
    """
    folder = Path(directory)
    check_lower_layers(lower_layers)
    settings, warnings = read_settings(folder, general)
    file = read_tensors(folder / WEIGHTS_FILE, pickled_name=_PICKLED_FILE, way_out=_WAY_OUT)
    blocks = _blocks(file, folder, settings, general)
    notes = list(warnings)
    found = _head(head, folder, general, labels, problem_type, notes)
    try:
        return finish_import("adapterhub", blocks, found, general, lower_layers, warnings=notes)
    except InvalidAdapterError as error:
        raise InvalidAdapterError(f"{folder}: {error}") from error
    except InvalidHeadError as error:
        raise InvalidHeadError(f"{folder if head is None else head!s:.200}: {error}") from error


def _head(
    head: str | Path | Head | None,
    folder: Path,
    general: GeneralInfo,
    labels: Sequence[str] | None,
    problem_type: ProblemType | None,
    notes: list[str],
) -> Head | None:
    if head is not None and not isinstance(head, str | Path):
        return head
    if head is None and not os.path.lexists(folder / HEAD_CONFIG_FILE):
        notes.append(f"the folder holds no {HEAD_CONFIG_FILE}: give a head, or the folder of one")
        return None
    return read_head(folder if head is None else Path(head), labels=labels, problem_type=problem_type)


def _blocks(
    file: TensorFile, folder: Path, settings: AdapterhubSettings, general: GeneralInfo
) -> dict[tuple[int, Site], Block]:
    prefix = "bert." if any(name.startswith("bert.") for name in file.names) else ""
    blocks: dict[tuple[int, Site], Block] = {}
    modules: set[str] = set()
    for method in settings.methods:
        for place in method.places(general):
            module = layer_module(place.layer, place.module)
            if module in modules:
                raise InvalidAdapterError(
                    f"{folder / CONFIG_FILE}: two methods of the union stand at {module}"
                )
            modules.add(module)
            blocks[place.layer, place.site] = _block(
                file, f"{prefix}{module}", settings.name, method, place, general
            )
    if file.untaken:
        raise InvalidAdapterError(
            f"{file.path}: tensor {file.untaken[0]:.200} belongs to nothing that {CONFIG_FILE} names "
            f"(adapter {settings.name!r:.80}, {general.num_layers} layers); save the adapter again"
        )
    return blocks


def _block(
    file: TensorFile,
    module: str,
    name: str,
    method: BottleneckSettings | LowRankSettings,
    place: Place,
    general: GeneralInfo,
) -> Block:
    if isinstance(method, BottleneckSettings):
        return _bottleneck(file, f"{module}.adapters.{name}", method, place, general)
    prefix = f"{module}.loras.{name}"
    b = file.take(f"{prefix}.lora_B")
    if method.is_scale:
        if b.dim() != 2 or b.shape[1] != 1:
            raise InvalidAdapterError(
                f"{file.path}: {prefix}.lora_B has shape {list(b.shape)}, expected [out, 1]"
            )
        return ScaleBlock(b[:, 0].float() * method.alpha)
    a = file.take(f"{prefix}.lora_A")
    _check_matrices(file, {f"{prefix}.lora_A": (a, 0), f"{prefix}.lora_B": (b, 1)}, method.r, f"r={method.r}")
    return LoraBlock(a.T, b.T, method.alpha / method.r)


def _bottleneck(
    file: TensorFile, prefix: str, method: BottleneckSettings, place: Place, general: GeneralInfo
) -> BottleneckBlock:
    where = f"{file.path.parent / CONFIG_FILE}"
    activation = activation_of(f"{where}: non_linearity", method.non_linearity)
    try:
        rank = method.rank(place.layer, general)
    except InvalidAdapterError as error:
        raise InvalidAdapterError(f"{where}: {error}") from error
    down, up = f"{prefix}.adapter_down.0", f"{prefix}.adapter_up"
    down_weight, down_bias = file.take(f"{down}.weight"), file.take(f"{down}.bias")
    up_weight, up_bias = file.take(f"{up}.weight"), file.take(f"{up}.bias")
    matrices = {f"{down}.weight": (down_weight, 0), f"{up}.weight": (up_weight, 1)}
    _check_matrices(file, matrices, rank, f"reduction_factor={method.reduction_factor}")
    scale = method.scaling
    if scale == "channel":
        channels = _vector(file, f"{prefix}.scaling", general.hidden_size)
        up_weight, up_bias = up_weight.float() * channels[:, None], up_bias.float() * channels
        scale = 1.0
    elif scale == "learned":
        scale = float(_vector(file, f"{prefix}.scaling", 1)[0])
    assert isinstance(scale, float)
    return BottleneckBlock(down_weight.T, down_bias, up_weight.T, up_bias, activation, scale)


def _vector(file: TensorFile, name: str, size: int) -> torch.Tensor:
    vector = file.take(name)
    if tuple(vector.shape) != (size,):
        raise InvalidAdapterError(f"{file.path}: {name} has shape {list(vector.shape)}, expected [{size}]")
    return vector.float()


def _check_matrices(
    file: TensorFile, matrices: dict[str, tuple[torch.Tensor, int]], rank: int, setting: str
) -> None:
    """Each must be a matrix that is as wide as the settings say in the given dimension."""
    for name, (tensor, dimension) in matrices.items():
        if tensor.dim() != 2 or tensor.shape[dimension] != rank:
            raise InvalidAdapterError(
                f"{file.path}: {name} has shape {list(tensor.shape)}, but {setting:.200} of {CONFIG_FILE} "
                f"makes dimension {dimension} of a matrix {rank}"
            )
