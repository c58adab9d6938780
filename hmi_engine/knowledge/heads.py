"""Heads: what a tenant makes of the last layer's hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hmi_engine.errors import InvalidHeadError
from hmi_engine.knowledge.general import GeneralInfo

__all__ = [
    "POOLINGS",
    "ClassificationHead",
    "EmbeddingHead",
    "Head",
    "HeadKind",
    "Pooling",
    "TokenClassificationHead",
]

HeadKind = Literal["classification", "token_classification", "embedding"]
Pooling = Literal["pooler", "cls", "mean"]

POOLINGS: tuple[Pooling, ...] = ("pooler", "cls", "mean")
"""``pooler``: the base model's tanh layer on the first token; ``cls``: that token; ``mean``: the average."""

_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class ClassificationHead:
    """Scores of C labels for a sequence: ``pooled @ weight.T + bias``.

    ``weight`` [C, H], ``bias`` [C]. Probabilities are a softmax over labels, or, with ``multi_label``, a
    sigmoid of each.
    """

    kind: ClassVar[Literal["classification"]] = "classification"
    labels: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    pooling: Pooling
    multi_label: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {"weight": self.weight, "bias": self.bias}

    def validate(self, general: GeneralInfo) -> None:
        """Raise :class:`InvalidHeadError` if labels, tensors or pooling do not fit the base model."""
        _check_linear(self.kind, self.labels, self.tensors(), general)
        _check_pooling(self.kind, self.pooling)


@dataclass(frozen=True, eq=False)
class TokenClassificationHead:
    """Scores of C labels for each token: ``hidden @ weight.T + bias``; ``weight`` [C, H], ``bias`` [C]."""

    kind: ClassVar[Literal["token_classification"]] = "token_classification"
    labels: tuple[str, ...]
    weight: Tensor
    bias: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {"weight": self.weight, "bias": self.bias}

    def validate(self, general: GeneralInfo) -> None:
        """Raise :class:`InvalidHeadError` if labels or tensors do not fit the base model."""
        _check_linear(self.kind, self.labels, self.tensors(), general)


@dataclass(frozen=True, eq=False)
class EmbeddingHead:
    """One vector [H] for a sequence, of length 1 if ``normalize``."""

    kind: ClassVar[Literal["embedding"]] = "embedding"
    labels: ClassVar[tuple[str, ...]] = ()
    pooling: Pooling
    normalize: bool = True

    def tensors(self) -> dict[str, Tensor]:
        """Return no tensors: nothing is learned here."""
        return {}

    def validate(self, general: GeneralInfo) -> None:
        """Raise :class:`InvalidHeadError` if the pooling is unknown."""
        _check_pooling(self.kind, self.pooling)


Head = ClassificationHead | TokenClassificationHead | EmbeddingHead


def _check_pooling(kind: str, pooling: object) -> None:
    if pooling not in POOLINGS:
        raise InvalidHeadError(
            f"{kind} head: pooling {pooling!r:.80} is unknown; known are {', '.join(POOLINGS)}"
        )


def _check_labels(kind: str, labels: Sequence[object]) -> None:
    if not isinstance(labels, tuple) or not labels:
        raise InvalidHeadError(
            f"{kind} head: labels must be a tuple of at least one str, found {labels!r:.80}"
        )
    seen: set[str] = set()
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise InvalidHeadError(f"{kind} head: label {label!r:.80} is no text; give each class a name")
        if label in seen:
            raise InvalidHeadError(f"{kind} head: label {label!r:.80} occurs twice; labels must differ")
        seen.add(label)


def _check_linear(
    kind: str, labels: Sequence[object], tensors: dict[str, Tensor], general: GeneralInfo
) -> None:
    _check_labels(kind, labels)
    shapes = {"weight": (len(labels), general.hidden_size), "bias": (len(labels),)}
    for name, tensor in tensors.items():
        where = f"{kind} head, {name}"
        if not isinstance(tensor, Tensor):
            raise InvalidHeadError(f"{where}: expected a tensor, found a {type(tensor).__name__}")
        if tensor.dtype not in _FLOAT_TYPES:
            raise InvalidHeadError(f"{where}: dtype is {tensor.dtype}, expected float32, float16 or bfloat16")
        if tuple(tensor.shape) != shapes[name]:
            raise InvalidHeadError(
                f"{where}: shape is {list(tensor.shape)}, expected {list(shapes[name])} "
                f"for {len(labels)} labels and hidden size {general.hidden_size}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidHeadError(f"{where}: holds NaN or infinity; was the training diverging?")
