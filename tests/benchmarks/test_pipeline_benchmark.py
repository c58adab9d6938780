"""The benchmark of the pipeline runs to a result, and its picture shows a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

REASON = "the benchmark needs the extra: bench"
pipeline = pytest.importorskip("benchmarks.pipeline", reason=REASON)
read_results = pytest.importorskip("benchmarks.result", reason=REASON).read_results
trace_figure = pytest.importorskip("benchmarks.trace_figure", reason=REASON)


@pytest.mark.slow
def test_the_quick_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "results" / "pipeline.json"
    pipeline.main(["--quick", "--out", str(out)])
    [result] = read_results(out.parent)
    assert [case.name for case in result.cases] == ["file cache", "20 ms, 100 MB/s"]
    rows = {row[0]: dict(zip(result.tables[0].columns, row, strict=True)) for row in result.tables[0].rows}
    slow = rows["20 ms, 100 MB/s: 1 in flight"]
    assert slow["hidden, %"] == 0 and slow["miss ratio, %"] > 50
    assert slow["fetch, ms a request"] > rows["file cache: 1 in flight"]["fetch, ms a request"]
    assert rows["file cache: all in memory"]["miss ratio, %"] == 0


def test_a_trace_is_drawn(tmp_path: Path) -> None:
    spans = [("fetch", 0, 100, {"batch": 1}), ("compute", 100, 300, {"batch": 1}), ("layer 3", 120, 100, {})]
    events = [
        {"ph": "X", "name": name, "ts": 1e3 * start, "dur": 1e3 * length, "args": args}
        for name, start, length, args in spans
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [{"ph": "M"}, *events]}))
    path = trace_figure.draw_trace(tmp_path / "trace.json", tmp_path / "figure.svg", seconds=0.4)
    assert path.read_text().count("#2a6f97") >= 1
