"""Accuracy and macro-F1, by plain counting."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

__all__ = ["Metrics", "evaluate"]


class Metrics(BaseModel):
    """How predictions compare with the truth, over ``num_examples``.

    ``macro_f1`` is the mean over labels of 2 TP / (2 TP + FP + FN), labels that occur neither in the truth
    nor in the predictions left out. ``majority_accuracy`` is what always answering the most frequent label
    of the training examples would reach here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_examples: int
    accuracy: float
    macro_f1: float
    majority_accuracy: float


def evaluate(truth: Sequence[int], predictions: Sequence[int], majority: int) -> Metrics:
    """Compares label numbers; ``majority`` is the most frequent one in the training examples.

    Raises:
        ValueError: the sequences are empty or of different lengths.
    """
    if len(truth) != len(predictions) or not truth:
        raise ValueError(f"{len(predictions)} predictions cannot be compared with {len(truth)} labels")
    correct = sum(expected == found for expected, found in zip(truth, predictions, strict=True))
    scores = [_f1(truth, predictions, label) for label in sorted({*truth, *predictions})]
    return Metrics(
        num_examples=len(truth),
        accuracy=correct / len(truth),
        macro_f1=sum(scores) / len(scores),
        majority_accuracy=sum(label == majority for label in truth) / len(truth),
    )


def _f1(truth: Sequence[int], predictions: Sequence[int], label: int) -> float:
    pairs = zip(truth, predictions, strict=True)
    both = sum(expected == found == label for expected, found in pairs)
    either = truth.count(label) + predictions.count(label)
    return 2 * both / either
