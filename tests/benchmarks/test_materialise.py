"""The benchmark of row computation: its peer computes the same rows, and it runs to a result."""

from __future__ import annotations

from pathlib import Path

import pytest

REASON = "the benchmark needs the extra: bench"
materialise = pytest.importorskip("benchmarks.materialise", reason=REASON)
read_results = pytest.importorskip("benchmarks.result", reason=REASON).read_results


@pytest.mark.slow
def test_the_quick_benchmark_runs(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialise, "packaged_model", lambda: tiny_bert)
    monkeypatch.setattr(materialise, "QUICK", materialise._Plan(num_rows=300, repetitions=2))
    out = tmp_path / "results" / "materialise.json"
    materialise.main(["--quick", "--out", str(out)])
    [result] = read_results(out.parent)
    assert [case.name for case in result.cases] == ["window 2", "window 3"]
    for case in result.cases:
        assert case.settings == {"rows": 300}
        assert len(case.systems) == 5 and len(case.ratios) == 4
    # Both round to float16: states of a few units differ by at most two of its steps.
    assert all(quantity.value < 0.01 for quantity in result.quantities)
