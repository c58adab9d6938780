"""Which learning rate and rank: successive halving over a small grid, with a fixed budget of steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from pydantic import BaseModel, ConfigDict, Field

from hmi_engine.construct.trainable_tenant import TrainableTenant
from hmi_engine.construct.training_loop import TrainingTask, fit, num_steps
from hmi_engine.construct.training_settings import (
    SearchReport,
    TrainingProgress,
    TrainingSettings,
    Trial,
)
from hmi_engine.errors import TrainingDivergedError
from hmi_engine.knowledge.adapters import KINDS

__all__ = ["SearchSpace", "search"]

SEARCH_STAGE = "searching"
_RATES_AROUND_DEFAULT = (0.3, 1.0, 3.0)
_DEFAULT_TRAININGS = 2


class SearchSpace(BaseModel):
    """What to choose from.

    Attributes:
        learning_rates: peaks of the schedule; None for 0.3, 1 and 3 times the one that was set.
        ranks: widths of the blocks; ignored by kinds that have none.
        budget_steps: steps of all trials together; None for twice as many as one training has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rates: tuple[float, ...] | None = Field(default=None, min_length=1)
    ranks: tuple[int, ...] = Field(default=(8, 16, 32), min_length=1)
    budget_steps: int | None = Field(default=None, ge=1)

    def candidates(self, settings: TrainingSettings) -> list[TrainingSettings]:
        """Every combination, in ``settings`` that are otherwise as they were.

        Raises:
            ValidationError: a learning rate or rank that no training can have.
        """
        peak = settings.peak_learning_rate
        rates = self.learning_rates or tuple(factor * peak for factor in _RATES_AROUND_DEFAULT)
        ranks = self.ranks if KINDS[settings.block_kind].has_rank else (settings.rank,)
        return [
            TrainingSettings.model_validate(settings.model_dump() | {"learning_rate": rate, "rank": rank})
            for rate, rank in product(rates, ranks)
        ]


def search(
    task: TrainingTask,
    new_tenant: Callable[[TrainingSettings, torch.Generator], TrainableTenant],
    settings: TrainingSettings,
    space: SearchSpace,
    progress: TrainingProgress | None = None,
) -> tuple[TrainingSettings, SearchReport]:
    """Tries every candidate with few steps, the better half with twice as many, and so on.

    The method is successive halving (Jamieson and Talwalkar 2016).
    Each trial starts anew, with the same seed and a schedule of its own, so that its learning rate has come
    down to zero when it is judged on the validation split.

    Returns:
        The settings with the best candidate's learning rate and rank, and the table of trials.

    Raises:
        TrainingDivergedError: the loss of every candidate became infinite or NaN.
    """
    candidates = space.candidates(settings)
    budget = space.budget_steps or _DEFAULT_TRAININGS * num_steps(task, settings)
    num_rounds = _num_rounds(len(candidates))
    num_trials = sum(math.ceil(len(candidates) / 2**number) for number in range(num_rounds))
    trials: list[Trial] = []
    for number in range(num_rounds):
        steps = max(1, budget // (num_rounds * len(candidates)))
        judged = []
        for candidate in candidates:
            trials.append(_try(task, new_tenant, candidate, number + 1, steps))
            judged.append((trials[-1], candidate))
            if progress is not None:
                progress(SEARCH_STAGE, len(trials), num_trials, {})
        judged.sort(key=lambda pair: _rank(pair[0]), reverse=True)
        candidates = [candidate for _, candidate in judged[: math.ceil(len(judged) / 2)]]
    if all(trial.value is None for trial in trials):
        raise TrainingDivergedError(
            "the loss of every candidate of the search became infinite or NaN; search lower learning rates"
        )
    best_by = task.objective.best_by
    return candidates[0], SearchReport(best_by=best_by, budget_steps=budget, trials=tuple(trials))


def _num_rounds(num_candidates: int) -> int:
    return max(1, math.ceil(math.log2(num_candidates)))


def _rank(trial: Trial) -> tuple[float, float]:
    if trial.value is None or trial.validation_loss is None:
        return -math.inf, -math.inf
    return trial.value, -trial.validation_loss


def _try(
    task: TrainingTask,
    new_tenant: Callable[[TrainingSettings, torch.Generator], TrainableTenant],
    candidate: TrainingSettings,
    number: int,
    steps: int,
) -> Trial:
    generator = torch.Generator().manual_seed(candidate.seed)
    trial = Trial(round=number, learning_rate=candidate.peak_learning_rate, rank=candidate.rank, steps=steps)
    try:
        result = fit(task, new_tenant(candidate, generator), candidate, generator, max_steps=steps)
    except TrainingDivergedError:
        return trial
    best = result.history[result.best_epoch]
    return trial.model_copy(
        update={
            "value": best.metrics[task.objective.best_by],
            "validation_loss": best.validation_loss,
        }
    )
