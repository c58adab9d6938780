"""Batch size, epochs and patience where the settings leave them open."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmi_engine.construct.training_schedule import BATCH_SIZES, MIN_STEPS, Schedule, with_schedule
from hmi_engine.construct.training_settings import TrainingSettings

OPEN = TrainingSettings()
optional = st.one_of(st.none(), st.integers(1, 100))


@pytest.mark.parametrize(
    ("num_training", "expected"),
    [
        (1, Schedule(8, 400, 80)),
        (100, Schedule(8, 31, 6)),
        (340, Schedule(8, 10, 2)),
        (850, Schedule(16, 10, 2)),
        (1300, Schedule(32, 10, 2)),
        (100_000, Schedule(32, 10, 2)),
    ],
)
def test_by_the_number_of_examples(num_training, expected):
    assert Schedule.of(OPEN, num_training) == expected


@given(st.integers(1, 5000), optional, optional, optional)
def test_what_is_set_stays(num_training, batch_size, max_epochs, patience):
    given_ = {"batch_size": batch_size, "max_epochs": max_epochs, "patience": patience}
    settings = TrainingSettings(**given_)
    schedule = Schedule.of(settings, num_training)
    for name, value in given_.items():
        assert getattr(schedule, name) == value or value is None
    if max_epochs is None:
        assert schedule.max_epochs * -(-num_training // schedule.batch_size) >= MIN_STEPS
    filled = with_schedule(settings, num_training)
    assert Schedule.of(filled, 1) == schedule == Schedule.of(filled, 10**6)


@given(st.integers(1, 5000), st.integers(1, 30))
def test_the_largest_batch_that_takes_enough_steps(num_training, max_epochs):
    chosen = Schedule.of(TrainingSettings(max_epochs=max_epochs), num_training).batch_size
    enough = {size for size in BATCH_SIZES if max_epochs * -(-num_training // size) >= MIN_STEPS}
    assert chosen == max(enough, default=min(BATCH_SIZES))


def test_pairs_are_each_others_negatives():
    assert Schedule.of(TrainingSettings(task="embedding"), 50).batch_size == 32
