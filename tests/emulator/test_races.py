"""The race check finds unordered accesses whatever the schedule, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.shim import floats, launch, shim

SCHEDULES = [{"order": "in order"}, {"order": "reverse"}, {"order": "random", "seed": 1}]


@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize(
    ("kernel", "parameter", "message"),
    [
        ("same_shared_word", 0, "write after write in shared memory"),
        ("same_global_word", 0, "write after write in global memory: thread 0 of another block"),
        ("neighbour_block", 0, "in global memory: thread 0 of another block"),
        ("ordered_by_shuffle", 0, "read after write in shared memory"),
        ("ordered_by_other_half", 0, "(read after write|write after read) in shared memory"),
        ("two_readers", 0, "(write after read|read after write) in shared memory"),
        ("two_sums", 1, "(write after read|write after write|read after write) in shared memory"),
        ("constant_of_own", 0, "write of what a constant load has read"),
    ],
)
def test_races_are_found(kernel, parameter, message, settings):
    with shim("race", **settings), pytest.raises(RuntimeError, match=message):
        launch(kernel, floats(128), floats(128), parameter)


@pytest.mark.parametrize("writer", range(4))
@pytest.mark.parametrize("order", ["in order", "reverse"])
def test_a_write_races_with_reads_by_any_other_block(order, writer):
    with shim("race", order=order), pytest.raises(RuntimeError, match="in global memory"):
        launch("read_by_all", floats(128), None, writer)


@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize(
    ("kernel", "parameter"),
    [
        ("reverse", 0),
        ("shift", 3),
        ("two_sums", 0),
        ("exchange_in_warp", 0),
        ("exchange_in_half", 0),
        ("some_exit", 40),
        ("changing_of_own", 0),
        ("pipeline", 5),
        ("zero_fill", 7),
        ("repeated_read", 2),
    ],
)
def test_right_kernels_raise_no_alarm(kernel, parameter, settings):
    with shim("race", **settings):
        launch(kernel, floats(1024), floats(2048), parameter)


def test_the_message_names_both_places():
    with shim("race", order="in order"), pytest.raises(RuntimeError) as error:
        launch("ordered_by_shuffle", floats(32), floats(32))
    assert str(error.value).count("tests/emulator/kernels/races.cu:") == 2


def test_every_launch_is_checked_anew():
    """A second race was once hidden by the first."""
    with shim("race"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="race"):
                launch("same_shared_word", floats(32))
        launch("reverse", np.zeros(128, np.float32), floats(128))


def test_the_plain_build_cannot_check():
    with shim("plain") as module, pytest.raises(ValueError, match="does not observe"):
        module.emulator.configure(
            order="random",
            seed=0,
            copy_time="late",
            check_races=True,
            count_accesses=False,
            allow_sm90_shared=False,
            dropped=[],
        )
