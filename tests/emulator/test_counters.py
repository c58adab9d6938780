"""Counters against numbers that follow from the addresses."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.harness import counters
from emulator.shim import floats, launch, shim


def count(kernel, parameter=0, *, size=32 * 64, offset=0):
    with shim("count"):
        launch(kernel, floats(1024), floats(size, offset), parameter)
        (launched,) = counters()
    return launched


@pytest.mark.parametrize(
    ("stride", "offset", "sectors"),
    [(0, 0, 1), (1, 0, 4), (1, 1, 5), (2, 0, 8), (4, 0, 16), (8, 0, 32), (64, 0, 32)],
)
def test_sectors_of_a_request(stride, offset, sectors):
    launched = count("strided_read", stride, offset=offset)
    distinct = 4 if stride == 0 else 128
    assert launched.reads == (32 * sectors, 32 * sectors, distinct)
    assert launched.writes == (128, 128, 128)


@pytest.mark.parametrize(("lanes", "sectors"), [(0, 0), (1, 1), (8, 1), (9, 2), (31, 4)])
def test_requests_that_some_lanes_take_no_part_in(lanes, sectors):
    launched = count("some_lanes", lanes)
    assert launched.reads == launched.writes == (32 * sectors, 32 * sectors, 4 * lanes)


def test_accesses_of_16_bytes():
    launched = count("wide_copy")
    assert launched.reads == launched.writes == (512, 512, 512)
    assert count("wide_copy", offset=4).reads == (17 * 32, 17 * 32, 512)


def test_what_caches_could_save():
    launched = count("repeated_read", 3)
    assert launched.blocks == 2
    assert launched.reads == (2 * 3 * 128, 2 * 128, 128)
    assert launched.sector_bytes == 2 * 3 * 128 + 2 * 128


def test_asynchronous_copies():
    launched = count("asynchronous_read")
    assert launched.reads == (512, 512, 512)
    written, read = launched.shared
    assert (written.requests, written.wavefronts, written.fewest_wavefronts) == (1, 4, 4)
    # Every fourth word: four lanes a bank.
    assert (read.requests, read.wavefronts, read.fewest_wavefronts, read.worst_degree) == (1, 4, 1, 4)


@pytest.mark.parametrize(
    ("width", "stride", "wavefronts", "fewest"),
    [
        # 2 bytes: neighbours share a word.
        (2, 1, 1, 1),
        (2, 2, 1, 1),
        (2, 4, 2, 1),
        # 4 bytes.
        (4, 1, 1, 1),
        (4, 2, 2, 1),
        (4, 3, 1, 1),
        (4, 8, 8, 1),
        (4, 32, 32, 1),
        (4, 33, 1, 1),
        # 8 bytes: half a warp at a time.
        (8, 1, 2, 2),
        (8, 2, 4, 2),
        (8, 16, 32, 2),
        # 16 bytes: a quarter.
        (16, 1, 4, 4),
        (16, 2, 8, 4),
        (16, 8, 32, 4),
        (16, 9, 4, 4),
    ],
)
def test_bank_conflicts(width, stride, wavefronts, fewest):
    (access,) = count(f"strided_shared_{width}", stride).shared
    assert (access.requests, access.wavefronts, access.fewest_wavefronts) == (1, wavefronts, fewest)


def test_one_word_for_all_lanes_is_no_conflict():
    (access,) = count("strided_shared_4", 0).shared
    assert (access.wavefronts, access.fewest_wavefronts) == (1, 1)


@pytest.mark.parametrize(("pitch", "degree"), [(16, 1), (32, 2), (48, 1), (64, 4), (128, 8), (144, 1)])
def test_rows_of_matrices(pitch, degree):
    (access,) = count("matrix_rows", pitch).shared
    assert (access.wavefronts, access.fewest_wavefronts, access.worst_degree) == (4 * degree, 4, degree)


def test_a_swizzle_removes_conflicts_and_the_place_of_those_left_is_told():
    assert count("swizzled_rows", 1).excess_wavefronts == 0
    plain = count("swizzled_rows", 0)
    assert plain.excess_wavefronts == 4 * (4 - 1)
    (conflict,) = plain.conflicts
    assert conflict.place.startswith("tests/emulator/kernels/traffic.cu:")


def test_lanes_that_take_turns_make_requests_of_their_own():
    (access,) = count("uneven_rounds").shared
    assert (access.requests, access.wavefronts) == (4, 4)


def test_launches_are_told_apart_and_named():
    with shim("count"):
        launch("wide_copy", floats(1024), floats(2048))
        launch("strided_read", floats(1024), floats(2048), 1)
        first, second = counters()
    assert "wide_copy_kernel" in first.kernel
    assert "strided_read_kernel" in second.kernel
    with shim("count"):
        assert counters() == []


def test_other_variants_count_nothing():
    with shim("race"):
        launch("wide_copy", np.zeros(1024, np.float32), floats(2048))
        assert counters() == []
