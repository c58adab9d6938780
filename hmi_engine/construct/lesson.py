"""What a tenant learns from a teacher: probabilities of labels, of labelled texts and of others.

Where a fully fine-tuned model is at hand, it answers what no label says: how sure it is, and what it makes of
any text of the domain (Hinton et al. 2015; as SkipBERT's students learn their tasks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from hmi_engine.construct.bootstrap import RESAMPLES
from hmi_engine.construct.objectives.objective import IGNORED, Objective
from hmi_engine.construct.teacher import Teacher
from hmi_engine.construct.training_data import Split, TaskData
from hmi_engine.construct.training_memory import memory_advice
from hmi_engine.construct.training_metrics import Metrics
from hmi_engine.construct.training_settings import TeacherReport, TrainingProgress, TrainingSettings
from hmi_engine.errors import TrainingDataError, UnsupportedModelError
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["Lesson", "Taught", "Teaching", "take_lesson"]


@dataclass(frozen=True)
class Teaching:
    """What a person gives: the folder of a fine-tuned model, and texts without labels."""

    folder: Path
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, teacher: str | Path | None, unlabelled: Sequence[str]) -> Teaching | None:
        """None where there is no teacher.

        Raises:
            TrainingDataError: unlabelled texts and nobody to say something of them, or a blank one.
        """
        if teacher is None:
            if unlabelled:
                raise TrainingDataError(
                    f"{len(unlabelled)} unlabelled texts are given and no teacher; only one can say what is "
                    "to be learned from them"
                )
            return None
        for number, text in enumerate(unlabelled):
            if not isinstance(text, str) or not text.strip():
                raise TrainingDataError(
                    f"unlabelled text {number}: must be a string that is not blank, found {text!r:.80}"
                )
        return cls(Path(teacher), tuple(unlabelled))


@dataclass(frozen=True)
class Lesson:
    """What the teacher said, and how much it counts.

    Attributes:
        said: for each example float32 [rows, C], probabilities of the labels; zeros where it says nothing.
        weight: share of the loss of a labelled text that follows the teacher; of others all of it does.
    """

    said: Sequence[Tensor]
    weight: float

    def loss(self, objective: Objective, outputs: Tensor, targets: Tensor, numbers: Sequence[int]) -> Tensor:
        """The mean over rows of outputs [R, C]: cross-entropy with the teacher, with the label, or both."""
        said = torch.cat([self.said[number] for number in numbers])
        is_taught = said.sum(1) > 0
        is_labelled = targets.view(len(targets), -1)[:, 0] != IGNORED
        shares = torch.where(is_labelled, self.weight, 1.0) * is_taught
        total = (functional.cross_entropy(outputs, said, reduction="none") * shares).sum()
        if bool(is_labelled.any()):
            total = total + objective.loss(outputs, targets) * (1 - self.weight) * is_labelled.sum()
        return total / (is_taught | is_labelled).sum().clamp(min=1)


@dataclass(frozen=True)
class Taught:
    """What is to be learned; without a teacher ``lesson`` and ``report`` are None.

    Attributes:
        data: the examples, and behind them the texts without a label.
        split: of them; these texts are for training.
        lesson: what the teacher says of them.
        report: who it is, and how well it does.
    """

    data: TaskData
    split: Split
    lesson: Lesson | None = None
    report: TeacherReport | None = None


def take_lesson(
    teaching: Teaching,
    objective: Objective,
    data: TaskData,
    split: Split,
    test_data: TaskData | None,
    *,
    encoder: TextEncoder,
    settings: TrainingSettings,
    progress: TrainingProgress | None,
) -> Taught:
    """Asks the teacher about the examples ``data`` and ``test_data``, and about the texts without a label.

    Raises:
        TrainingDataError: the task learns from no teacher.
        UnsupportedModelError: there is no such model, its labels are not those of the examples, or it fails.
        TrainingMemoryError: not enough memory.
    """
    unlabelled = objective.encode_unlabelled(teaching.texts, encoder, settings.max_tokens)
    teacher = _load(teaching, objective, data, settings)
    everything = data.followed_by(unlabelled)

    def ask(examples: TaskData) -> list[Tensor]:
        with memory_advice(settings, "asking the teacher"):
            return teacher.probabilities(examples, objective.labels, progress)

    said = ask(everything)

    def judged(answers: Sequence[Tensor], examples: TaskData, numbers: Sequence[int]) -> Metrics:
        outputs = torch.cat([answers[number] for number in numbers])
        return objective.measure(outputs, examples, numbers, resamples=RESAMPLES, seed=settings.seed)

    test = None
    if test_data is not None:
        test = judged(ask(test_data), test_data, range(len(test_data)))
    report = TeacherReport(
        sha256=teacher.sha256,
        num_unlabelled=len(teaching.texts),
        texts_sha256=unlabelled.sha256 if teaching.texts else None,
        validation=judged(said, data, split.validation),
        test=test,
    )
    training = (*split.training, *range(len(data), len(everything)))
    return Taught(
        everything, Split(training, split.validation), Lesson(said, settings.teacher_weight), report
    )


def _load(teaching: Teaching, objective: Objective, data: TaskData, settings: TrainingSettings) -> Teacher:
    with memory_advice(settings, "loading the teacher"):
        teacher = Teacher.load(teaching.folder, objective.task, settings.max_tokens)
    occurring = {
        objective.labels[number]
        for target in data.targets
        for number in target.view(len(target), -1)[:, -1].tolist()
    }
    strange, unknown = set(teacher.labels) - set(objective.labels), occurring - set(teacher.labels)
    if strange or unknown:
        problem = (
            f"the teacher's label {min(strange)!r:.80} is none of the examples'"
            if strange
            else f"the teacher does not know the label {min(unknown)!r:.80}"
        )
        raise UnsupportedModelError(
            f"{teaching.folder}: {problem}; the examples have {', '.join(objective.labels)!s:.200}, the "
            f"teacher has {', '.join(teacher.labels)!s:.200}"
        )
    return teacher
