"""Interleaved wall-clock measurements, and what may be said of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["interleave", "median", "median_interval", "ratio_interval"]

RESAMPLES = 4000
CONFIDENCE = 0.95
PAUSE_SECONDS = 0.02
"""Before each sample: threads of the system before it, which still wait actively for work, go to sleep."""


def interleave(
    systems: Mapping[str, Callable[[int], object]],
    repetitions: int,
    *,
    warm_up: int = 1,
    on_repetition: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Times each system once a repetition, in turn (A B C, B C A, C A B, ...), so that drift hits all alike.

    The order rotates, so that no system always follows the same one. ``warm_up`` untimed rounds come first.
    A system is called with the number of the round, 0 to ``warm_up + repetitions - 1``, by which it can take
    inputs that are new to all.

    Returns:
        Seconds by system, in the order of repetitions: sample i of all systems is from the same repetition.
    """
    names = list(systems)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + repetitions):
        shift = number % len(names)
        gc.collect()
        for name in names[shift:] + names[:shift]:
            time.sleep(PAUSE_SECONDS)
            started = time.perf_counter()
            systems[name](number)
            elapsed = time.perf_counter() - started
            if number >= warm_up:
                seconds[name].append(elapsed)
        if on_repetition is not None:
            on_repetition()
    return seconds


def median(samples: Sequence[float]) -> float:
    """The median of at least one sample."""
    return float(np.median(samples))


def median_interval(samples: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the median (Efron 1979)."""
    values = np.asarray(samples, dtype=np.float64)
    return _percentiles(np.median(values[_draws(len(values), seed)], axis=1))


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of median(numerator) / median(denominator).

    Repetitions are drawn in pairs, as they were measured. Raises ValueError if the lengths differ.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} and {len(denominator)} samples are no pairs")
    draws = _draws(len(numerator), seed)
    above, below = np.asarray(numerator)[draws], np.asarray(denominator)[draws]
    return _percentiles(np.median(above, axis=1) / np.median(below, axis=1))


def _draws(num_samples: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(num_samples, size=(RESAMPLES, num_samples))


def _percentiles(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
