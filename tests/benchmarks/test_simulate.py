"""The benchmark of the simulation runs to a result that says what is simulated."""

from __future__ import annotations

from pathlib import Path

import pytest

REASON = "the benchmark needs the extra: bench"
pytest.importorskip("simpy", reason=REASON)
pytest.importorskip("psutil", reason=REASON)
simulate = pytest.importorskip("benchmarks.simulate", reason=REASON)
from benchmarks.report import render  # noqa: E402
from benchmarks.result import read_results  # noqa: E402
from benchmarks.simulation.validation import Agreement  # noqa: E402


def test_errors_are_shares_of_what_was_measured() -> None:
    high = Agreement("run", "p50", runs=[1.0, 2.0, 3.0], predictions=[2.5, 2.4, 9.0])
    assert (high.measured, high.predicted) == (2.0, 2.5)
    assert high.error == pytest.approx(0.25)
    assert high.is_between_runs
    low = Agreement("run", "p50", runs=[2.0], predictions=[1.0])
    assert low.error == pytest.approx(-0.5)
    assert not low.is_between_runs


@pytest.mark.slow
def test_the_quick_benchmark_runs(tmp_path: Path) -> None:
    """Costs are measured, predictions made and compared, and GPUs simulated, all in small."""
    out = tmp_path / "results" / "simulate.json"
    simulate.main(["--quick", "--out", str(out)])
    [result] = read_results(out.parent)
    titles = [table.title for table in result.tables]
    assert sum("Simulated, not measured" in title for title in titles) == 2
    agreements = result.tables[0].rows
    assert {"measured", "predicted", "error, %"} < set(result.tables[0].columns)
    for name, measured, least, most, predicted, error in agreements:
        assert least <= measured <= most, name
        assert error == pytest.approx(100 * (predicted / measured - 1)), name
        assert measured > 0 and predicted > 0
    assert all(row[1] > 0 for table in result.tables[1:3] for row in table.rows)
    figures = tmp_path / "figures"
    figures.mkdir()
    page = render([result], figures, relative_to=tmp_path)
    assert "Simulated, not measured" in page and "simulate-gpus.svg" in page
