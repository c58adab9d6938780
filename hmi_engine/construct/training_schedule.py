"""How many examples a step has, and how long a training goes on, where the settings leave that open."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from hmi_engine.construct.training_settings import TrainingSettings

__all__ = ["Schedule", "with_schedule"]

MIN_STEPS = 400
"""Steps that a training takes if it can; :mod:`benchmarks.few_examples` compares it with fewer."""

MIN_EPOCHS = 10
BATCH_SIZES = (32, 16, 8)
_EPOCHS_FOR_ONE_OF_PATIENCE = 5
_MIN_PATIENCE = 2


@dataclass(frozen=True)
class Schedule:
    """What ``TrainingSettings`` call these, none of them left open."""

    batch_size: int
    max_epochs: int
    patience: int

    @classmethod
    def of(cls, settings: TrainingSettings, num_training: int) -> Schedule:
        """As the settings say, and what they leave open by the number of examples to learn from.

        Few examples are learned from in small batches, and if these are still too few for
        :data:`MIN_STEPS`, in more epochs than :data:`MIN_EPOCHS`.
        """
        batch_size = settings.batch_size or _batch_size(settings, num_training)
        max_epochs = settings.max_epochs or max(
            MIN_EPOCHS, math.ceil(MIN_STEPS / _epoch_steps(num_training, batch_size))
        )
        patience = settings.patience or max(_MIN_PATIENCE, max_epochs // _EPOCHS_FOR_ONE_OF_PATIENCE)
        return cls(batch_size, max_epochs, patience)

    def num_steps(self, num_training: int) -> int:
        """Steps of a training that is not ended early."""
        return _epoch_steps(num_training, self.batch_size) * self.max_epochs


def with_schedule(settings: TrainingSettings, num_training: int) -> TrainingSettings:
    """The settings with nothing of the schedule left open."""
    return settings.model_copy(update=asdict(Schedule.of(settings, num_training)))


def _epoch_steps(num_training: int, batch_size: int) -> int:
    return -(-num_training // batch_size)


def _batch_size(settings: TrainingSettings, num_training: int) -> int:
    """The largest that takes enough steps, or else the smallest."""
    if settings.task == "embedding":  # the other pairs of a batch are its negatives
        return BATCH_SIZES[0]
    epochs = settings.max_epochs or MIN_EPOCHS
    enough = [size for size in BATCH_SIZES if epochs * _epoch_steps(num_training, size) >= MIN_STEPS]
    return enough[0] if enough else BATCH_SIZES[-1]
