"""Shuffles and votes against their definition in the CUDA C++ programming guide."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.shim import floats, launch, shim

VALUES = np.random.default_rng(0).integers(-1000, 1000, 32).astype(np.int32)
LANES = np.arange(32)


@pytest.mark.parametrize("order", ["in order", "reverse", "random"])
@pytest.mark.parametrize("width", [8, 16, 32])
def test_shuffles(width, order):
    with shim(order=order):
        indexed, turned, crossed, up, down = launch("shuffles", np.zeros((5, 32), np.int32), VALUES, width)
    begin = LANES // width * width
    within = LANES % width
    np.testing.assert_array_equal(indexed, VALUES[begin + 5 % width])
    np.testing.assert_array_equal(turned, VALUES[begin + (LANES + 3) % width])
    np.testing.assert_array_equal(crossed, VALUES[begin + (within ^ 6)])
    np.testing.assert_array_equal(up, VALUES[np.where(within >= 3, LANES - 3, LANES)])
    np.testing.assert_array_equal(down, VALUES[np.where(within + 3 < width, LANES + 3, LANES)])


@pytest.mark.parametrize("threshold", [-2000, 0, 2000])
def test_votes(threshold):
    with shim():
        output = launch("votes", np.zeros((7, 32), np.uint32), VALUES, threshold)
    votes = threshold > VALUES
    mask = int(np.uint32(sum(1 << lane for lane in LANES[votes].tolist())))
    count = int(votes.sum())
    expected = [mask, count > 0, count == 32, count, count > 0, count == 32]
    np.testing.assert_array_equal(output[:6], np.repeat(np.uint32(expected)[:, None], 32, axis=1))
    assert output[6].all(), "a lane is among the active ones"


def test_halves_of_a_warp_meet_apart():
    with shim():
        output = launch("halves", np.zeros(32, np.int32), VALUES)
    np.testing.assert_array_equal(output, VALUES.reshape(2, 16).sum(1).repeat(16))


def test_a_warp_that_the_block_fills_in_part():
    with shim():
        output = launch("partial_warp", np.zeros(20, np.int32), np.ones(20, np.int32))
    assert (output == (1 << 20) - 1).all()


def test_values_of_eight_bytes():
    values = np.random.default_rng(1).normal(size=32)
    with shim():
        output = launch("wide_values", np.zeros(32), values)
    np.testing.assert_array_equal(output, values[LANES ^ 1])


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("outside_mask", "reads lane 20, which is not in the mask"),
        ("not_in_own_mask", "is not in its own mask 0x0000ffff"),
        ("different_masks", "meet in different collectives"),
    ],
)
def test_misuse_is_told(kernel, message):
    with shim(), pytest.raises(RuntimeError, match=message):
        launch(kernel, floats(32), VALUES)
