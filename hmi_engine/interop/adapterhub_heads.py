"""Heads in the folders that AdapterHub's `adapters` library saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop.adapter_folder import TensorFile, read_object, read_tensors
from hmi_engine.interop.adapterhub_config import activation_of, validated
from hmi_engine.interop.imported_tenant import ProblemType, default_labels, sequence_head
from hmi_engine.knowledge.heads import MAX_HIDDEN_LAYERS, DenseLayer, Head, TokenClassificationHead

__all__ = ["HEAD_CONFIG_FILE", "HEAD_WEIGHTS_FILE", "read_head"]

HEAD_CONFIG_FILE = "head_config.json"
HEAD_WEIGHTS_FILE = "model_head.safetensors"
_PICKLED_FILE = "pytorch_model_head.bin"
_WAY_OUT = "load it where you trust it and save it again with save_head(..., use_safetensors=True)"

_SERVED = ("classification", "multilabel_classification", "tagging")
_CLASSES: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": {"head_type": "classification", "use_pooler": True},
    "BertForTokenClassification": {"head_type": "tagging"},
}
"""transformers' classes with a fixed head, as the library's heads."""


class HeadSettings(BaseModel):
    """What decides what a head computes; defaults are the library's."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    head_type: Literal["classification", "multilabel_classification", "tagging"]
    num_labels: Annotated[int, Field(ge=1)]
    layers: Annotated[int, Field(ge=1, le=MAX_HIDDEN_LAYERS + 1)]
    activation_function: str | None = "tanh"
    use_pooler: bool = False
    bias: bool = True
    label2id: dict[str, int | str] | None = None


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    config: dict[str, Any] | None = None
    name: str | None = None
    model_class: str | None = None
    num_labels: int | None = None
    label2id: dict[str, int | str] | None = None


class _Linear(NamedTuple):
    """A linear layer of a head: the start of its tensors' names, and the activation behind it."""

    name: str
    activation: str | None


def read_head(
    directory: Path,
    *,
    labels: Sequence[str] | None = None,
    problem_type: ProblemType | None = None,
) -> Head:
    """Reads a head saved by ``save_head``, or by ``save_adapter`` beside its adapter.

    Args:
        directory: holds ``head_config.json`` and ``model_head.safetensors``.
        labels: names of the classes in place of the file's.
        problem_type: what a sequence head's numbers mean; by default as the file says.

    Raises:
        InvalidAdapterError: a file is unreadable, or the head is of a type that HMI does not compute.
        InvalidHeadError: labels and tensors contradict each other.
    """
    path = directory / HEAD_CONFIG_FILE
    settings, linears = _settings(path, validated(path, "", _File, read_object(path)))
    file = read_tensors(directory / HEAD_WEIGHTS_FILE, pickled_name=_PICKLED_FILE, way_out=_WAY_OUT)
    hidden = tuple(
        DenseLayer(file.take(f"{name}.weight"), file.take(f"{name}.bias"), activation)
        for name, activation in linears[:-1]
    )
    weight, bias = _last(file, settings, linears[-1].name)
    if file.untaken:
        raise InvalidAdapterError(
            f"{file.path}: tensor {file.untaken[0]:.200} belongs to nothing that {HEAD_CONFIG_FILE} names; "
            "save the head again"
        )
    names = _labels(path, settings, labels)
    if settings.head_type == "tagging":
        return TokenClassificationHead(names, weight, bias, hidden)
    if problem_type is None and settings.head_type == "multilabel_classification":
        problem_type = "multi_label_classification"
    pooling: Literal["pooler", "cls"] = "pooler" if settings.use_pooler else "cls"
    return sequence_head(names, weight, bias, pooling=pooling, problem_type=problem_type, hidden=hidden)


def _settings(path: Path, file: _File) -> tuple[HeadSettings, list[_Linear]]:
    if file.config is None:
        fixed = _CLASSES.get(file.model_class or "")
        if fixed is None:
            raise InvalidAdapterError(
                f"{path}: the head of model_class {file.model_class!r:.80} is not supported; HMI has those "
                f"of {', '.join(_CLASSES)}, and {', '.join(_SERVED)} heads of BertAdapterModel"
            )
        fields = fixed | {"layers": 1, "num_labels": file.num_labels, "label2id": file.label2id}
        return validated(path, "", HeadSettings, fields), [_Linear("classifier", None)]
    if file.name is None:
        raise InvalidAdapterError(f"{path}: name is missing; save the head again")
    head_type = file.config.get("head_type")
    if isinstance(head_type, str) and head_type not in _SERVED:
        raise InvalidAdapterError(
            f"{path}: head_type {head_type!r:.80} is not supported; HMI has {', '.join(_SERVED)}"
        )
    settings = validated(path, "config", HeadSettings, file.config)
    if "activation_function" in file.config and file.config["activation_function"] is None:
        settings = settings.model_copy(update={"activation_function": None})
    return settings, _linears(path, settings, f"heads.{file.name}")


def _linears(path: Path, settings: HeadSettings, prefix: str) -> list[_Linear]:
    """The library's Sequential: dropout, linear, activation, dropout, linear; only linears have tensors."""
    name = settings.activation_function
    activation = None
    if name and name.lower() != "linear" and settings.layers > 1:
        activation = activation_of(f"{path}: config.activation_function", name)
    step = 3 if name else 2
    return [
        _Linear(f"{prefix}.{1 + step * number}", activation if number < settings.layers - 1 else None)
        for number in range(settings.layers)
    ]


def _last(file: TensorFile, settings: HeadSettings, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    weight = file.take(f"{name}.weight")
    if weight.dim() != 2 or len(weight) != settings.num_labels:
        raise InvalidHeadError(
            f"{file.path}: {name}.weight has shape {list(weight.shape)}, but num_labels is "
            f"{settings.num_labels}"
        )
    has_bias = settings.bias or settings.head_type == "tagging"
    return weight, file.take(f"{name}.bias") if has_bias else torch.zeros(len(weight), dtype=weight.dtype)


def _labels(path: Path, settings: HeadSettings, labels: Sequence[str] | None) -> tuple[str, ...]:
    count = settings.num_labels
    if labels is not None:
        if len(labels) != count:
            raise InvalidHeadError(f"{path}: {len(labels)} labels were given, num_labels is {count}")
        return tuple(labels)
    if settings.label2id is None:
        return default_labels(count)
    names = {int(index) if str(index).isdecimal() else -1: name for name, index in settings.label2id.items()}
    if len(settings.label2id) != count or set(names) != set(range(count)):
        raise InvalidHeadError(
            f"{path}: label2id does not number {count} labels from 0 to {count - 1}; pass labels=[...]"
        )
    return tuple(names[index] for index in range(count))
