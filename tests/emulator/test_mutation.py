"""Dropped synchronizations: the schedules alone miss each, and so does the race check alone."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.harness import sites
from emulator.mutation import assert_every_site_matters, surviving_sites
from emulator.shim import floats, launch, shim

CASES = {
    "reverse": (0, lambda x: x[::-1]),
    "shift": (3, lambda x: np.minimum(x + 3, len(x))),
    "exchange_in_warp": (0, lambda x: x.reshape(-1, 2)[:, ::-1].ravel()),
    "exchange_in_half": (0, lambda x: x.reshape(2, 16)[:, ::-1].ravel()),
    "pipeline": (6, lambda x: np.roll(x.reshape(6, 64, 4).sum(2), -1, axis=1).ravel()),
}
SIZES = {"exchange_in_half": (32, 32), "pipeline": (1536, 384)}


def run(kernel):
    parameter, reference = CASES[kernel]
    num_inputs, num_outputs = SIZES.get(kernel, (128, 128))
    source = floats(num_inputs)
    output = launch(kernel, np.full(num_outputs, np.nan, np.float32), source, parameter)
    np.testing.assert_array_equal(output, reference(source))


def sites_of(kernel):
    with shim():
        run(kernel)
        return sites()


def fails(kernel, **settings):
    with shim(**settings):
        try:
            run(kernel)
        except (AssertionError, RuntimeError):
            return True
    return False


@pytest.mark.parametrize(
    ("kernel", "kinds"),
    [
        ("reverse", ["barrier"]),
        ("shift", ["barrier", "barrier"]),
        ("exchange_in_warp", ["warp"]),
        ("pipeline", ["copy wait", "barrier"]),
    ],
)
def test_sites_are_known_by_kind_and_count(kernel, kinds):
    found = sites_of(kernel)
    assert [site.kind for site in found] == kinds
    rounds = {"shift": 3, "pipeline": 6}.get(kernel, 1)
    threads = 64 if kernel == "pipeline" else 128
    assert all(site.count == rounds * threads for site in found)
    assert len({site.line for site in found}) == len(kinds)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kernel", CASES)
def test_every_random_schedule_misses_every_site(kernel, seed):
    for site in sites_of(kernel):
        assert fails(kernel, order="random", seed=seed, dropped=[site]), site


@pytest.mark.parametrize("kernel", CASES)
def test_the_race_check_misses_every_barrier(kernel):
    for site in sites_of(kernel):
        if site.kind != "copy wait":  # no race: the data is not there yet, which only the NaN tell
            assert fails(kernel, variant="race", order="in order", dropped=[site]), site


def test_one_order_is_not_enough():
    """In order nobody overtakes the one who reads what he will write; in reverse nobody reads too early."""
    read_after_write, write_after_read = sites_of("shift")
    assert fails("shift", order="in order", dropped=[read_after_write])
    assert not fails("shift", order="in order", dropped=[write_after_read])
    assert not fails("shift", order="reverse", dropped=[read_after_write])
    assert fails("shift", order="reverse", dropped=[write_after_read])


@pytest.mark.parametrize("seed", range(5))
def test_random_orders_let_a_warp_run_far_ahead(seed):
    """Two sums through one row: wrong only if a warp's second comes before another has read the first."""
    reference = np.repeat((8 * floats(128).sum() + 4 * 32) / 4, 128)
    with shim(order="random", seed=seed):
        assert not np.array_equal(launch("two_sums", np.zeros(128, np.float32), floats(128), 1), reference)


def test_assert_every_site_matters():
    assert_every_site_matters(*(lambda kernel=kernel: run(kernel) for kernel in CASES), environment=shim)


def test_a_barrier_too_many_survives():
    def run_it():
        output = launch("one_too_many", np.zeros(128, np.float32), floats(128))
        np.testing.assert_array_equal(output, floats(128)[::-1])

    assert [site.kind for site in surviving_sites(run_it, environment=shim)] == ["barrier", "barrier"]
    with pytest.raises(
        AssertionError, match=r"nothing fails without .*\n  barrier at tests/emulator/kernels"
    ):
        assert_every_site_matters(run_it, environment=shim)
    assert_every_site_matters(run_it, environment=shim, ignored=lambda site: "meetings" in site.file)


def test_a_kernel_that_is_wrong_to_begin_with_is_not_mutated():
    with pytest.raises(AssertionError):
        surviving_sites(lambda: np.testing.assert_array_equal(1, 2), environment=shim)
