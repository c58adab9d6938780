"""Blocks made of the tensors that PEFT keeps of one module, whatever the architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hmi_engine.errors import InvalidAdapterError
from hmi_engine.interop.adapter_folder import TensorFile
from hmi_engine.interop.peft_config import Ia3Settings, LoraSettings
from hmi_engine.knowledge.adapter_kinds.sites import linear_sizes
from hmi_engine.knowledge.adapters import LoraBlock, ScaleBlock, Site
from hmi_engine.knowledge.general import GeneralInfo

__all__ = ["lora_block", "saved_like", "scale_blocks"]


def lora_block(file: TensorFile, parts: Mapping[str, str], module: str, settings: LoraSettings) -> LoraBlock:
    """The LoRA of one module, its matrices as stored, transposed.

    Raises:
        InvalidAdapterError: no matrices, or another rank than the settings say.
    """
    names = ("lora_A.weight", "lora_B.weight")
    a, b = (file.take(parts.get(name, f"{module}.{name}")) for name in names)
    for name, tensor in (("lora_A", a), ("lora_B", b)):
        if tensor.dim() != 2:
            raise InvalidAdapterError(
                f"{file.path}: {module}.{name}.weight has shape {list(tensor.shape)}, expected a matrix"
            )
    if settings.rank(module) != a.shape[0]:
        raise InvalidAdapterError(
            f"{file.path}: {module} has rank {a.shape[0]}, but adapter_config.json says "
            f"{settings.rank(module)}; the scale would be wrong"
        )
    return LoraBlock(a.T, b.T, settings.scale(module))


def scale_blocks(
    file: TensorFile,
    parts: Mapping[str, str],
    module: str,
    sites: Sequence[Site],
    settings: Ia3Settings,
    general: GeneralInfo,
) -> dict[Site, ScaleBlock]:
    """The IA3 of one module, whose outputs are those of the linear layers ``sites`` side by side.

    Raises:
        InvalidAdapterError: another shape than the settings say, or a scaled input that HMI does not scale.
    """
    is_input = settings.is_feedforward(module)
    inputs = linear_sizes(sites[0].value, general)[0]
    outputs = [linear_sizes(site.value, general)[1] for site in sites]
    tensor = file.take(parts["ia3_l"])
    expected = (1, inputs) if is_input else (sum(outputs), 1)
    if tuple(tensor.shape) != expected:
        raise InvalidAdapterError(
            f"{file.path}: {module}.ia3_l has shape {list(tensor.shape)}, expected {list(expected)} "
            f"({'inside' if is_input else 'outside'} of feedforward_modules)"
        )
    names = [f"{site}.input_scale" if is_input else f"{site}.scale" for site in sites]
    if not set(names) <= set(Site):
        raise InvalidAdapterError(
            f"{file.path}: {module} is one of feedforward_modules: HMI scales what {sites[0]} gives, not "
            "what it reads; train with it outside of feedforward_modules"
        )
    vectors = tensor.reshape(-1).split([inputs] if is_input else outputs)
    return {Site(name): ScaleBlock(vector) for name, vector in zip(names, vectors, strict=True)}


def saved_like(original: torch.Tensor, name: str | None, file: TensorFile) -> torch.Tensor:
    """The saved tensor as float32, of the original's shape; the original where none was saved.

    Raises:
        InvalidAdapterError: another shape.
    """
    if name is None:
        return original
    saved = file.take(name)
    if saved.shape != original.shape:
        raise InvalidAdapterError(
            f"{file.path}: {name} has shape {list(saved.shape)}, expected {list(original.shape)}"
        )
    return saved.float()
