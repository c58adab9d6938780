"""cp.async: nothing arrives before it is waited for, and illegal copies are told."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.shim import floats, launch, shim

NUM_CHUNKS = 7


@pytest.mark.parametrize("copy_time", ["late", "early", "random"])
@pytest.mark.parametrize("order", ["in order", "reverse", "random"])
def test_pipeline(order, copy_time):
    source = floats(NUM_CHUNKS * 64 * 4)
    with shim(order=order, copy_time=copy_time):
        output = launch("pipeline", np.zeros((NUM_CHUNKS, 64), np.float32), source, NUM_CHUNKS)
    sums = source.reshape(NUM_CHUNKS, 64, 4).sum(2)
    np.testing.assert_array_equal(output, np.roll(sums, -1, axis=1))


def test_invalid_copies_give_zeros():
    with shim():
        output = launch("zero_fill", np.ones((32, 4), np.float32), floats(128), 5)
    np.testing.assert_array_equal(output[:5], floats(20).reshape(5, 4))
    assert not output[5:].any()


def test_what_is_not_waited_for_is_nan():
    with shim(copy_time="late"):
        assert np.isnan(launch("unwaited", np.zeros(32, np.float32), floats(128))).all()
    with shim(copy_time="early"):
        output = launch("unwaited", np.zeros(32, np.float32), floats(128))
    np.testing.assert_array_equal(output, floats(128)[::4])


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("exit_with_copies", "copies that it has not waited for"),
        ("misaligned_copy", "async_copy.cu:[0-9]+: the destination is not a multiple of 16"),
        ("misaligned_source", "async_copy.cu:[0-9]+: the source is not a multiple of 16"),
        ("copy_to_global", "async_copy.cu:[0-9]+: the destination is not in shared memory"),
    ],
)
def test_misuse_is_told(kernel, message):
    with shim(), pytest.raises(RuntimeError, match=message):
        launch(kernel, floats(128), floats(256), 1)
