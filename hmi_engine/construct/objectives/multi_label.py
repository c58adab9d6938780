"""Any number of labels for each text: binary cross-entropy of each, best by micro-F1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmi_engine.construct.objectives.objective import (
    Objective,
    Reading,
    TrainableHead,
    check_text,
    checked_types,
    digest_of,
    where,
)
from hmi_engine.construct.training_data import TaskData, encode_texts
from hmi_engine.construct.training_metrics import Metrics, measure_label_sets
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.examples import AnyExample, MultiLabelExample, Task
from hmi_engine.knowledge.heads import ClassificationHead
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["APPLIES", "MultiLabelObjective"]

APPLIES = 0.5
"""A label applies where its probability is above this."""


@dataclass(frozen=True, eq=False)
class MultiLabelObjective(Objective):
    """Multi-label classification.

    Attributes:
        labels: sorted names of the labels.
        reading: the first token, or the mean over tokens.
        label_smoothing: of the training loss: how far targets are from 0 and 1, times two.
        weights: float32 [C], of the examples to which a label applies; None for equal ones.
    """

    task: ClassVar[Task] = "multi_label"
    labels: tuple[str, ...]
    reading: Reading
    best_by: str = "micro_f1"
    label_smoothing: float = 0.0
    weights: Tensor | None = None

    @classmethod
    def learn(
        cls,
        examples: Sequence[AnyExample],
        settings: TrainingSettings,
        validation_examples: Sequence[AnyExample] = (),
    ) -> MultiLabelObjective:
        """See :meth:`Objective.learn`."""
        counts = Counter(label for example in _checked(examples) for label in set(example.labels))
        labels = tuple(sorted(counts))
        if all(count == len(examples) for count in counts.values()):
            raise TrainingDataError(
                f"every label applies to all or none of the {len(examples)} examples; there is nothing to "
                "learn"
            )
        applies = torch.tensor([float(counts[label]) for label in labels])
        return cls(
            labels=labels,
            reading=settings.pooling_or("cls"),
            label_smoothing=settings.label_smoothing,
            weights=_balanced(applies, len(examples)) if settings.class_weights else None,
        )

    def encode(self, examples: Sequence[AnyExample], encoder: TextEncoder, max_tokens: int) -> TaskData:
        """See :meth:`Objective.encode`; the targets are float32 [1, C], 1 where a label applies."""
        checked = _checked(examples)
        numbers = {label: number for number, label in enumerate(self.labels)}
        targets = []
        for number, example in enumerate(checked):
            if unknown := set(example.labels) - set(numbers):
                raise TrainingDataError(
                    f"{where(example, number)}: no training example has the label {min(unknown)!r:.80}; the "
                    f"training labels are {', '.join(self.labels)!s:.200}"
                )
            target = torch.zeros(1, len(self.labels))
            target[0, [numbers[label] for label in example.labels]] = 1.0
            targets.append(target)
        return TaskData(
            encoded=encode_texts([example.text for example in checked], encoder, max_tokens),
            targets=targets,
            readings=[(number,) for number in range(len(checked))],
            sha256=digest_of([example.text, sorted(set(example.labels))] for example in checked),
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy of outputs [B, C] with targets [B, C], the mean over both."""
        smoothed = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        return functional.binary_cross_entropy_with_logits(outputs, smoothed, pos_weight=self.weights)

    def measure(
        self, outputs: Tensor, data: TaskData, numbers: Sequence[int], *, resamples: int, seed: int = 0
    ) -> Metrics:
        """Judges the labels whose probability is above :data:`APPLIES`."""
        truth = data.batch_targets(numbers) > 0
        predictions = outputs.sigmoid() > APPLIES
        return measure_label_sets(truth.numpy(), predictions.numpy(), resamples=resamples, seed=seed)

    def to_head(self, head: nn.Module) -> ClassificationHead:
        """See :meth:`Objective.to_head`."""
        assert isinstance(head, TrainableHead) and self.reading != "words"
        return ClassificationHead(self.labels, *head.copies(), self.reading, multi_label=True)


def _balanced(applies: Tensor, num_examples: int) -> Tensor:
    """How many examples lack a label for each that has it, float32 [C]; 1 where all have it.

    Nothing stands against such a label, and without weight it would never be learned.
    """
    return torch.where(applies < num_examples, (num_examples - applies) / applies, 1.0)


def _checked(examples: Sequence[AnyExample]) -> list[MultiLabelExample]:
    checked = checked_types(examples, (MultiLabelExample,), "multi_label")
    for number, example in enumerate(checked):
        check_text(example.text, example, number)
        for label in example.labels:
            if not isinstance(label, str) or not label.strip():
                raise TrainingDataError(
                    f"{where(example, number)}: labels must be strings that are not blank, found "
                    f"{label!r:.80}"
                )
    return checked
