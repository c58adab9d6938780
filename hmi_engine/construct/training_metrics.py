"""How predictions compare with the truth: figures by scikit-learn, scipy and seqeval, and their intervals.

A figure is the library's; the statistic beside it computes the same for all resamples of the bootstrap at
once. Tests hold one to the other.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from hmi_engine.construct.bootstrap import (
    RESAMPLES,
    FloatArray,
    IndexArray,
    Statistic,
    bootstrap_intervals,
    sums,
)
from hmi_engine.errors import MissingDependencyError

__all__ = [
    "Metrics",
    "check_metric_libraries",
    "is_bio",
    "measure_classes",
    "measure_label_sets",
    "measure_numbers",
    "measure_retrieval",
    "measure_similarity",
    "measure_tags",
]

_BIO = re.compile(r"O|[BI]-.+")

BoolArray = npt.NDArray[np.bool_]


class Metrics(BaseModel):
    """How predictions compare with the truth, over ``num_examples``.

    Attributes:
        num_examples: texts, sentences or pairs.
        values: figures by name. Classification: ``accuracy``, ``macro_f1`` (over the labels that occur in the
            truth or the predictions) and, where the training examples are known, ``majority_accuracy``: what
            always answering their most frequent label would reach here. Multi-label: ``micro_f1``,
            ``macro_f1`` (over all labels), ``exact_match``. Token classification: ``entity_f1``,
            ``entity_precision``, ``entity_recall`` (where tags are BIO) and ``word_accuracy``. Regression:
            ``r2`` (of a constant truth 1 where all is right, else 0), ``pearson``, ``spearman``,
            ``mean_absolute_error``; a correlation with a constant is 0.
            Embedding: of scored pairs ``spearman`` of cosine and score; of others ``retrieval_accuracy``,
            how often an anchor's own positive is the nearest of all, and ``mean_reciprocal_rank``.
        intervals: 95 % percentile bootstrap intervals by the same names; empty where none were asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_examples: int
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]] = {}

    @property
    def accuracy(self) -> float:
        """Share of right answers, of classification."""
        return self.values["accuracy"]

    @property
    def macro_f1(self) -> float:
        """Mean over labels of F1, of classification and multi-label classification."""
        return self.values["macro_f1"]

    @property
    def majority_accuracy(self) -> float:
        """What always answering the most frequent training label would reach, of classification."""
        return self.values["majority_accuracy"]


def check_metric_libraries() -> None:
    """Raises :class:`MissingDependencyError` unless the libraries that compute figures are installed."""
    for library in ("scipy", "seqeval", "sklearn"):
        if importlib.util.find_spec(library) is None:
            raise MissingDependencyError(
                f"{library} is not installed; training and evaluation need pip install 'hmi[train]'"
            )


def is_bio(tags: Sequence[str]) -> bool:
    """Whether tags name entities: ``O``, ``B-<type>`` and ``I-<type>``."""
    return all(_BIO.fullmatch(tag) for tag in tags)


def measure_classes(
    truth: Sequence[int],
    predictions: Sequence[int],
    *,
    majority: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Metrics:
    """Compares label numbers; ``majority`` is the most frequent one in the training examples.

    Raises:
        ValueError: the sequences are empty or of different lengths.
    """
    from sklearn.metrics import accuracy_score, f1_score

    _check_lengths(truth, predictions)
    expected, found = np.asarray(truth), np.asarray(predictions)
    values = {
        "accuracy": float(accuracy_score(expected, found)),
        "macro_f1": float(f1_score(expected, found, average="macro", zero_division=0)),
    }
    right = (expected == found).astype(np.float64)
    labels = np.unique(np.concatenate([expected, found]))
    counts = _label_counts(expected[:, None] == labels, found[:, None] == labels)
    statistics: dict[str, Statistic] = {
        "accuracy": lambda indices: right[indices].mean(axis=1),
        "macro_f1": lambda indices: _mean_f1(sums(indices, counts), only_present=True),
    }
    if majority is not None:
        is_majority = (expected == majority).astype(np.float64)
        values["majority_accuracy"] = float(is_majority.mean())
        statistics["majority_accuracy"] = lambda indices: is_majority[indices].mean(axis=1)
    return _metrics(len(truth), values, statistics, resamples, seed)


def measure_label_sets(
    truth: BoolArray, predictions: BoolArray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Metrics:
    """Compares which of C labels apply, bool [N, C].

    Raises:
        ValueError: they are empty or of different lengths.
    """
    from sklearn.metrics import accuracy_score, f1_score

    _check_lengths(truth, predictions)
    values = {
        "micro_f1": float(f1_score(truth, predictions, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(truth, predictions, average="macro", zero_division=0)),
        "exact_match": float(accuracy_score(truth, predictions)),
    }
    counts = _label_counts(truth, predictions)
    exact = (truth == predictions).all(axis=1).astype(np.float64)
    statistics: dict[str, Statistic] = {
        "micro_f1": lambda indices: _f1(sums(indices, counts).sum(axis=2)),
        "macro_f1": lambda indices: _mean_f1(sums(indices, counts), only_present=False),
        "exact_match": lambda indices: exact[indices].mean(axis=1),
    }
    return _metrics(len(truth), values, statistics, resamples, seed)


def measure_tags(
    truth: Sequence[Sequence[str]],
    predictions: Sequence[Sequence[str]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Metrics:
    """Compares the tags of sentences; an entity counts if type and bounds are right (as conlleval counts).

    Raises:
        ValueError: there are no sentences, or one has other numbers of tags.
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    _check_lengths(truth, predictions)
    for expected, found in zip(truth, predictions, strict=True):
        _check_lengths(expected, found)
    right = np.array(
        [
            [sum(map(str.__eq__, expected, found)), len(expected)]
            for expected, found in zip(truth, predictions, strict=True)
        ],
        dtype=np.float64,
    )
    values = {"word_accuracy": float(right[:, 0].sum() / right[:, 1].sum())}
    statistics: dict[str, Statistic] = {"word_accuracy": lambda indices: _share(sums(indices, right))}
    if all(map(is_bio, truth)) and all(map(is_bio, predictions)):
        lists = [list(tags) for tags in truth], [list(tags) for tags in predictions]
        values |= {
            "entity_f1": float(f1_score(*lists, zero_division=0)),
            "entity_precision": float(precision_score(*lists, zero_division=0)),
            "entity_recall": float(recall_score(*lists, zero_division=0)),
        }
        counts = _entity_counts(*lists)
        statistics |= {
            "entity_f1": lambda indices: _f1(sums(indices, counts)),
            "entity_precision": lambda indices: _share(sums(indices, counts)[:, [0, 1]]),
            "entity_recall": lambda indices: _share(sums(indices, counts)[:, [0, 2]]),
        }
    return _metrics(len(truth), values, statistics, resamples, seed)


def measure_numbers(
    truth: FloatArray, predictions: FloatArray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Metrics:
    """Compares numbers, float64 [N].

    Raises:
        ValueError: they are empty or of different lengths.
    """
    from sklearn.metrics import mean_absolute_error

    _check_lengths(truth, predictions)
    values = {
        "r2": _determination(truth, predictions),
        "pearson": _correlation("pearsonr", truth, predictions),
        "spearman": _correlation("spearmanr", truth, predictions),
        "mean_absolute_error": float(mean_absolute_error(truth, predictions)),
    }
    distance = np.abs(truth - predictions)
    statistics: dict[str, Statistic] = {
        "r2": lambda indices: _r2(truth[indices], predictions[indices]),
        "pearson": lambda indices: _pearson(truth[indices], predictions[indices]),
        "spearman": lambda indices: _spearman(truth[indices], predictions[indices]),
        "mean_absolute_error": lambda indices: distance[indices].mean(axis=1),
    }
    return _metrics(len(truth), values, statistics, resamples, seed)


def measure_similarity(
    truth: FloatArray, predictions: FloatArray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Metrics:
    """Compares cosines with the scores that people gave, float64 [N], by Spearman's rank correlation.

    Raises:
        ValueError: they are empty or of different lengths.
    """
    _check_lengths(truth, predictions)
    values = {"spearman": _correlation("spearmanr", truth, predictions)}
    statistics: dict[str, Statistic] = {
        "spearman": lambda indices: _spearman(truth[indices], predictions[indices])
    }
    return _metrics(len(truth), values, statistics, resamples, seed)


def measure_retrieval(ranks: IndexArray, *, resamples: int = RESAMPLES, seed: int = 0) -> Metrics:
    """Judges by ``ranks`` int64 [N]: how many candidates were nearer to an anchor than its own positive.

    Raises:
        ValueError: there are none.
    """
    _check_lengths(ranks, ranks)
    first, reciprocal = (ranks == 0).astype(np.float64), 1.0 / (1 + ranks)
    values = {
        "retrieval_accuracy": float(first.mean()),
        "mean_reciprocal_rank": float(reciprocal.mean()),
    }
    statistics: dict[str, Statistic] = {
        "retrieval_accuracy": lambda indices: first[indices].mean(axis=1),
        "mean_reciprocal_rank": lambda indices: reciprocal[indices].mean(axis=1),
    }
    return _metrics(len(ranks), values, statistics, resamples, seed)


def _metrics(
    num_examples: int,
    values: dict[str, float],
    statistics: Mapping[str, Statistic],
    resamples: int,
    seed: int,
) -> Metrics:
    intervals = {}
    if resamples:
        intervals = bootstrap_intervals(statistics, num_examples, resamples=resamples, seed=seed)
    return Metrics(num_examples=num_examples, values=values, intervals=intervals)


def _check_lengths(truth: Sequence[object] | np.ndarray, predictions: Sequence[object] | np.ndarray) -> None:
    if len(truth) != len(predictions) or len(truth) == 0:
        raise ValueError(f"{len(predictions)} predictions cannot be compared with {len(truth)} labels")


def _label_counts(truth: BoolArray, predictions: BoolArray) -> FloatArray:
    """Of each example and label: in both, in the predictions, in the truth; float64 [N, 3, C]."""
    return np.stack([truth & predictions, predictions, truth], axis=1).astype(np.float64)


def _entity_counts(truth: list[list[str]], predictions: list[list[str]]) -> FloatArray:
    """Entities of each sentence: in both, in the predictions, in the truth; float64 [N, 3]."""
    from seqeval.metrics.sequence_labeling import get_entities

    rows = []
    for expected, found in zip(truth, predictions, strict=True):
        expected_entities, found_entities = set(get_entities(expected)), set(get_entities(found))
        both = len(expected_entities & found_entities)
        rows.append([both, len(found_entities), len(expected_entities)])
    return np.array(rows, dtype=np.float64)


def _share(counts: FloatArray) -> FloatArray:
    """counts [R, 2]: the first over the second, 0 where that is 0."""
    shares: FloatArray = np.zeros(len(counts))
    return np.divide(counts[:, 0], counts[:, 1], out=shares, where=counts[:, 1] > 0)


def _f1(counts: FloatArray) -> FloatArray:
    """counts [R, 3, ...] of both, predictions and truth -> F1 [R, ...], 0 where neither has any."""
    either = counts[:, 1] + counts[:, 2]
    return np.divide(2 * counts[:, 0], either, out=np.zeros_like(either), where=either > 0)


def _mean_f1(counts: FloatArray, *, only_present: bool) -> FloatArray:
    """counts [R, 3, C] -> mean of F1 over labels, or over those that occur."""
    scores = _f1(counts)
    if not only_present:
        return np.asarray(scores.mean(axis=1))
    present = counts[:, 1] + counts[:, 2] > 0
    return np.asarray(scores.sum(axis=1) / present.sum(axis=1))


def _correlation(name: str, truth: FloatArray, predictions: FloatArray) -> float:
    from scipy import stats

    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(getattr(stats, name)(truth, predictions).statistic)


def _determination(truth: FloatArray, predictions: FloatArray) -> float:
    from sklearn.metrics import r2_score

    if len(truth) < 2:
        return 0.0
    if np.ptp(truth) == 0:  # scikit-learn divides by what rounding leaves of its mean
        return float(np.array_equal(truth, predictions))
    return float(r2_score(truth, predictions))


def _pearson(truth: FloatArray, predictions: FloatArray) -> FloatArray:
    """Rows [R, N] with rows [R, N] -> [R], 0 where one is constant."""
    x = truth - truth.mean(axis=1, keepdims=True)
    y = predictions - predictions.mean(axis=1, keepdims=True)
    varies = (np.ptp(truth, axis=1) > 0) & (np.ptp(predictions, axis=1) > 0)
    norms = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    correlations: FloatArray = np.zeros(len(x))
    np.divide((x * y).sum(axis=1), norms, out=correlations, where=varies)
    return correlations


def _spearman(truth: FloatArray, predictions: FloatArray) -> FloatArray:
    from scipy.stats import rankdata

    ranks: tuple[FloatArray, FloatArray] = rankdata(truth, axis=1), rankdata(predictions, axis=1)
    return _pearson(*ranks)


def _r2(truth: FloatArray, predictions: FloatArray) -> FloatArray:
    """Rows [R, N] with rows [R, N] -> [R]; of a constant truth 1 where all is right, else 0."""
    errors = np.square(truth - predictions).sum(axis=1)
    total = np.square(truth - truth.mean(axis=1, keepdims=True)).sum(axis=1)
    unexplained: FloatArray = np.where(errors == 0, 0.0, 1.0)  # of a constant truth
    # Rounding leaves something of a constant's own mean, so ``total`` does not tell it.
    np.divide(errors, total, out=unexplained, where=np.ptp(truth, axis=1) > 0)
    return 1 - unexplained
