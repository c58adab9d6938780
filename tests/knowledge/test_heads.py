from collections.abc import Callable

import pytest
import torch

from hmi_engine.errors import InvalidHeadError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import ClassificationHead, EmbeddingHead, Head, TokenClassificationHead

WEIGHT, BIAS = torch.ones(2, 8), torch.ones(2)
LABELS = ("no", "yes")


def test_sound_heads_pass(general: GeneralInfo, heads: list[Head]) -> None:
    for head in heads:
        head.validate(general)
    assert [head.kind for head in heads] == ["classification", "token_classification", "embedding"]
    assert heads[2].labels == ()
    assert heads[2].tensors() == {}


@pytest.mark.parametrize(
    ("make_head", "message"),
    [
        (lambda: ClassificationHead(LABELS, WEIGHT, BIAS, "max"), "pooling 'max' is unknown"),
        (lambda: EmbeddingHead("max"), "pooling 'max' is unknown"),
        (lambda: ClassificationHead((), WEIGHT, BIAS, "cls"), "at least one"),
        (lambda: ClassificationHead(["no", "yes"], WEIGHT, BIAS, "cls"), "must be a tuple"),
        (lambda: ClassificationHead(("no", "no"), WEIGHT, BIAS, "cls"), "'no' occurs twice"),
        (lambda: ClassificationHead(("no", " "), WEIGHT, BIAS, "cls"), "is no text"),
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
    ],
)
def test_what_does_not_fit_is_refused_and_named(
    general: GeneralInfo, make_head: Callable[[], Head], message: str
) -> None:
    with pytest.raises(InvalidHeadError, match=message):
        make_head().validate(general)
