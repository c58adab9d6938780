"""Threads meet at barriers and in warps; those that miss each other are told, with the place."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.shim import floats, launch, shim

ORDERS = [
    {"order": "in order"},
    {"order": "reverse"},
    *({"order": "random", "seed": seed} for seed in range(3)),
]


@pytest.mark.parametrize("settings", ORDERS)
def test_every_thread_of_every_block_runs_once_under_its_own_coordinates(settings):
    with shim(**settings):
        output = launch("coordinates", np.zeros(12 * 24, np.uint32))
    z, y, x = np.meshgrid(range(2), range(3), range(4), indexing="ij")
    of_block = (x + 100 * y + 10000 * z).ravel()
    np.testing.assert_array_equal(output.reshape(12, 24), 1000000 * np.arange(12)[:, None] + of_block)


@pytest.mark.parametrize("settings", ORDERS)
def test_barriers_in_a_loop(settings):
    with shim(**settings):
        output = launch("shift", np.zeros(128, np.float32), floats(128), 5)
    np.testing.assert_array_equal(output, np.minimum(floats(128) + 5, 128))


def test_exited_threads_do_not_hold_up_a_barrier():
    with shim():
        output = launch("some_exit", np.zeros(128, np.float32), floats(128), 40)
    np.testing.assert_array_equal(output[:40], floats(40)[::-1])
    assert not output[40:].any()


def test_barriers_on_two_lines_do_not_match():
    with shim(), pytest.raises(RuntimeError, match=r"different barriers: \S*meetings.cu:\d+ and \S*meetings"):
        launch("divergent_barriers")


def test_a_deadlock_says_who_waits_where():
    with shim(order="in order"), pytest.raises(RuntimeError) as error:
        launch("deadlock", floats(128))
    assert "from thread 0 on waits in the warp's collective tests/emulator/kernels/meetings.cu" in str(
        error.value
    )
    assert "from thread 16 on waits at the barrier tests/emulator/kernels/meetings.cu" in str(error.value)


def test_lanes_that_have_exited_are_waited_for():
    with shim(), pytest.raises(RuntimeError, match=r"deadlock: .*; 32 have exited"):
        launch("exited_lanes", floats(128))


def test_after_an_error_the_next_launch_starts_afresh():
    with shim():
        with pytest.raises(RuntimeError):
            launch("deadlock", floats(128))
        output = launch("reverse", np.zeros(128, np.float32), floats(128))
    np.testing.assert_array_equal(output, floats(128)[::-1])


def test_random_orders_repeat_by_their_seed():
    def switches(seed):
        with shim(order="random", seed=seed) as module:
            before = module.emulator.switches()
            launch("shift", np.zeros(128, np.float32), floats(128), 3)
            return module.emulator.switches() - before

    assert switches(1) == switches(1)


def test_a_fault_is_no_race_and_one_thread_is_heard():
    word = np.zeros(1, np.uint64)
    with shim("race"):
        launch("fault", word)
    assert 1 <= word[0] <= 128


@pytest.mark.parametrize("settings", [{"order": "sideways"}, {"copy_time": "never"}])
def test_unknown_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must be"), shim(**settings):
        pass
