"""Order of interleaved measurements, and bootstrap intervals against scipy's."""

from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest

from hmi_engine.demo.environment import describe_machine, installed_versions
from hmi_engine.demo.timing import interleave, median, median_interval, ratio_interval


def test_interleave_rotates_the_order_and_leaves_warm_up_out() -> None:
    calls: list[str] = []
    numbers: list[int] = []
    ticks: list[None] = []

    def record(name: str) -> Callable[[int], None]:
        def call(number: int) -> None:
            calls.append(name)
            numbers.append(number)

        return call

    seconds = interleave(
        {name: record(name) for name in "abc"},
        4,
        warm_up=2,
        on_repetition=lambda: ticks.append(None),
    )
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"]
    assert numbers == [number for number in range(6) for _ in "abc"]
    assert len(ticks) == 6
    assert all(sample >= 0 for samples in seconds.values() for sample in samples)


def test_median_interval_agrees_with_scipy() -> None:
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    samples = np.random.default_rng(1).gamma(2.0, size=40)
    expected = bootstrap((samples,), np.median, method="percentile", random_state=2).confidence_interval
    low, high = median_interval(list(samples))
    assert low <= median(list(samples)) <= high
    assert low == pytest.approx(expected.low, rel=0.08)
    assert high == pytest.approx(expected.high, rel=0.08)


def test_ratio_of_proportional_samples_is_exact() -> None:
    samples = [1.0, 2.0, 3.5, 9.0]
    assert ratio_interval([3 * sample for sample in samples], samples) == pytest.approx((3.0, 3.0))
    with pytest.raises(ValueError, match="pairs"):
        ratio_interval([1.0], samples)


def test_one_sample_is_its_own_interval() -> None:
    assert median_interval([2.0]) == (2.0, 2.0)


def test_environment_names_what_ran() -> None:
    machine, versions = describe_machine(), installed_versions()
    assert machine.cores >= 1 and machine.threads >= 1 and machine.cpu
    for module, package in [("torch",) * 2, ("duckdb",) * 2, ("zstandard",) * 2, ("faiss", "faiss-cpu")]:
        installed = import_module(module).__version__
        assert versions.packages[package].startswith(installed.partition("+")[0])
    assert type(machine).model_validate_json(machine.model_dump_json()) == machine
