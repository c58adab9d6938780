"""Trains a tenant: an adapter and a head on labelled examples, the base frozen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hmi_engine.construct.bootstrap import RESAMPLES
from hmi_engine.construct.objectives import OBJECTIVES, Objective
from hmi_engine.construct.trainable_adapter import TrainableAdapter
from hmi_engine.construct.trainable_tenant import TrainableTenant
from hmi_engine.construct.training_cache import HiddenStateCache, cache_hidden_states
from hmi_engine.construct.training_data import Split, TaskData
from hmi_engine.construct.training_loop import TrainingTask, fit
from hmi_engine.construct.training_memory import memory_advice
from hmi_engine.construct.training_metrics import Metrics, check_metric_libraries
from hmi_engine.construct.training_settings import (
    Epoch,
    TrainingProgress,
    TrainingReport,
    TrainingSettings,
)
from hmi_engine.knowledge.adapters import Adapter
from hmi_engine.knowledge.examples import AnyExample
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import Head
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.tokenization import TextEncoder

__all__ = [
    "Epoch",
    "Metrics",
    "TrainedTenant",
    "TrainingProgress",
    "TrainingReport",
    "TrainingSettings",
    "train_tenant",
]


@dataclass(frozen=True)
class TrainedTenant:
    """What :func:`train_tenant` made; adapter and head fit the store's base model."""

    adapter: Adapter
    head: Head
    report: TrainingReport


def train_tenant(
    *,
    general: GeneralInfo,
    model: HierarchicalBert,
    encoder: TextEncoder,
    plots: PlotLibrary | None,
    domain: str,
    examples: Sequence[AnyExample],
    validation_examples: Sequence[AnyExample] = (),
    test_examples: Sequence[AnyExample] = (),
    settings: TrainingSettings,
    progress: TrainingProgress | None = None,
) -> TrainedTenant:
    """Trains an adapter and a head for one domain, under the miss policy that will serve it.

    Hidden states below the lowest trained parameter are computed once and kept in memory: 4 H or 8 H bytes
    for each token. Texts that the domain's corpus holds are looked up as if their own fold were not in it
    (:mod:`hmi_engine.construct.crossfit`). AdamW with linear warm-up and decay; the state of the best epoch
    on the validation split is kept. The same seed and number of threads give the same tenant, bit for bit.

    Args:
        general: the base model.
        model: its weights, which are not changed.
        encoder: its tokenizer.
        plots: the store's tables; None only where ``general.plot_layers`` is 0.
        domain: the domain that will serve the tenant.
        examples: examples of the type that ``settings.task`` takes.
        validation_examples: those that choose the best epoch; without any, a share of ``examples`` does.
        test_examples: those that choose nothing and are only scored at the end.
        settings: see :class:`TrainingSettings`.
        progress: told about each stage.

    Raises:
        TrainingDataError: examples that are missing, malformed or of another task, fewer than two labels, a
            label with one example, or a validation or test label that is not in the examples.
        InvalidAdapterError: ``settings`` do not fit the base model.
        TrainingDivergedError: the loss became infinite or NaN in the first epoch.
        TrainingMemoryError: not enough memory.
        MissingDependencyError: the ``train`` extra is not installed.
        UnknownDomainError: no such domain.
        ValueError: ``plots`` is missing.
    """
    if plots is None and general.plot_layers:
        raise ValueError(f"plots is None, but layers 0 to {general.plot_layers - 1} are looked up")
    check_metric_libraries()
    started = time.perf_counter()
    objective = OBJECTIVES[settings.task].learn(examples, settings, validation_examples)
    session = _Session(general, model, encoder, plots, domain, settings, objective, progress)
    data = session.encode([*examples, *validation_examples])
    test_data = session.encode(test_examples) if test_examples else None
    generator = torch.Generator().manual_seed(settings.seed)
    split = session.split(data, len(examples), generator)
    tenant = session.new_tenant(generator)
    states = session.cache(data, tenant)
    task = TrainingTask(states, data, split, objective)
    result = fit(task, tenant, settings, generator, progress)
    trained = tenant.adapter.to_adapter(), objective.to_head(tenant.head)
    for part in trained:
        part.validate(general)
    test, test_rates = None, None
    if test_data is not None:
        test_states = session.cache(test_data, tenant)
        test = session.score(tenant, test_states, test_data, range(len(test_data)))
        test_rates = test_states.rates
    report = TrainingReport(
        labels=objective.labels,
        best_by=objective.best_by,
        num_training=len(split.training),
        num_cut=data.encoded.num_cut,
        validation=session.score(tenant, states, data, split.validation),
        test=test,
        test_num_cut=0 if test_data is None else test_data.encoded.num_cut,
        history=result.history,
        best_epoch=result.best_epoch,
        divergence=result.divergence,
        num_parameters=sum(parameter.numel() for parameter in tenant.parameters()),
        seconds=time.perf_counter() - started,
        hit_rates=states.rates,
        test_hit_rates=test_rates,
        data_sha256=data.sha256,
        test_sha256=None if test_data is None else test_data.sha256,
        settings=settings,
    )
    return TrainedTenant(*trained, report)


@dataclass(frozen=True)
class _Session:
    """What stays the same in one call of :func:`train_tenant`."""

    general: GeneralInfo
    model: HierarchicalBert
    encoder: TextEncoder
    plots: PlotLibrary | None
    domain: str
    settings: TrainingSettings
    objective: Objective
    progress: TrainingProgress | None

    def encode(self, examples: Sequence[AnyExample]) -> TaskData:
        return self.objective.encode(examples, self.encoder, self.settings.max_tokens)

    def split(self, data: TaskData, num_examples: int, generator: torch.Generator) -> Split:
        """The examples after the first ``num_examples`` are held out, or where there are none, a share."""
        if num_examples < len(data):
            return Split(tuple(range(num_examples)), tuple(range(num_examples, len(data))))
        return self.objective.split(data, self.settings.validation_fraction, generator)

    def new_tenant(self, generator: torch.Generator) -> TrainableTenant:
        settings = self.settings
        adapter = TrainableAdapter(
            self.general,
            kind=settings.block_kind,
            rank=settings.rank,
            layers=self.general.upper_layers if settings.layers is None else settings.layers,
            sites=settings.block_sites,
            activation=settings.activation,
            lora_scale=settings.block_scale,
            generator=generator,
        )
        return TrainableTenant(self.model, adapter, self.objective, generator)

    def cache(self, data: TaskData, tenant: TrainableTenant) -> HiddenStateCache:
        with memory_advice(self.settings, "caching hidden states"):
            states = cache_hidden_states(
                self.model,
                self.plots,
                self.domain,
                data.encoded,
                first_layer=tenant.adapter.first_layer,
                window=self.general.window,
                miss=self.settings.miss,
                folds=self.settings.folds,
                progress=self.progress,
            )
            return states.advanced(tenant.layers)

    def score(
        self, tenant: TrainableTenant, states: HiddenStateCache, data: TaskData, numbers: Sequence[int]
    ) -> Metrics:
        outputs = tenant.predict(states, data, numbers)
        return self.objective.measure(outputs, data, numbers, resamples=RESAMPLES, seed=self.settings.seed)
