"""What every task says of itself: all that training loops know of tasks."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmi_engine.construct.teacher import TEACHABLE_TASKS
from hmi_engine.construct.training_data import Split, TaskData, random_split
from hmi_engine.construct.training_metrics import Metrics
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.corpus_examples import finite_number
from hmi_engine.knowledge.examples import AnyExample, Task
from hmi_engine.knowledge.heads import Head
from hmi_engine.models.tokenization import TextEncoder

__all__ = [
    "IGNORED",
    "Objective",
    "Reading",
    "TrainableHead",
    "check_text",
    "checked_number",
    "checked_types",
    "digest_of",
    "where",
]

IGNORED = -100
"""Target of a text or word whose label is not known, or of a word that has no piece: nothing is learned."""

Reading = Literal["cls", "mean", "words"]
"""What a head reads of the last hidden states: the first token, the mean over tokens, or single tokens."""

ExampleType = TypeVar("ExampleType")
_INITIAL_DEVIATION = 0.02


class TrainableHead(nn.Module):
    """Rows [*, H] -> [*, C]; starts small, so that all labels are about equally likely."""

    def __init__(self, num_outputs: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_outputs, size, generator=generator) * _INITIAL_DEVIATION)
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, rows: Tensor) -> Tensor:
        """One score for each row and label, with gradients."""
        return functional.linear(rows, self.weight, self.bias)

    def copies(self) -> tuple[Tensor, Tensor]:
        """Copies of weight and bias as they are now."""
        return self.weight.detach().clone(), self.bias.detach().clone()


class Objective(ABC):
    """One task with its labels: targets, loss, judgement and head. It knows nothing of adapters and loops.

    What a head reads goes in rows: ``outputs`` are the head's rows for a batch's texts in the order of
    ``TaskData.batch_texts``, one for each text, or for each of its words.

    Attributes:
        task: the task's name.
        best_by: the figure that chooses the best epoch; the higher, the better.
        reading: what the head reads.
        labels: names of the outputs, in the order of the head's rows.
    """

    task: ClassVar[Task]
    best_by: str
    reading: Reading
    labels: tuple[str, ...]

    @classmethod
    @abstractmethod
    def learn(
        cls,
        examples: Sequence[AnyExample],
        settings: TrainingSettings,
        validation_examples: Sequence[AnyExample] = (),
    ) -> Objective:
        """The objective for training examples: finds their labels.

        What ``validation_examples`` are may decide by which figure the best epoch is chosen.

        Raises:
            TrainingDataError: examples of another task, too few of them, or too few labels.
        """

    @abstractmethod
    def encode(self, examples: Sequence[AnyExample], encoder: TextEncoder, max_tokens: int) -> TaskData:
        """Examples as token ids and targets.

        Raises:
            TrainingDataError: none, one of another task, an empty text or label, or an unknown label.
        """

    def encode_unlabelled(self, texts: Sequence[str], encoder: TextEncoder, max_tokens: int) -> TaskData:
        """Texts without a label, whose targets are :data:`IGNORED`, for a teacher to say something of.

        Raises:
            TrainingDataError: the task learns from no teacher.
        """
        raise TrainingDataError(
            f"the task {self.task} learns from no teacher; those that do are {', '.join(TEACHABLE_TASKS)}"
        )

    def check_held_out(self, examples: Sequence[AnyExample], name: str) -> None:  # noqa: B027
        """Looks at examples to judge by, before any work, for what one figure cannot judge together.

        Raises:
            TrainingDataError: there is such; ``name`` says in the message whose examples they are.
        """

    def split(self, data: TaskData, fraction: float, generator: torch.Generator) -> Split:
        """Holds out ``fraction`` of the examples, at random.

        Raises:
            TrainingDataError: there are too few.
        """
        return random_split(len(data), fraction, generator)

    def unjudged_labels(self, data: TaskData, numbers: Sequence[int]) -> tuple[str, ...]:
        """Labels of which figures on the examples ``numbers`` say nothing, as none of these has them."""
        return ()

    def new_head(self, size: int, generator: torch.Generator) -> nn.Module:
        """A head that is trained: rows [*, size] -> outputs."""
        return TrainableHead(len(self.labels), size, generator)

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The scalar that training makes small; ``targets`` are those of ``TaskData.batch_targets``."""

    @abstractmethod
    def measure(
        self, outputs: Tensor, data: TaskData, numbers: Sequence[int], *, resamples: int, seed: int = 0
    ) -> Metrics:
        """Judges the outputs of the examples ``numbers``; intervals by so many ``resamples``, 0 for none."""

    @abstractmethod
    def to_head(self, head: nn.Module) -> Head:
        """A copy of a trained head, to store and serve."""


def checked_types(
    examples: Sequence[AnyExample], expected: tuple[type[ExampleType], ...], task: Task
) -> list[ExampleType]:
    """Returns the examples.

    Raises:
        TrainingDataError: there are none, or one is of another task.
    """
    names = " or ".join(kind.__name__ for kind in expected)
    if not examples:
        raise TrainingDataError(f"there are no {task} examples; give some, each a {names}")
    checked: list[Any] = []
    for example in examples:
        if not isinstance(example, expected):
            raise TrainingDataError(
                f"the task {task} takes examples of type {names}, found a {type(example).__name__}; "
                "does the setting 'task' fit the data?"
            )
        checked.append(example)
    return checked


def where(example: AnyExample, number: int) -> str:
    """Names an example in a message: by its line in a file, or its place in a list."""
    return f"line {example.line}" if example.line else f"example {number}"


def check_text(text: object, example: AnyExample, number: int) -> None:
    """Raises :class:`TrainingDataError` unless ``text`` is one that holds something."""
    if not isinstance(text, str) or not text.strip():
        raise TrainingDataError(
            f"{where(example, number)}: a text must be a string that is not blank, found {text!r:.80}"
        )


def checked_number(value: object, name: str, example: AnyExample, number: int) -> float:
    """Returns the value, which ``name`` stands for; raises :class:`TrainingDataError` unless it is finite."""
    found = finite_number(value)
    if found is None:
        shown = "an integer beyond float64" if type(value) is int else repr(value)
        raise TrainingDataError(
            f"{where(example, number)}: {name} must be a finite number, found {shown:.80}"
        )
    return found


def digest_of(rows: Iterable[object]) -> str:
    """SHA-256 in hex of rows that JSON can hold, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
