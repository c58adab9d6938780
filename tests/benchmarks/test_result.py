"""The result format: what follows from raw samples, and that files come back as they were written."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from benchmarks.recorded_command import recorded_command
from benchmarks.result import BenchmarkResult, Case, Curve, Quantity, Ratio, System, Table, read_results
from hmi_engine.demo.environment import describe_machine, installed_versions


def make_result(name: str = "mixed", *, is_quick: bool = False) -> BenchmarkResult:
    systems = [
        System.of(
            label, f"set-up of {label}", [0.1 * factor, 0.2 * factor, 0.3 * factor], [30, 60, 120], "texts"
        )
        for factor, label in enumerate(("HMI", "peer", "other peer", "last peer"), start=1)
    ]
    return BenchmarkResult(
        name=name,
        question="Is it fast?",
        command="python -m benchmarks.mixed",
        is_quick=is_quick,
        machine=describe_machine(),
        versions=installed_versions(),
        settings={"rank": 16, "ranks": [8, 64], "tables": {"a": 1000}},
        notes=("A note.",),
        cases=(
            Case(
                name="a case",
                settings={"tenants": 32},
                systems=tuple(systems),
                ratios=tuple(Ratio.of(systems[0], other) for other in systems[1:]),
            ),
        ),
        quantities=(Quantity(name="bigrams found", value=0.625, unit="share"),),
        curves=(
            Curve(
                figure="hits", name="bigrams", x_label="tokens", y_label="share", x=(10, 100), y=(0.25, 0.5)
            ),
        ),
    )


def test_rate_is_the_median_of_work_per_second() -> None:
    system = System.of("s", "", [0.5, 0.1, 0.2], [10, 10, 30], "texts")
    assert system.rate.value == np.median([20.0, 100.0, 150.0])
    assert system.rate.low == 20.0
    assert system.rate.high == 150.0


def test_ratio_of_rates_not_of_times() -> None:
    fast = System.of("fast", "", [1.0, 2.0, 4.0], [1, 2, 4], "texts")
    slow = System.of("slow", "", [3.0, 6.0, 12.0], [1, 2, 4], "texts")
    ratio = Ratio.of(fast, slow)
    assert (ratio.times.value, ratio.times.low, ratio.times.high) == pytest.approx((3.0, 3.0, 3.0))


def test_tables_in_words() -> None:
    table = Table(
        title="scores", columns=("way", "F1", "texts"), rows=(("short", 0.123456, 12), ("long", None, 3))
    )
    result = make_result().model_copy(update={"tables": (table, table)})
    assert result.table_lines() == 2 * ["scores", "way  F1  texts", "short  0.1235  12", "long  -  3"]


def test_result_comes_back_from_its_file(tmp_path: Path) -> None:
    results = [make_result("kernels"), make_result("mixed")]
    for result in reversed(results):
        result.write(tmp_path / "results" / f"{result.name}.json")
    assert read_results(tmp_path / "results") == results
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["kernels.json", "mixed.json"]


def test_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"name": "odd"}')
    with pytest.raises(ValidationError, match="question"):
        read_results(tmp_path)


def test_a_command_names_no_folder_of_the_machine() -> None:
    argv = [
        "--data",
        "/home/me/sets/",
        "--distilled",
        "2=/home/me/k2",
        "--out",
        "results/a.json",
        "--only",
        "a=b/c",
    ]
    expected = "python -m benchmarks.gpu.check --data sets --distilled 2=k2 --out results/a.json --only a=b/c"
    assert recorded_command("gpu.check", argv) == expected
