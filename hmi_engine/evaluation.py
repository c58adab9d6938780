"""How well a tenant does on labelled examples, asked through the engine that serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from hmi_engine.construct.bootstrap import MAX_SEED, RESAMPLES
from hmi_engine.construct.objectives.embedding import check_of_one_kind, cosines, retrieval_ranks
from hmi_engine.construct.objectives.multi_label import APPLIES
from hmi_engine.construct.objectives.objective import checked_number, checked_types, where
from hmi_engine.construct.objectives.token_classification import OUTSIDE, sentence_text, tags_of_words
from hmi_engine.construct.training_metrics import (
    Metrics,
    check_metric_libraries,
    measure_classes,
    measure_label_sets,
    measure_numbers,
    measure_retrieval,
    measure_similarity,
    measure_tags,
)
from hmi_engine.engine import Engine
from hmi_engine.errors import InvalidHeadError, InvalidRequestError, TrainingDataError
from hmi_engine.knowledge.examples import (
    AnyExample,
    Example,
    MultiLabelExample,
    PairExample,
    RegressionExample,
    ScoredPairExample,
    TaggedExample,
    Task,
)
from hmi_engine.knowledge.heads import ClassificationHead, GenerationHead, Head
from hmi_engine.request import Request, Response

__all__ = ["Evaluation", "evaluate_tenant", "task_of"]

TEXTS_PER_CALL = 512

EvaluationProgress = Callable[[str, int, int, dict[str, float]], None]


class Evaluation(BaseModel):
    """What an evaluation found.

    Attributes:
        tenant: the tenant's name.
        task: what its head does.
        miss: the engine's policy.
        num_cut: texts with more tokens than the model has positions.
        metrics: figures with intervals.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: str
    task: Task
    miss: str
    num_cut: int
    metrics: Metrics


def task_of(head: Head) -> Task:
    """The task whose examples judge a head."""
    if isinstance(head, ClassificationHead) and head.multi_label:
        return "multi_label"
    if isinstance(head, GenerationHead):
        raise InvalidHeadError("texts of a generation head are not judged by examples")
    return head.kind


def evaluate_tenant(
    engine: Engine,
    tenant: str,
    examples: Sequence[AnyExample],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: EvaluationProgress | None = None,
) -> Evaluation:
    """Asks a tenant, trained here or elsewhere, about every example, and compares its answers.

    Args:
        engine: serves the tenant.
        tenant: its name.
        examples: of the type that its head's task takes (:func:`task_of`).
        resamples: of the bootstrap.
        seed: of the bootstrap, from 0 to 2**63 - 1.
        progress: told about the texts that are answered.

    Raises:
        InvalidRequestError: ``seed`` is none for a generator.
        UnknownTenantError: no such tenant.
        TrainingDataError: no examples, some of another task, or a label that the head does not have.
        MissingDependencyError: the ``train`` extra is not installed.
        HmiError: what a response holds instead of an answer.
    """
    if not 0 <= seed <= MAX_SEED:
        raise InvalidRequestError(f"the seed must be from 0 to {MAX_SEED}, found {seed}")
    check_metric_libraries()
    _, head = engine.store.load_tenant(tenant)
    asked = _Asked(engine, tenant, head, progress)
    judge = _JUDGES[task_of(head)]
    metrics = judge(asked, examples, resamples, seed)
    return Evaluation(
        tenant=tenant,
        task=task_of(head),
        miss=engine.options.miss,
        num_cut=asked.num_cut,
        metrics=metrics,
    )


@dataclass
class _Asked:
    """A tenant and how it is asked."""

    engine: Engine
    tenant: str
    head: Head
    progress: EvaluationProgress | None
    num_cut: int = 0

    def answers(self, texts: Sequence[str]) -> list[Response]:
        """Responses in the order of the texts; raises the first error that one holds."""
        responses: list[Response] = []
        for first in range(0, len(texts), TEXTS_PER_CALL):
            requests = [Request(self.tenant, text=text) for text in texts[first : first + TEXTS_PER_CALL]]
            responses += self.engine.run(requests)
            if self.progress is not None:
                self.progress("evaluating", len(responses), len(texts), {})
        for response in responses:
            if response.error is not None:
                raise response.error
        self.num_cut = sum(response.usage.truncated for response in responses)
        return responses

    def check_labels(self, example: AnyExample, number: int, labels: Iterable[str]) -> None:
        """Raises :class:`TrainingDataError` where the head lacks one of the labels."""
        for label in labels:
            if label not in self.head.labels:
                raise TrainingDataError(
                    f"{where(example, number)}: tenant {self.tenant!r} has no label {label!r:.80}; it has "
                    f"{', '.join(self.head.labels)!s:.200}"
                )


def _judge_classes(asked: _Asked, examples: Sequence[AnyExample], resamples: int, seed: int) -> Metrics:
    checked = checked_types(examples, (Example,), "classification")
    for number, example in enumerate(checked):
        asked.check_labels(example, number, [example.label])
    answers = asked.answers([example.text for example in checked])
    numbers = {label: number for number, label in enumerate(asked.head.labels)}
    truth = [numbers[example.label] for example in checked]
    predictions = [numbers[answer.label or ""] for answer in answers]
    return measure_classes(truth, predictions, resamples=resamples, seed=seed)


def _judge_label_sets(asked: _Asked, examples: Sequence[AnyExample], resamples: int, seed: int) -> Metrics:
    checked = checked_types(examples, (MultiLabelExample,), "multi_label")
    for number, example in enumerate(checked):
        asked.check_labels(example, number, example.labels)
    answers = asked.answers([example.text for example in checked])
    labels = asked.head.labels
    truth = np.array([[label in example.labels for label in labels] for example in checked])
    predictions = np.array([[answer.scores[label] > APPLIES for label in labels] for answer in answers])
    return measure_label_sets(truth, predictions, resamples=resamples, seed=seed)


def _judge_tags(asked: _Asked, examples: Sequence[AnyExample], resamples: int, seed: int) -> Metrics:
    checked = checked_types(examples, (TaggedExample,), "token_classification")
    for number, example in enumerate(checked):
        asked.check_labels(example, number, example.tags)
    answers = asked.answers([sentence_text(example.words) for example in checked])
    missing = OUTSIDE if OUTSIDE in asked.head.labels else asked.head.labels[0]
    predictions = [
        tags_of_words(example.words, answer.tags, missing)
        for example, answer in zip(checked, answers, strict=True)
    ]
    truth = [example.tags for example in checked]
    return measure_tags(truth, predictions, resamples=resamples, seed=seed)


def _judge_numbers(asked: _Asked, examples: Sequence[AnyExample], resamples: int, seed: int) -> Metrics:
    checked = checked_types(examples, (RegressionExample,), "regression")
    if len(asked.head.labels) != 1:
        raise TrainingDataError(
            f"tenant {asked.tenant!r} gives {len(asked.head.labels)} numbers for a text; those of one can be "
            "evaluated"
        )
    truth = np.array(
        [
            checked_number(example.value, "the value", example, number)
            for number, example in enumerate(checked)
        ]
    )
    answers = asked.answers([example.text for example in checked])
    predictions = np.array([answer.scores[asked.head.labels[0]] for answer in answers])
    return measure_numbers(truth, predictions, resamples=resamples, seed=seed)


def _judge_vectors(asked: _Asked, examples: Sequence[AnyExample], resamples: int, seed: int) -> Metrics:
    checked: list[PairExample | ScoredPairExample] = checked_types(
        examples, (PairExample, ScoredPairExample), "embedding"
    )
    check_of_one_kind(checked, "a set")
    scores = [
        checked_number(example.score, "the score", example, number)
        for number, example in enumerate(checked)
        if isinstance(example, ScoredPairExample)
    ]
    numbers: dict[str, int] = {}
    pairs = torch.tensor(
        [[numbers.setdefault(text, len(numbers)) for text in example[:2]] for example in checked]
    )
    vectors = torch.stack([torch.from_numpy(answer.embedding) for answer in asked.answers(list(numbers))])
    first, second = vectors[pairs[:, 0]], vectors[pairs[:, 1]]
    if scores:
        return measure_similarity(np.array(scores), cosines(first, second), resamples=resamples, seed=seed)
    ranks = retrieval_ranks(first, second, pairs[:, 0], pairs[:, 1])
    return measure_retrieval(ranks, resamples=resamples, seed=seed)


_JUDGES: dict[Task, Callable[[_Asked, Sequence[AnyExample], int, int], Metrics]] = {
    "classification": _judge_classes,
    "multi_label": _judge_label_sets,
    "token_classification": _judge_tags,
    "regression": _judge_numbers,
    "embedding": _judge_vectors,
}
