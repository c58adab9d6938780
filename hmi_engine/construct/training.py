"""Trains a tenant: an adapter and a head on labelled examples, the base frozen."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hmi_engine.construct.bootstrap import RESAMPLES
from hmi_engine.construct.hidden_dropout import HiddenDropout
from hmi_engine.construct.lesson import Taught, Teaching, take_lesson
from hmi_engine.construct.objectives import OBJECTIVES, Objective
from hmi_engine.construct.trainable_adapter import TrainableAdapter
from hmi_engine.construct.trainable_tenant import TrainableTenant
from hmi_engine.construct.training_cache import HiddenStateCache, cache_hidden_states
from hmi_engine.construct.training_data import Split, TaskData
from hmi_engine.construct.training_loop import FitResult, TrainingTask, fit
from hmi_engine.construct.training_memory import memory_advice
from hmi_engine.construct.training_metrics import Metrics, check_metric_libraries
from hmi_engine.construct.training_schedule import with_schedule
from hmi_engine.construct.training_search import SearchSpace, search
from hmi_engine.construct.training_settings import (
    Epoch,
    SearchReport,
    TeacherReport,
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
    "PreparedTraining",
    "SearchSpace",
    "TrainedTenant",
    "TrainingBase",
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
    search_space: SearchSpace | None = None,
    teaching: Teaching | None = None,
    progress: TrainingProgress | None = None,
) -> TrainedTenant:
    """Trains an adapter and a head for one domain, under the miss policy that will serve it.

    Hidden states below the lowest trained parameter are computed once and kept in memory: 4 H or 8 H bytes
    for each token. Texts that are documents of the domain's corpus are looked up as if their own fold were
    not in it (:mod:`hmi_engine.construct.crossfit`). AdamW with linear warm-up and decay; the state of the
    best epoch on the validation split is kept. The same seed and number of threads give the same tenant, bit
    for bit.

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
        search_space: learning rates and ranks to choose from before the training; None to take those of
            ``settings``.
        teaching: a model to learn from, maybe with texts that have no label; None for none.
        progress: told about each stage.

    Raises:
        TrainingDataError: examples that are missing, malformed or of another task, fewer than two labels, no
            label with a second example, or a validation or test label that is not in the examples.
        InvalidAdapterError: ``settings`` do not fit the base model.
        UnsupportedModelError: the teacher cannot be loaded, has other labels, or fails.
        TrainingDivergedError: the loss became infinite or NaN in the first epoch.
        TrainingMemoryError: not enough memory.
        MissingDependencyError: the ``train`` extra is not installed.
        UnknownDomainError: no such domain.
        ValueError: ``plots`` is missing.
    """
    base = TrainingBase(general, model, encoder, plots, domain, progress)
    prepared = base.prepare(examples, validation_examples, test_examples, settings, teaching)
    if search_space is not None:
        prepared = prepared.searched(search_space)
    result = fit(prepared.task, prepared.tenant, prepared.settings, prepared.generator, progress)
    return prepared.finish(result)


@dataclass(frozen=True)
class TrainingBase:
    """What tenants of one domain are trained on; the attributes are :func:`train_tenant`'s arguments."""

    general: GeneralInfo
    model: HierarchicalBert
    encoder: TextEncoder
    plots: PlotLibrary | None
    domain: str
    progress: TrainingProgress | None

    def prepare(
        self,
        examples: Sequence[AnyExample],
        validation_examples: Sequence[AnyExample],
        test_examples: Sequence[AnyExample],
        settings: TrainingSettings,
        teaching: Teaching | None = None,
    ) -> PreparedTraining:
        """All that comes before the first step; raises as :func:`train_tenant`."""
        general = self.general
        if self.plots is None and general.plot_layers:
            raise ValueError(f"plots is None, but layers 0 to {general.plot_layers - 1} are looked up")
        check_metric_libraries()
        started = time.perf_counter()
        objective = OBJECTIVES[settings.task].learn(examples, settings, validation_examples)
        objective.check_held_out(validation_examples, "the validation set")
        objective.check_held_out(test_examples, "the test set")
        session = _Session(self, settings, objective)
        data = session.encode([*examples, *validation_examples])
        test_data = session.encode(test_examples) if test_examples else None
        generator = torch.Generator().manual_seed(settings.seed)
        split = session.split(data, len(examples), generator)
        num_unlabelled = 0 if teaching is None else len(teaching.texts)
        settings = with_schedule(settings, len(split.training) + num_unlabelled)
        session = dataclasses.replace(session, settings=settings)
        tenant = session.new_tenant(settings, generator)
        taught = session.taught(teaching, data, split, test_data)
        states = session.cache(taught.data, tenant)
        task = TrainingTask(states, taught.data, taught.split, objective, taught.lesson)
        return PreparedTraining(session, task, tenant, generator, test_data, started, taught.report)


@dataclass(frozen=True)
class PreparedTraining:
    """A tenant whose data are read and whose parameters are new.

    Attributes:
        session: what it is trained on, and how.
        task: what it is to learn.
        tenant: its parameters.
        generator: orders the batches; has drawn the split and the parameters.
        test_data: what it is to be tested on.
        started: when that began, by ``time.perf_counter``.
        teacher: whom it is to learn from; None for labels alone.
        trials: of the search that chose the settings, if there was one.
    """

    session: _Session
    task: TrainingTask
    tenant: TrainableTenant
    generator: torch.Generator
    test_data: TaskData | None
    started: float
    teacher: TeacherReport | None = None
    trials: SearchReport | None = None

    @property
    def settings(self) -> TrainingSettings:
        """As they were given, or as a search found them, with nothing of the schedule left open."""
        return self.session.settings

    def searched(self, space: SearchSpace) -> PreparedTraining:
        """The same with the settings that a search finds best."""
        session = self.session
        settings, trials = search(
            self.task, session.new_tenant, session.settings, space, session.base.progress
        )
        return dataclasses.replace(
            self,
            session=dataclasses.replace(session, settings=settings),
            tenant=session.new_tenant(settings, self.generator),
            trials=trials,
        )

    def finish(self, result: FitResult) -> TrainedTenant:
        """Judges the tenant, which was fitted, and makes copies to store and serve.

        Raises:
            InvalidAdapterError, InvalidHeadError: the parameters are not finite.
        """
        session, task, tenant, test_data = self.session, self.task, self.tenant, self.test_data
        trained = tenant.adapter.to_adapter(), task.objective.to_head(tenant.head)
        for part in trained:
            part.validate(session.base.general)
        test, test_rates = None, None
        if test_data is not None:
            test_states = session.cache(test_data, tenant)
            test = session.score(tenant, test_states, test_data, range(len(test_data)))
            test_rates = test_states.rates
        report = TrainingReport(
            labels=task.objective.labels,
            best_by=task.objective.best_by,
            num_training=len(task.split.training) - (self.teacher.num_unlabelled if self.teacher else 0),
            num_cut=task.data.encoded.num_cut,
            unvalidated_labels=task.objective.unjudged_labels(task.data, task.split.validation),
            validation=session.score(tenant, task.states, task.data, task.split.validation),
            test=test,
            test_num_cut=0 if test_data is None else test_data.encoded.num_cut,
            history=result.history,
            best_epoch=result.best_epoch,
            divergence=result.divergence,
            num_parameters=sum(parameter.numel() for parameter in tenant.parameters()),
            seconds=time.perf_counter() - self.started,
            hit_rates=task.states.rates,
            test_hit_rates=test_rates,
            data_sha256=task.data.sha256,
            test_sha256=None if test_data is None else test_data.sha256,
            settings=session.settings,
            search=self.trials,
            teacher=self.teacher,
        )
        return TrainedTenant(*trained, report)


@dataclass(frozen=True)
class _Session:
    """What stays the same in one tenant's training."""

    base: TrainingBase
    settings: TrainingSettings
    objective: Objective

    def encode(self, examples: Sequence[AnyExample]) -> TaskData:
        return self.objective.encode(examples, self.base.encoder, self.settings.max_tokens)

    def split(self, data: TaskData, num_examples: int, generator: torch.Generator) -> Split:
        """The examples after the first ``num_examples`` are held out, or where there are none, a share."""
        if num_examples < len(data):
            return Split(tuple(range(num_examples)), tuple(range(num_examples, len(data))))
        return self.objective.split(data, self.settings.validation_fraction, generator)

    def taught(
        self, teaching: Teaching | None, data: TaskData, split: Split, test_data: TaskData | None
    ) -> Taught:
        """What is to be learned, with the texts and the answers of a teacher if there is one."""
        if teaching is None:
            return Taught(data, split)
        base = self.base
        return take_lesson(
            teaching,
            self.objective,
            data,
            split,
            test_data,
            encoder=base.encoder,
            settings=self.settings,
            progress=base.progress,
        )

    def new_tenant(self, settings: TrainingSettings, generator: torch.Generator) -> TrainableTenant:
        general = self.base.general
        adapter = TrainableAdapter(
            general,
            kind=settings.block_kind,
            rank=settings.rank,
            layers=general.upper_layers if settings.layers is None else settings.layers,
            sites=settings.block_sites,
            activation=settings.activation,
            lora_scale=settings.block_scale,
            generator=generator,
        )
        dropout = HiddenDropout(settings.dropout, settings.seed)
        return TrainableTenant(self.base.model, adapter, self.objective, generator, dropout)

    def cache(self, data: TaskData, tenant: TrainableTenant) -> HiddenStateCache:
        base = self.base
        with memory_advice(self.settings, "caching hidden states"):
            states = cache_hidden_states(
                base.model,
                base.plots,
                base.domain,
                data.encoded,
                first_layer=tenant.adapter.first_layer,
                window=base.general.window,
                miss=self.settings.miss,
                folds=self.settings.folds,
                progress=base.progress,
            )
            return states.advanced(tenant.layers)

    def score(
        self, tenant: TrainableTenant, states: HiddenStateCache, data: TaskData, numbers: Sequence[int]
    ) -> Metrics:
        outputs = tenant.predict(states, data, numbers)
        return self.objective.measure(outputs, data, numbers, resamples=RESAMPLES, seed=self.settings.seed)
