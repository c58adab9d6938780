"""Carries out single runs of the accuracy study."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.accuracy_full import FineTuning, fine_tune
from benchmarks.accuracy_methods import FullFineTuning
from benchmarks.accuracy_plan import BATCH_SIZE, MAX_TOKENS, Run, num_epochs
from benchmarks.accuracy_records import RunRecord
from hmi_engine.demo.environment import installed_versions

__all__ = ["Execution"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """What runs share.

    Attributes:
        base: folder of the base model.
        max_epochs: fewer epochs than planned, for a quick proof that everything runs; None for the plan's.
    """

    base: Path
    max_epochs: int | None = None

    def carry_out(self, run: Run) -> RunRecord:
        """Trains and scores."""
        recipe = FineTuning(
            learning_rate=run.learning_rate,
            epochs=min(num_epochs(run.labelled), self.max_epochs or 10**9),
            batch_size=BATCH_SIZE,
            max_tokens=MAX_TOKENS,
        )
        if not isinstance(run.method, FullFineTuning):
            raise NotImplementedError(run.method.title)
        outcome = fine_tune(self.base, run.labelled, recipe, run.seed)
        return RunRecord(
            set_name=run.labelled.name,
            method=run.method.slug,
            seed=run.seed,
            dev=max(outcome.dev_by_epoch),
            dev_by_epoch=outcome.dev_by_epoch,
            outcomes=outcome.outcomes,
            work=outcome.work,
            cpu_seconds=outcome.cpu_seconds,
            settings=dataclasses.asdict(recipe),
            versions=installed_versions().packages,
        )
