"""Processor time that a virtual machine's host gives to others: who lost too much runs again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import psutil

__all__ = ["Attempt", "least_disturbed", "stolen_seconds"]

Value = TypeVar("Value")


def stolen_seconds() -> float:
    """Of all processors since the machine started; 0 where the system does not tell."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


@dataclass(frozen=True)
class Attempt(Generic[Value]):
    """What a run gave.

    Attributes:
        value: its result.
        stolen: share of the processors' time that the host gave to others meanwhile.
        attempts: runs that were made, of which this was the least disturbed.
    """

    value: Value
    stolen: float
    attempts: int


def least_disturbed(
    work: Callable[[], Value],
    *,
    most_stolen: float,
    attempts: int,
    clock: Callable[[], float] = time.perf_counter,
    stolen: Callable[[], float] = stolen_seconds,
) -> Attempt[Value]:
    """Runs until one run loses at most ``most_stolen`` of the processors' time, at most ``attempts`` times.

    The choice looks at the stolen time alone, never at the result.
    """
    processors = psutil.cpu_count() or 1
    best: Attempt[Value] | None = None
    for number in range(1, attempts + 1):
        began, before = clock(), stolen()
        value = work()
        share = (stolen() - before) / max(1e-9, processors * (clock() - began))
        if best is None or share < best.stolen:
            best = Attempt(value, share, number)
        if best.stolen <= most_stolen:
            break
        print(f"{share:.1%} of the processors' time was stolen in attempt {number}", file=sys.stderr)
    assert best is not None  # there is at least one attempt
    return Attempt(best.value, best.stolen, number)
