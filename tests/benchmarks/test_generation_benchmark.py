"""The generation benchmark runs, checks that all systems do the same work, and reports what it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

REASON = "the benchmark needs the extra: bench"
pytest.importorskip("psutil", reason=REASON)
generation = pytest.importorskip("benchmarks.generation", reason=REASON)
from benchmarks.report import render  # noqa: E402
from benchmarks.result import read_results  # noqa: E402
from hmi_engine.errors import HmiError  # noqa: E402


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    generation.main(["--quick", "--out", str(tmp_path / "generation.json")])
    (result,) = read_results(tmp_path)
    (case,) = result.cases
    assert {system.name for system in case.systems} == {
        generation.OURS,
        generation.PLAIN,
        generation.ONE,
        generation.MIXED,
    }
    quantities = {quantity.name: quantity.value for quantity in result.quantities}
    half, whole = (value for name, value in quantities.items() if name.startswith("keys and values"))
    assert half == whole / 2
    assert all(math.isfinite(row[1]) and row[1] > 0 for row in result.tables[0].rows)
    (tmp_path / "figures").mkdir()
    page = render([result], tmp_path / "figures", relative_to=tmp_path)
    assert generation.MIXED in page and "--quick" in page


def test_other_work_is_refused() -> None:
    systems = {"one": lambda prompts: [[1]] * len(prompts), "other": lambda prompts: [[2]] * len(prompts)}
    with pytest.raises(HmiError, match="one and other"):
        generation.check_same_work(systems, [("tenant", [1])])
