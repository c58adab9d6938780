"""Scores of the accuracy study: accuracy, macro-F1 and entity F1 from counts, with bootstrap intervals.

Every score here is a function of three counts for each class: how often it was right, found and expected.
They are kept for each test text, so that scores of resampled test splits cost one matrix product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from seqeval.metrics.sequence_labeling import get_entities

from benchmarks.result import Interval

__all__ = [
    "SCORES",
    "Counts",
    "Resampling",
    "class_counts",
    "entity_counts",
    "score",
]

Counts = NDArray[np.int64]
"""[texts, classes, 3]: right, found and expected."""

Floats = NDArray[np.float64]

_RIGHT, _FOUND, _EXPECTED = range(3)


def class_counts(truth: Sequence[int], predictions: Sequence[int], num_labels: int) -> Counts:
    """Counts of texts that have one label each, int64 [S, C, 3]."""
    one_hot = np.eye(num_labels, dtype=np.int64)
    found, expected = one_hot[list(predictions)], one_hot[list(truth)]
    return np.stack([found * expected, found, expected], axis=-1)


def entity_counts(truth: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> Counts:
    """Counts of entities of all types together, int64 [S, 1, 3]: right are those of equal bounds and type.

    Entities are those that seqeval finds in a sequence of tags.
    """
    rows = []
    for expected_tags, found_tags in zip(truth, predictions, strict=True):
        expected, found = (set(get_entities(list(tags))) for tags in (expected_tags, found_tags))
        rows.append([[len(expected & found), len(found), len(expected)]])
    return np.array(rows, dtype=np.int64).reshape(len(rows), 1, 3)


def _accuracy(totals: Floats) -> Floats:
    return _share(totals[..., _RIGHT].sum(-1), totals[..., _EXPECTED].sum(-1))


def _macro_f1(totals: Floats) -> Floats:
    """The mean over classes that are expected or found."""
    occurring = totals[..., _FOUND] + totals[..., _EXPECTED] > 0
    return _share((_f1(totals) * occurring).sum(-1), occurring.sum(-1))


def _f1(totals: Floats) -> Floats:
    return _share(2 * totals[..., _RIGHT], totals[..., _FOUND] + totals[..., _EXPECTED])


def _entity_f1(totals: Floats) -> Floats:
    return _f1(totals.sum(-2))


def _share(part: Any, whole: Any) -> Floats:
    return np.asarray(part / np.maximum(whole, 1), dtype=np.float64)


SCORES: Mapping[str, Callable[[Floats], Floats]] = {
    "accuracy": _accuracy,
    "macro-F1": _macro_f1,
    "entity F1": _entity_f1,
}
"""By name: what makes a score of summed counts, [..., C, 3] -> [...]."""


def score(name: str, counts: Counts) -> float:
    """The score ``name`` of all texts of ``counts`` [S, C, 3]."""
    return float(SCORES[name](counts.sum(0).astype(np.float64)))


@dataclass(frozen=True, eq=False)
class Resampling:
    """Scores of one method on one set in B resampled test splits; the same splits for every method.

    Attributes:
        value: the mean over seeds on the test split as it is.
        samples: float64 [B], on each resampled split the mean over as many seeds, drawn with replacement.
    """

    value: float
    samples: Floats

    @classmethod
    def of(
        cls, name: str, seeds: Sequence[Counts], *, set_name: str, method: str, replicates: int = 2000
    ) -> Resampling:
        """Draws texts and seeds with replacement.

        Args:
            name: of the score.
            seeds: counts of the same test split by seed.
            set_name: fixes the draw of the texts.
            method: with the set's name fixes the draw of the seeds.
            replicates: B.
        """
        weights = _drawn_texts(set_name, len(seeds[0]), replicates)
        by_seed = np.stack([SCORES[name](_resampled(weights, counts)) for counts in seeds])
        drawn = _generator(f"{set_name} {method}").integers(len(seeds), size=(len(seeds), replicates))
        samples = np.take_along_axis(by_seed, drawn, axis=0).mean(0)
        return cls(float(np.mean([score(name, counts) for counts in seeds])), samples)

    @classmethod
    def mean(cls, parts: Sequence[Resampling]) -> Resampling:
        """The mean over sets."""
        return cls(
            float(np.mean([part.value for part in parts])), np.mean([part.samples for part in parts], axis=0)
        )

    def minus(self, other: Resampling) -> Resampling:
        """The difference on the same resampled texts."""
        return Resampling(self.value - other.value, self.samples - other.samples)

    def interval(self) -> Interval:
        """The value with the 2.5th and 97.5th percentile of the samples."""
        low, high = np.percentile(self.samples, [2.5, 97.5]).tolist()
        return Interval(value=self.value, low=low, high=high)


@functools.lru_cache(maxsize=8)
def _drawn_texts(set_name: str, num_texts: int, replicates: int) -> Floats:
    """How often each text is in each resampled split, [B, S]."""
    draws = _generator(set_name).multinomial(num_texts, np.full(num_texts, 1 / num_texts), size=replicates)
    return draws.astype(np.float64)


def _resampled(weights: Floats, counts: Counts) -> Floats:
    """Summed counts of each resampled split, [B, C, 3]."""
    return (weights @ counts.reshape(len(counts), -1)).reshape(len(weights), *counts.shape[1:])


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))
