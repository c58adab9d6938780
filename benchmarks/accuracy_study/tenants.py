"""Tenants of the accuracy study: trained by the store, and scored on what an engine answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

from transformers import AutoTokenizer

from benchmarks.accuracy_study.pieces import cut_sentences, join_tags
from benchmarks.accuracy_study.records import LabelOutcomes, Outcome, TagOutcomes, Work
from benchmarks.accuracy_study.sets import ClassificationSet, StudySet, TaggingSet
from hmi_engine.construct.lesson import Teaching
from hmi_engine.construct.objectives.token_classification import sentence_text, tags_of_words
from hmi_engine.construct.training import TrainingSettings
from hmi_engine.engine import Engine
from hmi_engine.knowledge.examples import AnyExample, Example, TaggedExample, Task
from hmi_engine.request import Request, Response
from hmi_engine.store import Store

__all__ = ["train_and_serve"]

TENANT = "study"


def train_and_serve(
    store: Store,
    domain: str,
    labelled: StudySet,
    settings: TrainingSettings,
    teaching: Teaching | None = None,
) -> Outcome:
    """Trains a tenant on the training split, its epoch chosen on dev; an engine answers the test split.

    The engine's miss policy is ``settings.miss``, under which the tenant was trained.
    """
    started = time.process_time()
    task: _Task
    if isinstance(labelled, ClassificationSet):
        task = _Classification(store, labelled, settings.max_tokens)
    else:
        task = _Tagging(store, labelled, settings.max_tokens)
    report = store.train_tenant(
        TENANT,
        task.train,
        domain=domain,
        validation_examples=task.dev,
        settings=settings.model_copy(update={"task": task.name}),
        teacher=None if teaching is None else teaching.folder,
        unlabelled=() if teaching is None else teaching.texts,
        replace=True,
    ).report
    with Engine(store, miss=settings.miss, record_traffic=False) as engine:
        outcomes = task.outcomes(_answered(engine.run(task.requests())))
        plot = engine.stats().plot
    return Outcome(
        dev_by_epoch=tuple(epoch.metrics[report.best_by] for epoch in report.history),
        outcomes=outcomes,
        cpu_seconds=time.process_time() - started,
        work=_work(store, plot) if store.general.plot_layers and plot is not None else None,
    )


def _answered(responses: Iterable[Response]) -> list[Response]:
    """The responses; raises the error of the first that failed."""
    answered = []
    for response in responses:
        if response.error is not None:
            raise response.error
        answered.append(response)
    return answered


def _work(store: Store, plot: Mapping[str, int]) -> Work:
    general = store.general
    return Work(
        tokens=plot["tokens"],
        plot_layers=general.plot_layers,
        num_layers=general.num_layers,
        hit_rate=plot["window_hits"] / max(1, plot["windows"]),
        computed_tokens=plot["windows_computed"] * general.window,
    )


class _Task(Protocol):
    """What differs between sets with one label for each text, and sets with one tag for each word."""

    name: Task
    train: Sequence[AnyExample]
    dev: Sequence[AnyExample]

    def requests(self) -> list[Request]:
        """The test split."""

    def outcomes(self, responses: Sequence[Response]) -> LabelOutcomes | TagOutcomes:
        """What was answered to :meth:`requests`."""


class _Classification:
    name: Task = "classification"

    def __init__(self, store: Store, labelled: ClassificationSet, max_tokens: int) -> None:
        self._store, self._labelled, self._max_tokens = store, labelled, max_tokens
        self.train: Sequence[Example] = labelled.train
        self.dev: Sequence[Example] = labelled.dev

    def requests(self) -> list[Request]:
        """Token ids, cut as the training cuts them."""
        ids = self._store.encoder.token_ids([example.text for example in self._labelled.test], whole=True)
        limit = self._max_tokens
        cut = [text if len(text) <= limit else [*text[: limit - 1], text[-1]] for text in ids]
        return [Request(TENANT, input_ids=text) for text in cut]

    def outcomes(self, responses: Sequence[Response]) -> LabelOutcomes:
        numbers = {label: number for number, label in enumerate(self._labelled.labels)}
        return LabelOutcomes(answers=tuple(numbers[response.label or ""] for response in responses))


class _Tagging:
    name: Task = "token_classification"

    def __init__(self, store: Store, labelled: TaggingSet, max_tokens: int) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(store.general_folder)
        self._max_tokens, self._labelled = max_tokens, labelled
        self.train, self.dev = (
            [piece for sentence in self._cut(split) for piece in sentence]
            for split in (labelled.train, labelled.dev)
        )

    def _cut(self, split: Sequence[TaggedExample]) -> list[list[TaggedExample]]:
        return cut_sentences(split, self._tokenizer, self._max_tokens)

    @cached_property
    def _test(self) -> list[list[TaggedExample]]:
        return self._cut(self._labelled.test)

    def requests(self) -> list[Request]:
        """The texts of the pieces."""
        return [
            Request(TENANT, text=sentence_text(piece.words)) for sentence in self._test for piece in sentence
        ]

    def outcomes(self, responses: Sequence[Response]) -> TagOutcomes:
        pieces = [piece for sentence in self._test for piece in sentence]
        tags = [
            tags_of_words(piece.words, response.tags)
            for piece, response in zip(pieces, responses, strict=True)
        ]
        truth = [list(sentence.tags) for sentence in self._labelled.test]
        return TagOutcomes.of(truth, join_tags(self._test, tags))
