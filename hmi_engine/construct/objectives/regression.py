"""A number for each text: squared error, best by the share of variance that is explained.

The loss compares numbers that have mean 0 and variance 1 over the training examples, so that a learning rate
suits any unit; the stored head gives the numbers as they were.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hmi_engine.construct.objectives.objective import (
    Objective,
    Reading,
    TrainableHead,
    check_text,
    checked_number,
    checked_types,
    digest_of,
)
from hmi_engine.construct.training_data import TaskData, encode_texts
from hmi_engine.construct.training_metrics import Metrics, measure_numbers
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.examples import AnyExample, RegressionExample, Task
from hmi_engine.knowledge.heads import RegressionHead
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["RegressionObjective"]


@dataclass(frozen=True, eq=False)
class RegressionObjective(Objective):
    """Regression of one number.

    Attributes:
        reading: the first token, or the mean over tokens.
        mean: of the training numbers.
        deviation: of the training numbers, above 0.
        labels: the name of the number.
    """

    task: ClassVar[Task] = "regression"
    reading: Reading
    mean: float
    deviation: float
    labels: tuple[str, ...] = ("value",)
    best_by: str = "r2"

    @classmethod
    def learn(
        cls,
        examples: Sequence[AnyExample],
        settings: TrainingSettings,
        validation_examples: Sequence[AnyExample] = (),
    ) -> RegressionObjective:
        """See :meth:`Objective.learn`."""
        values = [float(example.value) for example in _checked(examples)]
        if min(values) == max(values):
            raise TrainingDataError(
                f"all {len(values)} examples have the value {values[0]:g}; there is nothing to learn"
            )
        return cls(settings.pooling_or("cls"), statistics.fmean(values), statistics.pstdev(values))

    def encode(self, examples: Sequence[AnyExample], encoder: TextEncoder, max_tokens: int) -> TaskData:
        """See :meth:`Objective.encode`; the targets are the numbers as they were given, float64 [1, 1]."""
        checked = _checked(examples)
        return TaskData(
            encoded=encode_texts([example.text for example in checked], encoder, max_tokens),
            targets=[torch.tensor([[float(example.value)]], dtype=torch.float64) for example in checked],
            readings=[(number,) for number in range(len(checked))],
            sha256=digest_of([example.text, float(example.value)] for example in checked),
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of outputs [B, 1] with the standardised targets."""
        return functional.mse_loss(outputs, ((targets - self.mean) / self.deviation).to(outputs.dtype))

    def measure(
        self, outputs: Tensor, data: TaskData, numbers: Sequence[int], *, resamples: int, seed: int = 0
    ) -> Metrics:
        """Judges the numbers in their own unit."""
        truth = np.asarray(data.batch_targets(numbers)[:, 0].numpy(), dtype=np.float64)
        predictions = np.asarray((outputs[:, 0].double() * self.deviation + self.mean).numpy())
        return measure_numbers(truth, predictions, resamples=resamples, seed=seed)

    def to_head(self, head: nn.Module) -> RegressionHead:
        """The head whose numbers have their own unit."""
        assert isinstance(head, TrainableHead) and self.reading != "words"
        weight, bias = head.copies()
        return RegressionHead(
            self.labels, weight * self.deviation, bias * self.deviation + self.mean, self.reading
        )


def _checked(examples: Sequence[AnyExample]) -> list[RegressionExample]:
    checked = checked_types(examples, (RegressionExample,), "regression")
    for number, example in enumerate(checked):
        check_text(example.text, example, number)
        checked_number(example.value, "the value", example, number)
    return checked
