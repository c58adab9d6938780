"""Memory out of bounds, undefined shared memory, and launches that no device can run."""

from __future__ import annotations

import re

import numpy as np
import pytest

from emulator.build import EMULATOR_TESTS
from emulator.harness import run_sanitized
from emulator.shim import floats, launch, shim

SANITIZED = """
import numpy as np
from emulator.shim import launch, shim
with shim("sanitize"):
    launch({kernel!r}, np.zeros({size}, np.float32), np.zeros({size}, np.float32), {parameter})
print("finished")
"""


def run_case(kernel, parameter):
    """In the variant that only slow tests use: it takes minutes to compile."""
    size = 128 if kernel == "zero_fill" else 32
    code = SANITIZED.format(kernel=kernel, parameter=parameter, size=size)
    return run_sanitized(code, program=EMULATOR_TESTS)


@pytest.mark.slow
@pytest.mark.parametrize("parameter", [0, 1, -1])
@pytest.mark.parametrize("kernel", ["read_at_offset", "write_at_offset"])
def test_the_sanitizer_sees_the_ends_of_global_memory(kernel, parameter):
    result = run_case(kernel, parameter)
    if parameter == 0:
        assert result.stdout == "finished\n", result.stderr
    else:
        assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
        assert "kernels/bounds.cu" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "parameter", "message"),
    [
        ("copy_at_offset", 32, "AddressSanitizer: heap-buffer-overflow"),
        ("static_index", 32, "bounds.cu.*index 32 out of bounds"),
        ("past_dynamic", 1, "AddressSanitizer: use-after-poison"),
    ],
)
def test_the_sanitizer_sees_the_ends_of_shared_memory_and_of_copies(kernel, parameter, message):
    result = run_case(kernel, parameter)
    assert result.returncode != 0
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.slow
def test_barriers_and_copies_under_the_sanitizer():
    """Fibers must be told to it: false alarms otherwise."""
    result = run_case("zero_fill", 7)
    assert result.stdout == "finished\n", result.stderr


def test_writing_past_dynamic_shared_memory_is_told_by_every_build():
    with (
        shim(),
        pytest.raises(RuntimeError, match="wrote 0 bytes past its 128 bytes of dynamic shared memory"),
    ):
        launch("past_dynamic", floats(32), None, 1)


def test_misaligned_loads_are_told():
    with shim(), pytest.raises(RuntimeError, match=r"16 bytes at tests/emulator/kernels/bounds.cu:\d+"):
        launch("misaligned_load", floats(32), floats(32), 1)


def test_static_shared_memory_has_a_limit():
    with shim(), pytest.raises(RuntimeError, match="52000 bytes of static shared memory"):
        launch("large_static", floats(32))


def test_shared_memory_is_undefined_at_the_start_of_every_block():
    with shim():
        assert np.isnan(launch("fresh_shared", np.zeros(5 * 64, np.float32), None, 5)).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 1, 0, 1, 1, 0), "a block of 0 x 1 x 1 threads"),
        ((1, 1, 1, 1025, 1, 1, 0), "1,024 are the most"),
        ((1, 1, 1, 32, 33, 1, 0), "1,024 are the most"),
        ((1, 1, 1, 1, 1, 65, 0), "64 in z"),
        ((1, 65536, 1, 32, 1, 1, 0), "a grid of 1 x 65536 x 1 blocks"),
        ((1, 1, 65536, 32, 1, 1, 0), "a grid of 1 x 1 x 65536 blocks"),
        ((1, 1, 1, 32, 1, 1, 163 * 1024 + 1), "166913 bytes of dynamic shared memory; 166912 are the most"),
    ],
)
def test_launches_that_no_device_can_run(shape, message):
    with shim(), pytest.raises(RuntimeError, match=f"launch refused: .*{message}"):
        launch("shaped", None, np.array(shape, np.uint32))


def test_limits_are_legal():
    with shim():
        launch("shaped", None, np.array((1, 1, 1, 32, 32, 1, 163 * 1024), np.uint32))
        launch("shaped", None, np.array((0, 1, 1, 32, 1, 1, 0), np.uint32))  # empty: no error
    with shim(allow_sm90_shared=True):
        launch("shaped", None, np.array((1, 1, 1, 32, 1, 1, 227 * 1024), np.uint32))


def test_parameters_have_a_limit():
    with shim(), pytest.raises(RuntimeError, match="4097 bytes of kernel parameters"):
        launch("large_parameter")
