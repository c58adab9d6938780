"""Runs are repeated by what the host took, whatever they gave."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("psutil", reason="the benchmark needs the extra: bench")
import psutil

from benchmarks.stolen_time import Attempt, least_disturbed, stolen_seconds


def run(shares: list[float], attempts: int) -> tuple[Attempt[int], int]:
    """Attempts that lose these shares, each a second long; the result of each is its number."""
    made = itertools.count()
    totals = itertools.accumulate(
        value for share in shares for value in (0.0, share * (psutil.cpu_count() or 1))
    )
    found = least_disturbed(
        lambda: next(made),
        most_stolen=0.02,
        attempts=attempts,
        clock=iter(itertools.count(0.0, 1.0)).__next__,
        stolen=totals.__next__,
    )
    return found, next(made)


def test_a_quiet_run_is_not_repeated() -> None:
    found, made = run([0.01, 0.0], 3)
    assert (found.value, found.attempts, made) == (0, 1, 1)
    assert found.stolen == pytest.approx(0.01)


def test_the_first_quiet_run_is_taken() -> None:
    found, made = run([0.3, 0.015, 0.0], 3)
    assert (found.value, found.attempts, made) == (1, 2, 2)


def test_the_least_disturbed_run_is_taken_where_none_is_quiet() -> None:
    found, made = run([0.3, 0.1, 0.2], 3)
    assert (found.value, found.attempts, made) == (1, 3, 3)
    assert found.stolen == pytest.approx(0.1)


def test_what_is_stolen_never_falls() -> None:
    assert 0 <= stolen_seconds() <= stolen_seconds()
