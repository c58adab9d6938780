"""The loop over epochs and batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hmi_engine.construct.lesson import Lesson
from hmi_engine.construct.objectives import Objective
from hmi_engine.construct.trainable_tenant import TrainableTenant
from hmi_engine.construct.training_cache import HiddenStateCache
from hmi_engine.construct.training_data import Split, TaskData, length_batches
from hmi_engine.construct.training_memory import memory_advice
from hmi_engine.construct.training_schedule import Schedule
from hmi_engine.construct.training_settings import Epoch, TrainingProgress, TrainingSettings
from hmi_engine.errors import TrainingDivergedError

__all__ = [
    "MAX_GRADIENT_NORM",
    "TRAINING_STAGE",
    "Course",
    "FitResult",
    "TrainingTask",
    "diverged",
    "fit",
    "learning_rate_factor",
    "num_steps",
]

TRAINING_STAGE = "training"
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainingTask:
    """What to learn.

    Attributes:
        states: what of the texts' hidden states the training does not change.
        data: the examples.
        split: which of them to learn from, and which to judge by.
        objective: what to make of them.
        lesson: what a teacher says of them; None without one.
    """

    states: HiddenStateCache
    data: TaskData
    split: Split
    objective: Objective
    lesson: Lesson | None = None

    def loss(self, outputs: Tensor, numbers: Sequence[int]) -> Tensor:
        """What a step makes smaller: the loss of the outputs for the training examples ``numbers``."""
        targets = self.data.batch_targets(numbers)
        if self.lesson is None:
            return self.objective.loss(outputs, targets)
        return self.lesson.loss(self.objective, outputs, targets, numbers)


@dataclass(frozen=True)
class FitResult:
    """Every epoch, and which one's parameters the tenant has now.

    ``divergence`` says where the loss became infinite or NaN, which ended the training; None if it did not.
    """

    history: tuple[Epoch, ...]
    best_epoch: int
    divergence: str | None = None


@dataclass
class Course:
    """Epochs so far, and the parameters of the best one."""

    best_by: str
    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = -1
    best: dict[str, Tensor] = field(default_factory=dict)

    def add(self, epoch: Epoch, tenant: TrainableTenant) -> None:
        """Notes an epoch, and the tenant's parameters if it is the best one."""
        self.history.append(epoch)
        if self.best_epoch < 0 or self._rank(epoch) > self._rank(self.history[self.best_epoch]):
            self.best_epoch = len(self.history) - 1
            self.best = {name: tensor.detach().clone() for name, tensor in tenant.state_dict().items()}

    def _rank(self, epoch: Epoch) -> tuple[float, float]:
        return epoch.metrics[self.best_by], -epoch.validation_loss

    def is_exhausted(self, patience: int) -> bool:
        """Whether neither measure got better in the last epochs: one figure is coarse on few examples."""
        earlier, recent = self.history[:-patience], self.history[-patience:]
        return bool(earlier) and not (
            max(epoch.metrics[self.best_by] for epoch in recent)
            > max(epoch.metrics[self.best_by] for epoch in earlier)
            or min(epoch.validation_loss for epoch in recent)
            < min(epoch.validation_loss for epoch in earlier)
        )

    def finished(self, tenant: TrainableTenant, divergence: str | None = None) -> FitResult:
        """Gives the tenant the parameters of the best epoch."""
        tenant.load_state_dict(self.best)
        return FitResult(tuple(self.history), self.best_epoch, divergence)


def diverged(step: int, batch: int, settings: TrainingSettings) -> TrainingDivergedError:
    """Says at which step of all, and at which batch of the epoch, the loss was not finite; both from 1."""
    return TrainingDivergedError(
        f"the loss became infinite or NaN at step {step} (batch {batch} of the epoch) with a peak learning "
        f"rate of {settings.peak_learning_rate:g}; choose a lower one"
    )


def learning_rate_factor(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Share of the peak at a step, from 0 on: a linear warm-up, then a linear decay to zero."""
    warmup = max(1, round(total_steps * warmup_fraction))
    return min((step + 1) / warmup, (total_steps - step) / max(1, total_steps - warmup))


def num_steps(task: TrainingTask, settings: TrainingSettings) -> int:
    """Steps of a training that is not ended early."""
    num_training = len(task.split.training)
    return Schedule.of(settings, num_training).num_steps(num_training)


def fit(
    task: TrainingTask,
    tenant: TrainableTenant,
    settings: TrainingSettings,
    generator: torch.Generator,
    progress: TrainingProgress | None = None,
    *,
    max_steps: int | None = None,
    stage: str = TRAINING_STAGE,
) -> FitResult:
    """Minimizes the objective's loss, in place, and leaves the parameters of the best epoch.

    The best epoch has the highest figure ``objective.best_by`` on the validation split, and the least
    validation loss among those.

    Args:
        task: what to learn.
        tenant: what is trained.
        settings: of the training.
        generator: orders the batches.
        progress: told after each step.
        max_steps: ends the training, and its schedule of learning rates, earlier.
        stage: what ``progress`` is told.

    Raises:
        TrainingDivergedError: the loss became infinite or NaN before an epoch was done.
        TrainingMemoryError: not enough memory.
    """
    total = num_steps(task, settings) if max_steps is None else min(max_steps, num_steps(task, settings))
    optimizer = _Optimizer(tenant, settings, total)
    schedule = Schedule.of(settings, len(task.split.training))
    course = Course(task.objective.best_by)
    lengths = task.data.lengths()
    while optimizer.steps < total and not course.is_exhausted(schedule.patience):
        losses: list[float] = []
        batches = length_batches(task.split.training, lengths, schedule.batch_size, generator)
        try:
            for loss in _steps(task, tenant, optimizer, batches, settings):
                losses.append(loss)
                if progress is not None:
                    progress(stage, optimizer.steps, total, _shown(losses, course.history))
            with memory_advice(settings, "validation"):
                epoch = _validate(task, tenant, sum(losses) / len(losses))
        except TrainingDivergedError as error:
            if course.best_epoch < 0:
                raise
            return course.finished(tenant, f"{error}, in epoch {len(course.history) + 1}")
        course.add(epoch, tenant)
    return course.finished(tenant)


def _steps(
    task: TrainingTask,
    tenant: TrainableTenant,
    optimizer: _Optimizer,
    batches: Iterator[list[int]],
    settings: TrainingSettings,
) -> Iterator[float]:
    """Follows the gradient of each batch, as long as there are steps left; yields the losses."""
    for number, batch in enumerate(batches):
        if optimizer.steps == optimizer.total_steps:
            return
        with memory_advice(settings, f"step {optimizer.steps + 1}"), torch.enable_grad():
            outputs = tenant(task.states, task.data, batch)
            loss = optimizer.step(task.loss(outputs, batch))
        if loss is None:
            raise diverged(optimizer.steps + 1, number + 1, settings)
        yield loss


def _shown(losses: list[float], history: list[Epoch]) -> dict[str, float]:
    recent = losses[-10:]
    shown = {"loss": sum(recent) / len(recent)}
    return shown | history[-1].metrics if history else shown


class _Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up, linear decay to zero and clipped gradients."""

    def __init__(self, tenant: TrainableTenant, settings: TrainingSettings, total_steps: int) -> None:
        self.total_steps, self.steps = total_steps, 0
        self._parameters = list(tenant.parameters())
        groups = [
            {"params": [p for p in self._parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self._parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=settings.peak_learning_rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adamw, lambda step: learning_rate_factor(step, total_steps, settings.warmup_fraction)
        )

    def step(self, loss: Tensor) -> float | None:
        """Follows the gradient of ``loss``; returns its value, None if it or the gradient is not finite."""
        value = float(loss.detach())
        if not math.isfinite(value):
            return None
        self._adamw.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
        if not math.isfinite(float(norm)):
            return None
        self._adamw.step()
        self._schedule.step()
        self.steps += 1
        return value


def _validate(task: TrainingTask, tenant: TrainableTenant, training_loss: float) -> Epoch:
    numbers = task.split.validation
    outputs = tenant.predict(task.states, task.data, numbers)
    loss = float(task.objective.loss(outputs, task.data.batch_targets(numbers)))
    if not math.isfinite(loss):
        raise TrainingDivergedError(
            "the loss on the validation split became infinite or NaN; choose a lower learning rate"
        )
    metrics = task.objective.measure(outputs, task.data, numbers, resamples=0)
    return Epoch(training_loss=training_loss, validation_loss=loss, metrics=metrics.values)
