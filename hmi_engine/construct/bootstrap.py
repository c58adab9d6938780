"""Percentile bootstrap: how far a figure would move had other examples been drawn (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "CONFIDENCE",
    "MAX_SEED",
    "RESAMPLES",
    "FloatArray",
    "IndexArray",
    "Statistic",
    "bootstrap_intervals",
    "sums",
]

RESAMPLES = 1000
CONFIDENCE = 0.95
MAX_SEED = 2**63 - 1
"""From 0 to this, a seed is one for numpy's generators, which take none below, and for torch's."""
_ELEMENTS_PER_CHUNK = 1 << 22

IndexArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]

Statistic = Callable[[IndexArray], FloatArray]
"""Takes R resamples, numbers of examples int64 [R, N], and gives the figure of each, float64 [R]."""


def bootstrap_intervals(
    statistics: Mapping[str, Statistic],
    num_examples: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Returns the bounds between which :data:`CONFIDENCE` of the resamples' figures lie, by name.

    All figures see the same resamples: ``resamples`` times N examples, drawn with replacement by ``seed``.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, _ELEMENTS_PER_CHUNK // num_examples)
    found: dict[str, list[FloatArray]] = {name: [] for name in statistics}
    for first in range(0, resamples, rows):
        shape = (min(rows, resamples - first), num_examples)
        indices = generator.integers(0, num_examples, size=shape, dtype=np.int64)
        for name, statistic in statistics.items():
            found[name].append(statistic(indices))
    tail = (1 - CONFIDENCE) / 2
    intervals = {}
    for name, parts in found.items():
        low, high = np.quantile(np.concatenate(parts), [tail, 1 - tail])
        intervals[name] = (float(low), float(high))
    return intervals


def sums(indices: IndexArray, counts: FloatArray) -> FloatArray:
    """Sums of ``counts`` [N, ...] over each resample [R, N]: [R, ...]."""
    num_examples = len(counts)
    drawn = np.stack([np.bincount(row, minlength=num_examples) for row in indices]).astype(np.float64)
    return np.tensordot(drawn, counts, axes=1)
