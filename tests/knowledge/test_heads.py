from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hmi_engine.errors import InvalidHeadError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import (
    ClassificationHead,
    DenseLayer,
    EmbeddingHead,
    Head,
    RegressionHead,
    TokenClassificationHead,
)

WEIGHT, BIAS = torch.ones(2, 8), torch.ones(2)
LABELS = ("no", "yes")
SQUARE = DenseLayer(torch.ones(8, 8), torch.ones(8), "tanh")


def with_hidden(layers: object) -> Head:
    return ClassificationHead(LABELS, WEIGHT, BIAS, "cls", hidden=layers)  # type: ignore[arg-type]


def test_sound_heads_pass(general: GeneralInfo, heads: list[Head]) -> None:
    for head in heads:
        head.validate(general)
    assert {head.kind for head in heads} == {
        "classification",
        "token_classification",
        "embedding",
        "regression",
    }
    assert heads[2].labels == ()
    assert heads[2].tensors() == {}
    assert heads[3].tensors().keys() == {"projection.weight", "projection.bias"}


@pytest.mark.parametrize(
    ("make_head", "message"),
    [
        (lambda: ClassificationHead(LABELS, WEIGHT, BIAS, "max"), "pooling 'max' is none that"),
        (lambda: EmbeddingHead("max"), "pooling 'max' is none that"),
        (lambda: ClassificationHead((), WEIGHT, BIAS, "cls"), "at least one"),
        (lambda: ClassificationHead(["no", "yes"], WEIGHT, BIAS, "cls"), "must be a tuple"),
        (lambda: ClassificationHead(("no", "no"), WEIGHT, BIAS, "cls"), "'no' occurs twice"),
        (lambda: ClassificationHead(("no", " "), WEIGHT, BIAS, "cls"), "is no text"),
        (lambda: ClassificationHead(("no", "y\ud800"), WEIGHT, BIAS, "cls"), "is no text"),
        (lambda: ClassificationHead(("no", 1), WEIGHT, BIAS, "cls"), "label 1 is no text"),
        (
            lambda: TokenClassificationHead(LABELS, WEIGHT.T, BIAS),
            r"weight: shape is \[8, 2\], expected \[2, 8\]",
        ),
        (
            lambda: TokenClassificationHead(LABELS, WEIGHT, torch.ones(3)),
            r"bias: shape is \[3\], expected \[2\]",
        ),
        (lambda: TokenClassificationHead(LABELS, WEIGHT * float("nan"), BIAS), "weight: holds NaN"),
        (lambda: TokenClassificationHead(LABELS, WEIGHT, BIAS / 0), "bias: holds NaN or infinity"),
        (lambda: TokenClassificationHead(LABELS, WEIGHT.double(), BIAS), "torch.float64"),
        (lambda: TokenClassificationHead(LABELS, WEIGHT, None), "bias: expected a tensor, found a NoneType"),
        (lambda: RegressionHead((), WEIGHT, BIAS, "cls"), "regression head: .*at least one"),
        (lambda: RegressionHead(LABELS, WEIGHT, BIAS, "max"), "regression head: pooling 'max' is none that"),
        (lambda: with_hidden([SQUARE]), "hidden must be a tuple of at most 8"),
        (lambda: with_hidden((SQUARE,) * 9), "hidden must be a tuple of at most 8"),
        (lambda: with_hidden((WEIGHT,)), r"hidden\.0: expected a DenseLayer, found a Tensor"),
        (lambda: with_hidden((SQUARE, replace(SQUARE, activation="mish"))), r"hidden\.1: activation 'mish'"),
        (lambda: with_hidden((replace(SQUARE, weight=WEIGHT),)), r"hidden\.0\.weight: shape is \[2, 8\]"),
        (lambda: with_hidden((replace(SQUARE, bias=torch.ones(8) / 0),)), r"hidden\.0\.bias: holds NaN"),
        (lambda: EmbeddingHead("cls", True, WEIGHT), "projection: expected a DenseLayer"),
        (
            lambda: EmbeddingHead("cls", True, replace(SQUARE, weight=BIAS)),
            r"projection.weight: shape is \[2\]",
        ),
        (lambda: EmbeddingHead("cls", True, replace(SQUARE, bias=BIAS)), r"projection.bias: shape is \[2\]"),
        (lambda: EmbeddingHead("cls", True, DenseLayer(None, BIAS, None)), "projection"),
        (
            lambda: EmbeddingHead("cls", True, DenseLayer(torch.ones(0, 8), torch.ones(0), None)),
            "D from 1 to",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_named(
    general: GeneralInfo, make_head: Callable[[], Head], message: str
) -> None:
    with pytest.raises(InvalidHeadError, match=message):
        make_head().validate(general)
