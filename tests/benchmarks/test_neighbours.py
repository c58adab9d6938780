"""The benchmark of other threads runs, and leaves Python's settings as they were."""

import sys

import pytest
import torch

neighbours = pytest.importorskip("benchmarks.neighbours", reason="the benchmark needs the extra: bench")
from benchmarks.result import read_results  # noqa: E402


@pytest.mark.slow
def test_quick_run(tmp_path, monkeypatch) -> None:
    # Others slow every batch down to a second, which is what they are there for.
    every = neighbours._neighbours
    monkeypatch.setattr(neighbours, "_neighbours", lambda *given: every(*given)[:2])
    before = sys.getswitchinterval(), torch.get_num_threads()
    neighbours.main(["--quick", "--out", str(tmp_path / "neighbours.json")])
    assert (sys.getswitchinterval(), torch.get_num_threads()) == before
    (result,) = read_results(tmp_path)
    (table,) = result.tables
    assert len(table.rows) == 2
    assert all(row[1] > 0 and row[2] > 0 for row in table.rows)
