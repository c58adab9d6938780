"""The head's part of a tenant's file: its settings, and where its tensors lie."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from hmi_engine.errors import StoreCorruptError
from hmi_engine.knowledge.heads import (
    MAX_HIDDEN_LAYERS,
    ClassificationHead,
    DenseLayer,
    EmbeddingHead,
    GenerationHead,
    Head,
    HeadKind,
    Pooling,
    RegressionHead,
    TokenClassificationHead,
)
from hmi_engine.knowledge.tensor_file import TensorEntry
from hmi_kernels import ACTIVATIONS

__all__ = ["HEAD_PREFIX", "HeadLayout", "HeadRecord", "TensorPlace", "describe_head", "place_head"]

HEAD_PREFIX = "output_head."
_FLOAT_BYTES = 4


class HeadRecord(BaseModel):
    """What of a head is no tensor; ``activations`` are those of its hidden layers or of its projection."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: HeadKind
    labels: tuple[str, ...] = ()
    pooling: Pooling | None = None
    multi_label: bool = False
    normalize: bool = False
    activations: tuple[str | None, ...] = ()

    def tensor_names(self) -> list[str]:
        """Return the names of the head's tensors in the order of the file."""
        if self.kind == "generation":
            return []
        inner = "projection" if self.kind == "embedding" else "hidden"
        layers = [inner] if inner == "projection" else [f"hidden.{i}" for i in range(len(self.activations))]
        names = [
            f"{layer}.{part}" for layer in layers[: len(self.activations)] for part in ("bias", "weight")
        ]
        return sorted(names if inner == "projection" else [*names, "bias", "weight"])

    def shapes(self, hidden_size: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes that the tensors must have; ``outputs``: how many labels, or the projection's."""
        sizes = {name: hidden_size if name.startswith("hidden") else outputs for name in self.tensor_names()}
        return {
            name: (size,) if name.endswith("bias") else (size, hidden_size) for name, size in sizes.items()
        }


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's first element in the data section, and its shape."""

    offset_elements: int
    shape: tuple[int, ...]

    def view(self, data: Tensor) -> Tensor:
        """Return the tensor as a view of the data section."""
        return data[self.offset_elements :][: math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class HeadLayout:
    """The head's settings and where its tensors lie in the data section, by name.

    ``hidden_size`` is the width of what it reads, None where it has no tensors.
    """

    record: HeadRecord
    hidden_size: int | None
    tensors: Mapping[str, TensorPlace]

    @property
    def kind(self) -> HeadKind:
        """The head's kind."""
        return self.record.kind

    @property
    def labels(self) -> tuple[str, ...]:
        """The head's labels."""
        return self.record.labels

    @property
    def pooling(self) -> Pooling | None:
        """What the head reads; None for one that reads every token."""
        return self.record.pooling

    def build(self, data: Tensor) -> Head:
        """Return the head whose tensors are views of the file's float32 data section."""
        record = self.record
        views = {name: place.view(data) for name, place in self.tensors.items()}
        if record.kind == "generation":
            return GenerationHead()
        if record.kind == "embedding":
            dense = _dense("projection", views, record.activations[0]) if record.activations else None
            return EmbeddingHead(record.pooling or "mean", record.normalize, dense)
        weight, bias, pooling = views["weight"], views["bias"], record.pooling or "cls"
        hidden = tuple(_dense(f"hidden.{i}", views, name) for i, name in enumerate(record.activations))
        if record.kind == "token_classification":
            return TokenClassificationHead(record.labels, weight, bias, hidden)
        if record.kind == "regression":
            return RegressionHead(record.labels, weight, bias, pooling, hidden)
        return ClassificationHead(record.labels, weight, bias, pooling, record.multi_label, hidden)


def _dense(name: str, views: Mapping[str, Tensor], activation: str | None) -> DenseLayer:
    return DenseLayer(views[f"{name}.weight"], views[f"{name}.bias"], activation)


def describe_head(head: Head) -> HeadRecord:
    """Return all that is no tensor."""
    layers: tuple[DenseLayer, ...]
    if isinstance(head, GenerationHead):
        layers = ()
    elif isinstance(head, EmbeddingHead):
        layers = () if head.projection is None else (head.projection,)
    else:
        layers = head.hidden
    return HeadRecord(
        kind=head.kind,
        labels=head.labels,
        pooling=head.pooling,
        multi_label=isinstance(head, ClassificationHead) and head.multi_label,
        normalize=isinstance(head, EmbeddingHead) and head.normalize,
        activations=tuple(layer.activation for layer in layers),
    )


def place_head(path: Path, record: HeadRecord, entries: list[TensorEntry]) -> HeadLayout:
    """Return where a head lies whose tensors are ``entries``, named by :meth:`HeadRecord.tensor_names`.

    Raises :class:`StoreCorruptError`, naming ``path``, where settings or shapes contradict each other.
    """
    _check_record(path, record)
    places = {
        entry.name.removeprefix(HEAD_PREFIX): TensorPlace(entry.start // _FLOAT_BYTES, entry.shape)
        for entry in entries
    }
    if not places:
        return HeadLayout(record, None, places)
    last = places["projection.weight" if record.kind == "embedding" else "weight"].shape
    hidden_size = last[-1] if last else 0
    outputs = last[0] if record.kind == "embedding" and last else len(record.labels)
    for name, shape in record.shapes(hidden_size, outputs).items():
        if places[name].shape != shape:
            raise StoreCorruptError(
                f"{path}: {HEAD_PREFIX}{name} has shape {places[name].shape}, expected {shape}"
            )
    return HeadLayout(record, hidden_size, places)


def _check_record(path: Path, record: HeadRecord) -> None:
    if (record.pooling is None) != (record.kind in ("token_classification", "generation")):
        raise StoreCorruptError(f"{path}: pooling of a {record.kind} head is {record.pooling}")
    most = {"embedding": 1, "generation": 0}.get(record.kind, MAX_HIDDEN_LAYERS)
    known = all(name is None or name in ACTIVATIONS for name in record.activations)
    if len(record.activations) > most or not known:
        raise StoreCorruptError(f"{path}: activations of a {record.kind} head are {record.activations!r:.80}")
