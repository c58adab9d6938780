"""Trains many tenants of one domain together: see docs/joint_training.md.

What they share, the frozen layers, is computed for all of them at once; what is their own (data, head,
optimizer state, early stopping, failure) stays their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from hmi_engine.construct.joint_loop import fit_together
from hmi_engine.construct.lesson import Teaching
from hmi_engine.construct.training import PreparedTraining, TrainedTenant, TrainingBase
from hmi_engine.construct.training_memory import memory_advice
from hmi_engine.construct.training_metrics import check_metric_libraries
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import HmiError
from hmi_engine.knowledge.examples import AnyExample

__all__ = ["TOGETHER", "TenantExamples", "TrainingOutcome", "train_tenants"]

TOGETHER = 32
"""Tenants in memory at a time, with their cached hidden states."""


@dataclass(frozen=True, eq=False)
class TenantExamples:
    """What one tenant is to learn.

    Attributes:
        name: the tenant's name.
        examples: of the type that ``settings.task`` takes.
        validation_examples: those that choose the best epoch; without any, a share of ``examples`` does.
        test_examples: those that choose nothing and are only scored at the end.
        settings: of its training.
        teacher: folder of a fine-tuned model to learn from; see ``Store.train_tenant``.
        unlabelled: texts of which it alone says something.
    """

    name: str
    examples: Sequence[AnyExample]
    validation_examples: Sequence[AnyExample] = ()
    test_examples: Sequence[AnyExample] = ()
    settings: TrainingSettings = field(default_factory=TrainingSettings)
    teacher: str | Path | None = None
    unlabelled: Sequence[str] = ()


TrainingOutcome: TypeAlias = TrainedTenant | HmiError
"""The trained tenant, or why it could not be trained."""


def train_tenants(
    base: TrainingBase, tenants: Sequence[TenantExamples], *, together: int = TOGETHER
) -> Iterator[tuple[TenantExamples, TrainingOutcome]]:
    """Trains tenants, each to what ``train_tenant`` would make of it alone, but for rounding.

    With ``dropout`` other elements are drawn than alone. Tenants whose adapters have one form (places and
    ranks), whose heads read alike and that have the same dropout are trained in one batch; others in batches
    of their own. What is wrong with one tenant's data, settings or training ends that training alone.

    Args:
        base: what they are trained on.
        tenants: drawn upon in their order.
        together: how many at a time, whose cached hidden states are in memory together.

    Yields: each tenant with its outcome, as soon as those that are trained with it are done.

    Raises:
        MissingDependencyError: the ``train`` extra is not installed.
        TrainingMemoryError: not enough memory for the tenants of a batch.
        ValueError: ``together`` is below 1, or ``base`` lacks tables that the base model needs.
    """
    if together < 1:
        raise ValueError(f"together must be at least 1, not {together}")
    check_metric_libraries()
    for first in range(0, len(tenants), together):
        company = tenants[first : first + together]
        prepared: dict[str, PreparedTraining] = {}
        for tenant in company:
            try:
                prepared[tenant.name] = base.prepare(
                    tenant.examples,
                    tenant.validation_examples,
                    tenant.test_examples,
                    tenant.settings,
                    Teaching.of(tenant.teacher, tenant.unlabelled),
                )
            except HmiError as error:
                yield tenant, error
        outcomes = _train(base, prepared)
        for tenant in company:
            if tenant.name in outcomes:
                yield tenant, outcomes[tenant.name]


def _train(base: TrainingBase, prepared: dict[str, PreparedTraining]) -> dict[str, TrainingOutcome]:
    outcomes: dict[str, TrainingOutcome] = {}
    for names in _alike(prepared):
        trainings = [prepared[name] for name in names]
        with memory_advice(trainings[0].settings, f"the joint training of {len(names)} tenants"):
            results = fit_together(trainings, base.model, base.progress)
        for name, training, result in zip(names, trainings, results, strict=True):
            try:
                outcomes[name] = result if isinstance(result, HmiError) else training.finish(result)
            except HmiError as error:
                outcomes[name] = error
    return outcomes


def _alike(prepared: dict[str, PreparedTraining]) -> list[list[str]]:
    """Names of the tenants that can be trained in one batch."""
    groups: dict[object, list[str]] = {}
    for name, training in prepared.items():
        shapes = {key: value.shape for key, value in training.tenant.adapter.named_parameters()}
        heads = [key for key, _ in training.tenant.head.named_parameters()]
        reading, halfway = training.task.objective.reading, training.task.states.halfway
        form = tuple(shapes.items()), tuple(heads), reading, halfway, training.settings.dropout
        groups.setdefault(form, []).append(name)
    return list(groups.values())
