"""Carries out single runs of the accuracy study."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.accuracy_study.fine_tuning import FineTuning, fine_tune
from benchmarks.accuracy_study.methods import FullFineTuning, Hierarchical, WholeBase
from benchmarks.accuracy_study.plan import (
    BATCH_SIZE,
    MAX_TOKENS,
    Run,
    base_identity,
    num_epochs,
    taught_epochs,
)
from benchmarks.accuracy_study.records import Outcome, RunRecord
from benchmarks.accuracy_study.stores import StudyStores, unlabelled_texts
from benchmarks.accuracy_study.tenants import train_and_serve
from hmi_engine.construct.lesson import Teaching
from hmi_engine.construct.training import TrainingSettings
from hmi_engine.demo.environment import installed_versions
from hmi_engine.knowledge.catalog import ROOT_DOMAIN

__all__ = ["Execution"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """What runs share.

    Attributes:
        base: folder of the base model.
        stores: where tenants are trained and served.
        max_epochs: limit for a quick proof that everything runs; None for as many as planned.
    """

    base: Path
    stores: StudyStores
    max_epochs: int | None = None

    def carry_out(self, run: Run, distilled: Path | None, *, teacher_rate: float | None = None) -> RunRecord:
        """Trains and scores; ``distilled`` is the folder of the distilled base if the run needs one.

        ``teacher_rate`` is the learning rate by which its teacher is fine-tuned if it needs one.
        """
        base = distilled or self.base
        if isinstance(run.method, FullFineTuning) or (
            isinstance(run.method, WholeBase) and run.method.library == "peft"
        ):
            settings, outcome = self._fine_tune(run)
        else:
            settings, outcome = self._train_tenant(run, run.method, base, teacher_rate)
        return RunRecord(
            set_name=run.labelled.name,
            method=run.method.slug,
            seed=run.seed,
            dev=max(outcome.dev_by_epoch),
            dev_by_epoch=outcome.dev_by_epoch,
            outcomes=outcome.outcomes,
            work=outcome.work,
            cpu_seconds=outcome.cpu_seconds,
            base=None if distilled is None else base_identity(distilled),
            settings=settings,
            versions=installed_versions().packages,
        )

    def _limited(self, planned: int) -> int:
        return planned if self.max_epochs is None else min(planned, self.max_epochs)

    def _fine_tune(self, run: Run) -> tuple[dict[str, object], Outcome]:
        recipe = self._full_fine_tuning(run, run.learning_rate)
        if isinstance(run.method, FullFineTuning) and run.method.is_baseline:
            outcome = self.stores.fine_tuned(self.base, run.labelled, recipe, run.seed)
        else:
            recipe = dataclasses.replace(
                recipe,
                lora_rank=run.method.rank if isinstance(run.method, WholeBase) else None,
                frozen_layers=run.method.frozen_layers if isinstance(run.method, FullFineTuning) else 0,
            )
            outcome = fine_tune(self.base, run.labelled, recipe, run.seed)
        return dataclasses.asdict(recipe), outcome

    def _full_fine_tuning(self, run: Run, learning_rate: float) -> FineTuning:
        return FineTuning(
            learning_rate=learning_rate,
            epochs=self._limited(num_epochs(run.labelled, run.method)),
            batch_size=BATCH_SIZE,
            max_tokens=MAX_TOKENS,
        )

    def _teaching(self, run: Run, learning_rate: float) -> Teaching:
        recipe = self._full_fine_tuning(run, learning_rate)
        folder = self.stores.teacher(self.base, run.labelled, recipe, run.seed)
        return Teaching(folder, unlabelled_texts(run.labelled, self.stores.sets))

    def _train_tenant(
        self, run: Run, method: WholeBase | Hierarchical, base: Path, teacher_rate: float | None
    ) -> tuple[dict[str, object], Outcome]:
        teaching = None
        epochs = self._limited(num_epochs(run.labelled, run.method))
        if isinstance(method, Hierarchical) and method.teacher:
            assert teacher_rate is not None
            teaching = self._teaching(run, teacher_rate)
            epochs = self._limited(taught_epochs(run.labelled, len(teaching.texts)))
        settings = TrainingSettings(
            kind=method.kind,
            rank=method.rank,
            learning_rate=run.learning_rate,
            batch_size=BATCH_SIZE,
            max_epochs=epochs,
            patience=epochs,
            max_tokens=MAX_TOKENS,
            seed=run.seed,
        )
        sites = "all-linear" if method.all_linear else None
        changes: dict[str, object] = {"layers": method.layers, "sites": sites, "dropout": method.dropout}
        if isinstance(method, WholeBase):
            store = self.stores.store(base, plot_layers=0)
            domain = ROOT_DOMAIN
        else:
            store = self.stores.store(base, plot_layers=method.plot_layers, window=method.window)
            domain = self.stores.domain(store, method, run.labelled)
            changes["miss"] = method.miss
        settings = settings.model_copy(update=changes)
        outcome = train_and_serve(store, domain, run.labelled, settings, teaching)
        return settings.model_dump(mode="json", exclude_none=True), outcome
