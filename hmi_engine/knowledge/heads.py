"""Heads: what a tenant makes of the last layer's hidden states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hmi_engine.errors import InvalidHeadError
from hmi_engine.knowledge.finite import is_finite
from hmi_engine.knowledge.general import GeneralInfo
from hmi_kernels import ACTIVATIONS

__all__ = [
    "MAX_HIDDEN_LAYERS",
    "MAX_PROJECTION",
    "POOLINGS",
    "ClassificationHead",
    "DenseLayer",
    "EmbeddingHead",
    "GenerationHead",
    "Head",
    "HeadKind",
    "Pooling",
    "RegressionHead",
    "TokenClassificationHead",
]

HeadKind = Literal["classification", "token_classification", "embedding", "regression", "generation"]
Pooling = Literal["pooler", "cls", "mean", "last"]

POOLINGS: tuple[Pooling, ...] = ("pooler", "cls", "mean", "last")
"""``pooler``: the base model's tanh layer on the first token; ``cls``: that token; ``mean``: the average.

``last``: the last token, which in a decoder has seen all others. Encoders have the first three, decoders the
last."""

MAX_HIDDEN_LAYERS = 8
MAX_PROJECTION = 65_536
_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A layer inside a head: ``activation(x @ weight.T + bias)``; ``weight`` [out, in], ``bias`` [out].

    ``activation`` is one of ``hmi_kernels.ACTIVATIONS``, or None for none.
    """

    weight: Tensor
    bias: Tensor
    activation: str | None


@dataclass(frozen=True, eq=False)
class ClassificationHead:
    """Scores of C labels for a sequence: ``pooled @ weight.T + bias``.

    ``weight`` [C, H], ``bias`` [C]. Probabilities are a softmax over labels, or, with ``multi_label``, a
    sigmoid of each. ``hidden`` layers [H, H] come before, in their order.
    """

    kind: ClassVar[Literal["classification"]] = "classification"
    labels: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    pooling: Pooling
    multi_label: bool = False
    hidden: tuple[DenseLayer, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return _linear_tensors(self)

    def validate(self, general: GeneralInfo) -> None:
        """Raise :class:`InvalidHeadError` if labels, tensors or pooling do not fit the base model."""
        _check_linear(self, general)
        _check_pooling(self.kind, self.pooling, general)


@dataclass(frozen=True, eq=False)
class RegressionHead:
    """C numbers for a sequence, ``pooled @ weight.T + bias`` as it is; the labels name the numbers.

    ``weight`` [C, H], ``bias`` [C]. ``hidden`` layers [H, H] come before, in their order.
    """

    kind: ClassVar[Literal["regression"]] = "regression"
    labels: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    pooling: Pooling
    hidden: tuple[DenseLayer, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return _linear_tensors(self)

    def validate(self, general: GeneralInfo) -> None:
        """Raise :class:`InvalidHeadError` if labels, tensors or pooling do not fit the base model."""
        _check_linear(self, general)
        _check_pooling(self.kind, self.pooling, general)


@dataclass(frozen=True, eq=False)
class TokenClassificationHead:
    """Scores of C labels for each token: ``hidden @ weight.T + bias``; ``weight`` [C, H], ``bias`` [C].

    ``hidden`` layers [H, H] come before, in their order.
    """

    kind: ClassVar[Literal["token_classification"]] = "token_classification"
    pooling: ClassVar[None] = None
    labels: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    hidden: tuple[DenseLayer, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return _linear_tensors(self)

    def validate(self, general: GeneralInfo) -> None:
        """Raise :class:`InvalidHeadError` if labels or tensors do not fit the base model."""
        if general.is_causal:
            raise InvalidHeadError(
                f"token_classification head: {general.source} is a decoder, whose tokens have not seen what "
                "comes after them; use an encoder"
            )
        _check_linear(self, general)


@dataclass(frozen=True, eq=False)
class EmbeddingHead:
    """One vector for a sequence: pooled [H], then the ``projection`` to [D] if there is one.

    ``normalize`` makes its length 1 at the end. The projection is ``sentence_transformers.models.Dense``.
    """

    kind: ClassVar[Literal["embedding"]] = "embedding"
    labels: ClassVar[tuple[str, ...]] = ()
    pooling: Pooling
    normalize: bool = True
    projection: DenseLayer | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the projection's tensors by name, nothing without one."""
        return {} if self.projection is None else _dense_tensors("projection", self.projection)

    def validate(self, general: GeneralInfo) -> None:
        """Raise :class:`InvalidHeadError` if pooling or projection do not fit the base model."""
        _check_pooling(self.kind, self.pooling, general)
        if self.projection is not None:
            _check_projection(self.projection, general)


@dataclass(frozen=True)
class GenerationHead:
    """The next token, by the base model's own word embeddings: a decoder's language model head."""

    kind: ClassVar[Literal["generation"]] = "generation"
    pooling: ClassVar[None] = None
    labels: ClassVar[tuple[str, ...]] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the embeddings are the base model's."""
        return {}

    def validate(self, general: GeneralInfo) -> None:
        """Raise :class:`InvalidHeadError` if the base model is no decoder."""
        if not general.is_causal:
            raise InvalidHeadError(
                f"generation head: {general.source} is an encoder, which generates no text"
            )


Head = ClassificationHead | TokenClassificationHead | EmbeddingHead | RegressionHead | GenerationHead
_LinearHead = ClassificationHead | TokenClassificationHead | RegressionHead


def _dense_tensors(name: str, layer: DenseLayer) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


def _linear_tensors(head: _LinearHead) -> dict[str, Tensor]:
    tensors = {"weight": head.weight, "bias": head.bias}
    for index, layer in enumerate(head.hidden):
        tensors |= _dense_tensors(f"hidden.{index}", layer)
    return tensors


def _check_pooling(kind: str, pooling: object, general: GeneralInfo) -> None:
    known = ("last",) if general.is_causal else tuple(name for name in POOLINGS if name != "last")
    if pooling not in known:
        raise InvalidHeadError(
            f"{kind} head: pooling {pooling!r:.80} is none that {general.source} has: {', '.join(known)}"
        )


def _check_labels(kind: str, labels: Sequence[object]) -> None:
    if not isinstance(labels, tuple) or not labels:
        raise InvalidHeadError(
            f"{kind} head: labels must be a tuple of at least one str, found {labels!r:.80}"
        )
    seen: set[str] = set()
    for label in labels:
        if not isinstance(label, str) or not label.strip() or not _is_unicode(label):
            raise InvalidHeadError(f"{kind} head: label {label!r:.80} is no text; give each class a name")
        if label in seen:
            raise InvalidHeadError(f"{kind} head: label {label!r:.80} occurs twice; labels must differ")
        seen.add(label)


def _is_unicode(label: str) -> bool:
    """Whether it has no half of a surrogate pair, as bytes of the command line that are no UTF-8 become."""
    return not any("\ud800" <= letter <= "\udfff" for letter in label)


def _check_linear(head: _LinearHead, general: GeneralInfo) -> None:
    _check_labels(head.kind, head.labels)
    _check_hidden(head.kind, head.hidden)
    count, size = len(head.labels), general.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"weight": (count, size), "bias": (count,)}
    for index in range(len(head.hidden)):
        shapes |= {f"hidden.{index}.weight": (size, size), f"hidden.{index}.bias": (size,)}
    _check_tensors(head.kind, head.tensors(), shapes, f"for {count} labels and hidden size {size}")


def _check_hidden(kind: str, layers: object) -> None:
    if not isinstance(layers, tuple) or len(layers) > MAX_HIDDEN_LAYERS:
        raise InvalidHeadError(
            f"{kind} head: hidden must be a tuple of at most {MAX_HIDDEN_LAYERS} DenseLayer, "
            f"found {layers!r:.80}"
        )
    for index, layer in enumerate(layers):
        _check_dense(f"{kind} head, hidden.{index}", layer)


def _check_dense(where: str, layer: object) -> None:
    if not isinstance(layer, DenseLayer):
        raise InvalidHeadError(f"{where}: expected a DenseLayer, found a {type(layer).__name__}")
    if layer.activation is not None and layer.activation not in ACTIVATIONS:
        raise InvalidHeadError(
            f"{where}: activation {layer.activation!r:.80} is unknown; known are "
            f"{', '.join(ACTIVATIONS)}, and None"
        )


def _check_projection(projection: object, general: GeneralInfo) -> None:
    _check_dense("embedding head, projection", projection)
    assert isinstance(projection, DenseLayer)
    weight = projection.weight
    size = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0
    if not 1 <= size <= MAX_PROJECTION:
        raise InvalidHeadError(
            f"embedding head: the projection's weight must be a matrix [D, {general.hidden_size}] with "
            f"D from 1 to {MAX_PROJECTION}"
        )
    shapes = {"projection.weight": (size, general.hidden_size), "projection.bias": (size,)}
    _check_tensors("embedding", _dense_tensors("projection", projection), shapes, "for this base model")


def _check_tensors(
    kind: str, tensors: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], reason: str
) -> None:
    for name, tensor in tensors.items():
        where = f"{kind} head, {name}"
        if not isinstance(tensor, Tensor):
            raise InvalidHeadError(f"{where}: expected a tensor, found a {type(tensor).__name__}")
        if tensor.dtype not in _FLOAT_TYPES:
            raise InvalidHeadError(f"{where}: dtype is {tensor.dtype}, expected float32, float16 or bfloat16")
        if tuple(tensor.shape) != shapes[name]:
            raise InvalidHeadError(
                f"{where}: shape is {list(tensor.shape)}, expected {list(shapes[name])} {reason}"
            )
        if not is_finite(tensor):
            raise InvalidHeadError(f"{where}: holds NaN or infinity; was the training diverging?")
