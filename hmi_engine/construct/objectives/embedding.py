"""Vectors for texts: an anchor near its positive and far from all else in the batch.

The loss is the cross-entropy of choosing each anchor's positive among the batch's positives and negatives by
their cosine times 20 (InfoNCE, van den Oord et al. 2018; in sentence-transformers
``MultipleNegativesRankingLoss``). Candidates that are the same text as the own positive are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hmi_engine.construct.bootstrap import FloatArray, IndexArray
from hmi_engine.construct.objectives.objective import (
    Objective,
    Reading,
    check_text,
    checked_number,
    checked_types,
    digest_of,
)
from hmi_engine.construct.training_data import TaskData, encode_texts
from hmi_engine.construct.training_metrics import Metrics, measure_retrieval, measure_similarity
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.examples import AnyExample, PairExample, ScoredPairExample, Task
from hmi_engine.knowledge.heads import EmbeddingHead
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["EmbeddingObjective", "check_of_one_kind", "cosines", "retrieval_ranks"]

COSINE_SCALE = 20.0
ANCHORS_PER_CHUNK = 512


@dataclass(frozen=True, eq=False)
class EmbeddingObjective(Objective):
    """Sentence embeddings: no parameters but the adapter's.

    It learns from :class:`PairExample` and is judged on these, or on :class:`ScoredPairExample`.

    Attributes:
        reading: the mean over tokens, or the first.
        best_by: ``spearman`` where validation examples are scored, else ``retrieval_accuracy``.
        labels: none.
    """

    task: ClassVar[Task] = "embedding"
    reading: Reading
    best_by: str = "retrieval_accuracy"
    labels: tuple[str, ...] = ()

    @classmethod
    def learn(
        cls,
        examples: Sequence[AnyExample],
        settings: TrainingSettings,
        validation_examples: Sequence[AnyExample] = (),
    ) -> EmbeddingObjective:
        """See :meth:`Objective.learn`."""
        pairs = checked_types(examples, (PairExample,), "embedding")
        if len({pair.positive for pair in pairs}) < 2:
            raise TrainingDataError(
                "all pairs have the same positive, so no other text can be a negative; give at least two"
            )
        is_scored = any(isinstance(example, ScoredPairExample) for example in validation_examples)
        return cls(settings.pooling_or("mean"), "spearman" if is_scored else "retrieval_accuracy")

    def encode(self, examples: Sequence[AnyExample], encoder: TextEncoder, max_tokens: int) -> TaskData:
        """See :meth:`Objective.encode`.

        Every distinct text is encoded once. The targets of a pair are int64 [1, 3], the numbers of its texts,
        -1 without a negative; of a scored pair float64 [1, 1], the score.
        """
        checked = _checked(examples)
        numbers: dict[str, int] = {}
        readings = [
            tuple(numbers.setdefault(text, len(numbers)) for text in _texts(example)) for example in checked
        ]
        return TaskData(
            encoded=encode_texts(list(numbers), encoder, max_tokens),
            targets=[_target(example, texts) for example, texts in zip(checked, readings, strict=True)],
            readings=readings,
            sha256=digest_of([*_texts(example), _score(example)] for example in checked),
        )

    def check_held_out(self, examples: Sequence[AnyExample], name: str) -> None:
        """See :meth:`Objective.check_held_out`: pairs are judged otherwise than scored pairs."""
        check_of_one_kind(examples, name)

    def new_head(self, size: int, generator: torch.Generator) -> nn.Module:
        """What was read is the embedding; the cosine takes care of its length."""
        return nn.Identity()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of pairs the contrastive loss; of scored pairs, which nobody trains on, 1 - Pearson's correlation.

        ``outputs`` are the vectors of B anchors, then of their positives, then of the negatives there are;
        ``targets`` [B, 3], or of scored pairs [B, 1].
        """
        vectors = functional.normalize(outputs, dim=-1)
        size = len(targets)
        if targets.is_floating_point():
            found = (vectors[:size] * vectors[size:]).sum(-1).double()
            return 1 - torch.corrcoef(torch.stack([found, targets[:, 0]]))[0, 1].nan_to_num()
        anchors, positives = targets[:, 0], targets[:, 1]
        candidates = torch.cat([positives, targets[targets[:, 2] >= 0, 2]])
        own = torch.arange(size)
        losses = []
        for rows in own.split(ANCHORS_PER_CHUNK):
            scores = COSINE_SCALE * vectors[rows] @ vectors[size:].T
            same = (candidates == positives[rows, None]) | (candidates == anchors[rows, None])
            same[torch.arange(len(rows)), rows] = False
            losses.append(
                functional.cross_entropy(scores.masked_fill(same, -math.inf), rows, reduction="sum")
            )
        return torch.stack(losses).sum() / size

    def measure(
        self, outputs: Tensor, data: TaskData, numbers: Sequence[int], *, resamples: int, seed: int = 0
    ) -> Metrics:
        """Judges cosines of scored pairs by their ranks; of other pairs, where the own positive ranks.

        Raises:
            TrainingDataError: there are both.
        """
        is_scored = [data.targets[number].is_floating_point() for number in numbers]
        if any(is_scored) and not all(is_scored):
            raise TrainingDataError("a set is of pairs or of scored pairs, not of both; give one at a time")
        targets, size = data.batch_targets(numbers), len(numbers)
        if all(is_scored):
            truth = np.asarray(targets[:, 0].numpy(), dtype=np.float64)
            found = cosines(outputs[:size], outputs[size:])
            return measure_similarity(truth, found, resamples=resamples, seed=seed)
        ranks = retrieval_ranks(outputs[:size], outputs[size : 2 * size], targets[:, 0], targets[:, 1])
        return measure_retrieval(ranks, resamples=resamples, seed=seed)

    def to_head(self, head: nn.Module) -> EmbeddingHead:
        """See :meth:`Objective.to_head`."""
        assert self.reading != "words"
        return EmbeddingHead(pooling=self.reading, normalize=True)


def check_of_one_kind(examples: Sequence[AnyExample], name: str) -> None:
    """Raises :class:`TrainingDataError` where some examples are scored pairs and others are not."""
    num_scored = sum(isinstance(example, ScoredPairExample) for example in examples)
    if 0 < num_scored < len(examples):
        raise TrainingDataError(
            f"{name} is of pairs or of scored pairs, not of both; {num_scored} of {len(examples)} examples "
            "are scored: give one kind at a time"
        )


def cosines(first: Tensor, second: Tensor) -> FloatArray:
    """Cosines of the rows of two float32 [N, H], float64 [N]."""
    return np.asarray(functional.cosine_similarity(first.double(), second.double()).numpy())


def retrieval_ranks(
    anchors: Tensor, positives: Tensor, anchor_numbers: Tensor, positive_numbers: Tensor
) -> IndexArray:
    """How many texts are nearer to each anchor than its own positive, int64 [N].

    Candidates are the distinct positives; a text is none for itself.

    Args:
        anchors: their vectors, float32 [N, H].
        positives: their vectors, float32 [N, H].
        anchor_numbers: which text each is, int64 [N]; the same number for the same text.
        positive_numbers: likewise.
    """
    anchors, positives = functional.normalize(anchors, dim=-1), functional.normalize(positives, dim=-1)
    order = positive_numbers.argsort(stable=True)
    is_first = torch.ones(len(order), dtype=torch.bool)
    is_first[1:] = positive_numbers[order][1:] != positive_numbers[order][:-1]
    distinct = order[is_first]
    ranks = []
    for rows in torch.arange(len(anchors)).split(ANCHORS_PER_CHUNK):
        scores = anchors[rows] @ positives[distinct].T
        own = (anchors[rows] * positives[rows]).sum(-1, keepdim=True)
        numbers = positive_numbers[distinct]
        others = (numbers != positive_numbers[rows, None]) & (numbers != anchor_numbers[rows, None])
        ranks.append(((scores > own) & others).sum(1))
    return np.asarray(torch.cat(ranks).numpy())


def _texts(example: PairExample | ScoredPairExample) -> tuple[str, ...]:
    if isinstance(example, ScoredPairExample):
        return example.first, example.second
    negative = () if example.negative is None else (example.negative,)
    return example.anchor, example.positive, *negative


def _score(example: PairExample | ScoredPairExample) -> float | None:
    return float(example.score) if isinstance(example, ScoredPairExample) else None


def _target(example: PairExample | ScoredPairExample, texts: tuple[int, ...]) -> Tensor:
    if isinstance(example, ScoredPairExample):
        return torch.tensor([[float(example.score)]], dtype=torch.float64)
    return torch.tensor([[*texts, -1][:3]])


def _checked(examples: Sequence[AnyExample]) -> list[PairExample | ScoredPairExample]:
    checked: list[PairExample | ScoredPairExample] = checked_types(
        examples, (PairExample, ScoredPairExample), "embedding"
    )
    for number, example in enumerate(checked):
        for text in _texts(example):
            check_text(text, example, number)
        if isinstance(example, ScoredPairExample):
            checked_number(example.score, "the score", example, number)
    return checked
