"""One label for each text: cross-entropy, best by accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmi_engine.construct.objectives.label_weights import balanced_weights
from hmi_engine.construct.objectives.objective import (
    IGNORED,
    Objective,
    Reading,
    TrainableHead,
    check_text,
    checked_types,
    digest_of,
    where,
)
from hmi_engine.construct.training_data import Split, TaskData, encode_texts, stratified_split
from hmi_engine.construct.training_metrics import Metrics, measure_classes
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.examples import AnyExample, Example, Task
from hmi_engine.knowledge.heads import ClassificationHead
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["ClassificationObjective"]


@dataclass(frozen=True, eq=False)
class ClassificationObjective(Objective):
    """Single-label classification.

    Attributes:
        labels: sorted names of the labels.
        reading: the first token, or the mean over tokens.
        majority: number of the most frequent training label, the first of them in a tie.
        label_smoothing: of the training loss.
        weights: float32 [C] of the labels in the loss; None for equal ones.
    """

    task: ClassVar[Task] = "classification"
    labels: tuple[str, ...]
    reading: Reading
    majority: int
    best_by: str = "accuracy"
    label_smoothing: float = 0.0
    weights: Tensor | None = None

    @classmethod
    def learn(
        cls,
        examples: Sequence[AnyExample],
        settings: TrainingSettings,
        validation_examples: Sequence[AnyExample] = (),
    ) -> ClassificationObjective:
        """See :meth:`Objective.learn`."""
        counts = Counter(example.label for example in _checked(examples))
        labels = tuple(sorted(counts))
        if len(labels) < 2:
            raise TrainingDataError(
                f"all {len(examples)} examples have the label {labels[0]!r:.80}; a classifier needs two "
                "labels"
            )
        return cls(
            labels=labels,
            reading=settings.pooling_or("cls"),
            majority=max(range(len(labels)), key=lambda number: counts[labels[number]]),
            label_smoothing=settings.label_smoothing,
            weights=balanced_weights(counts[label] for label in labels) if settings.class_weights else None,
        )

    def encode(self, examples: Sequence[AnyExample], encoder: TextEncoder, max_tokens: int) -> TaskData:
        """See :meth:`Objective.encode`; the targets are label numbers, int64 [1]."""
        checked = _checked(examples)
        numbers = {label: number for number, label in enumerate(self.labels)}
        for example in checked:
            if example.label not in numbers:
                raise TrainingDataError(
                    f"validation and test examples have the label {example.label!r:.80}, which no training "
                    f"example has; the training labels are {', '.join(self.labels)!s:.200}"
                )
        return TaskData(
            encoded=encode_texts([example.text for example in checked], encoder, max_tokens),
            targets=[torch.tensor([numbers[example.label]]) for example in checked],
            readings=[(number,) for number in range(len(checked))],
            sha256=digest_of([example.text, example.label] for example in checked),
        )

    def encode_unlabelled(self, texts: Sequence[str], encoder: TextEncoder, max_tokens: int) -> TaskData:
        """See :meth:`Objective.encode_unlabelled`."""
        return TaskData(
            encoded=encode_texts(texts, encoder, max_tokens),
            targets=[torch.tensor([IGNORED])] * len(texts),
            readings=[(number,) for number in range(len(texts))],
            sha256=digest_of(texts),
        )

    def split(self, data: TaskData, fraction: float, generator: torch.Generator) -> Split:
        """Holds out ``fraction`` of each label's examples; see :func:`stratified_split`."""
        targets = [int(target) for target in data.targets]
        return stratified_split(targets, len(self.labels), fraction, generator)

    def unjudged_labels(self, data: TaskData, numbers: Sequence[int]) -> tuple[str, ...]:
        """See :meth:`Objective.unjudged_labels`."""
        judged = set(data.batch_targets(numbers).tolist())
        return tuple(label for number, label in enumerate(self.labels) if number not in judged)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of outputs [B, C] with targets int64 [B]."""
        return functional.cross_entropy(
            outputs, targets, weight=self.weights, label_smoothing=self.label_smoothing
        )

    def measure(
        self, outputs: Tensor, data: TaskData, numbers: Sequence[int], *, resamples: int, seed: int = 0
    ) -> Metrics:
        """Judges the label of the highest output."""
        truth, predictions = data.batch_targets(numbers), outputs.argmax(dim=1)
        return measure_classes(
            truth.tolist(), predictions.tolist(), majority=self.majority, resamples=resamples, seed=seed
        )

    def to_head(self, head: nn.Module) -> ClassificationHead:
        """See :meth:`Objective.to_head`."""
        assert isinstance(head, TrainableHead) and self.reading != "words"
        return ClassificationHead(self.labels, *head.copies(), self.reading)


def _checked(examples: Sequence[AnyExample]) -> list[Example]:
    checked = checked_types(examples, (Example,), "classification")
    for number, example in enumerate(checked):
        check_text(example.text, example, number)
        if not isinstance(example.label, str) or not example.label.strip():
            raise TrainingDataError(
                f"{where(example, number)}: a label must be a string that is not blank, found "
                f"{example.label!r:.80}; labels are all of one type"
            )
    return checked
