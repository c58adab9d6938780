"""Searching learning rates and ranks: successive halving within its budget."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmi_engine.construct import training_search
from hmi_engine.construct.training import SearchSpace, TrainingSettings
from hmi_engine.construct.training_loop import FitResult
from hmi_engine.construct.training_settings import Epoch
from hmi_engine.errors import TrainingDivergedError


class FakeTask:
    """Judged by accuracy, and a hundred examples long."""

    class objective:
        best_by = "accuracy"

    class split:
        training = range(100)


def run(space, monkeypatch, score, base=None):
    """Searches with a ``fit`` that gives each candidate the accuracy ``score(settings, steps)``."""
    calls = []

    def fit(task, tenant, chosen, generator, *, max_steps):
        calls.append((chosen.peak_learning_rate, chosen.rank, max_steps))
        accuracy = score(chosen, max_steps)
        if accuracy is None:
            raise TrainingDivergedError("NaN")
        epoch = Epoch(training_loss=1.0, validation_loss=1 - accuracy, metrics={"accuracy": accuracy})
        return FitResult((epoch,), 0)

    monkeypatch.setattr(training_search, "fit", fit)
    base = base or TrainingSettings(learning_rate=1e-3)
    chosen, report = training_search.search(FakeTask, lambda *arguments: None, base, space)
    return chosen, report, calls


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(100, 5000), st.integers(0, 1000))
def test_the_best_is_found_within_the_budget(num_rates, num_ranks, budget, seed):
    """Where few steps tell as much as many, the winner is the best of all."""
    space = SearchSpace(
        learning_rates=tuple(10.0**-power for power in range(1, num_rates + 1)),
        ranks=tuple(range(1, num_ranks + 1)),
        budget_steps=budget,
    )

    def score(chosen, steps):
        return hash((chosen.peak_learning_rate, chosen.rank, seed)) % 10_007 / 10_007

    with pytest.MonkeyPatch.context() as patch:
        chosen, report, calls = run(space, patch, score)
    assert sum(steps for *_, steps in calls) <= budget
    assert score(chosen, 0) == max(score(candidate, 0) for candidate in space.candidates(chosen))
    assert [(trial.learning_rate, trial.rank, trial.steps) for trial in report.trials] == calls
    survivors = [sum(trial.round == number for trial in report.trials) for number in (1, 2, 3)]
    for before, after in pairwise(survivors):
        assert after in (0, (before + 1) // 2)


def test_candidates_that_diverge_lose(monkeypatch):
    space = SearchSpace(learning_rates=(1.0, 1e-3), ranks=(4,), budget_steps=10)
    chosen, report, _ = run(
        space, monkeypatch, lambda chosen, _: None if chosen.peak_learning_rate == 1.0 else 0.0
    )
    assert chosen.learning_rate == 1e-3
    assert [trial.value for trial in report.trials] == [None, 0.0]
    with pytest.raises(TrainingDivergedError, match="lower learning rates"):
        run(space, monkeypatch, lambda *_: None)


def test_defaults(monkeypatch):
    base = TrainingSettings(kind="ia3", rank=5, max_epochs=3, batch_size=10, learning_rate=0.01)
    chosen, report, calls = run(SearchSpace(), monkeypatch, lambda *_: 0.5, base)
    assert {(rate, rank) for rate, rank, _ in calls} == {(0.003, 5), (0.01, 5), (0.03, 5)}
    assert report.budget_steps == 2 * 3 * 10
    assert chosen.max_epochs == 3


@pytest.mark.parametrize("fields", [{"learning_rates": ()}, {"ranks": ()}, {"budget_steps": 0}])
def test_impossible_spaces(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SearchSpace(**fields)
    with pytest.raises(ValueError, match="rank"):
        SearchSpace(ranks=(0,)).candidates(TrainingSettings())
