"""Trains a tenant: an adapter and a classification head on labelled texts, the base frozen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hmi_engine.construct.trainable_adapter import TrainableAdapter
from hmi_engine.construct.training_cache import HiddenStateCache, cache_hidden_states
from hmi_engine.construct.training_data import LabelledTexts, encode_examples, stratified_split
from hmi_engine.construct.training_loop import TrainableClassifier, TrainingTask, fit
from hmi_engine.construct.training_metrics import Metrics, evaluate
from hmi_engine.construct.training_settings import (
    Epoch,
    TrainingProgress,
    TrainingReport,
    TrainingSettings,
)
from hmi_engine.knowledge.adapters import Adapter
from hmi_engine.knowledge.corpus import Example
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import ClassificationHead
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
    "train_classifier",
]


@dataclass(frozen=True)
class TrainedTenant:
    """What :func:`train_classifier` made; adapter and head fit the store's base model."""

    adapter: Adapter
    head: ClassificationHead
    report: TrainingReport


def train_classifier(
    *,
    general: GeneralInfo,
    model: HierarchicalBert,
    encoder: TextEncoder,
    plots: PlotLibrary | None,
    domain: str,
    examples: Sequence[Example],
    test_examples: Sequence[Example] = (),
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
        examples: labelled texts.
        test_examples: labelled texts that choose nothing and are only scored at the end.
        settings: see :class:`TrainingSettings`.
        progress: told about each stage.

    Raises:
        TrainingDataError: no examples, fewer than two labels, a label with one example, or a test label that
            is not in the examples.
        InvalidAdapterError: ``settings`` do not fit the base model, or the training diverged (NaN).
        UnknownDomainError: no such domain.
        ValueError: ``plots`` is missing.
    """
    if plots is None and general.plot_layers:
        raise ValueError(f"plots is None, but layers 0 to {general.plot_layers - 1} are looked up")
    started = time.perf_counter()
    session = _Session(general, model, encoder, plots, domain, settings, progress)
    data = session.encode(examples)
    test_data = session.encode(test_examples, data.labels) if test_examples else None
    generator = torch.Generator().manual_seed(settings.seed)
    split = stratified_split(data, settings.validation_fraction, generator)
    classifier = session.new_classifier(len(data.labels), generator)
    states = session.cache(data, classifier)
    task = TrainingTask(states, torch.tensor(data.targets), split)
    result = fit(task, classifier, settings, generator, progress)
    trained = classifier.adapter.to_adapter(), classifier.to_head(data.labels)
    for part in trained:
        part.validate(general)
    test, test_rates = None, None
    if test_data is not None:
        test_states = session.cache(test_data, classifier)
        everything = range(len(test_data.texts))
        test = _score(classifier, test_states, test_data, everything, data.majority)
        test_rates = test_states.rates
    report = TrainingReport(
        labels=data.labels,
        num_training=len(split.training),
        validation=_score(classifier, states, data, split.validation, data.majority),
        test=test,
        history=result.history,
        best_epoch=result.best_epoch,
        num_parameters=sum(parameter.numel() for parameter in classifier.parameters()),
        seconds=time.perf_counter() - started,
        hit_rates=states.rates,
        test_hit_rates=test_rates,
        data_sha256=data.sha256(),
        settings=settings,
    )
    return TrainedTenant(*trained, report)


@dataclass(frozen=True)
class _Session:
    """What stays the same in one call of :func:`train_classifier`."""

    general: GeneralInfo
    model: HierarchicalBert
    encoder: TextEncoder
    plots: PlotLibrary | None
    domain: str
    settings: TrainingSettings
    progress: TrainingProgress | None

    def encode(self, examples: Sequence[Example], labels: tuple[str, ...] | None = None) -> LabelledTexts:
        return encode_examples(examples, self.encoder, self.settings.max_tokens, labels)

    def new_classifier(self, num_labels: int, generator: torch.Generator) -> TrainableClassifier:
        settings = self.settings
        adapter = TrainableAdapter(
            self.general,
            kind=settings.kind,
            rank=settings.rank,
            layers=self.general.upper_layers if settings.layers is None else settings.layers,
            sites=settings.sites,
            activation=settings.activation,
            lora_scale=settings.lora_scale,
            generator=generator,
        )
        return TrainableClassifier(self.model, adapter, num_labels, settings.pooling, generator)

    def cache(self, data: LabelledTexts, classifier: TrainableClassifier) -> HiddenStateCache:
        states = cache_hidden_states(
            self.model,
            self.plots,
            self.domain,
            data,
            first_layer=classifier.adapter.first_layer,
            window=self.general.window,
            miss=self.settings.miss,
            folds=self.settings.folds,
            progress=self.progress,
        )
        return states.advanced(classifier.layers)


def _score(
    classifier: TrainableClassifier,
    states: HiddenStateCache,
    data: LabelledTexts,
    numbers: Sequence[int],
    majority: int,
) -> Metrics:
    predictions = classifier.predict(states, numbers).argmax(dim=1).tolist()
    return evaluate([data.targets[number] for number in numbers], predictions, majority)
