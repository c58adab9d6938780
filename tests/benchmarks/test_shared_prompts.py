"""The benchmark of prompts that begin alike runs, and reports what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

REASON = "the benchmark needs the extra: bench"
pytest.importorskip("psutil", reason=REASON)
shared_prompts = pytest.importorskip("benchmarks.shared_prompts", reason=REASON)
from benchmarks.result import read_results  # noqa: E402


def test_a_round_begins_alike_and_no_two_rounds_do() -> None:
    plan = shared_prompts.Plan(3, 8, 2, 1, (0.5,))
    prompts = shared_prompts._rounds(plan, list(range(100)), ["a", "b", "c"])
    first, second = prompts(0), prompts(1)
    assert [name for name, _ in first] == ["a", "b", "c"] and {len(ids) for _, ids in first} == {10}
    assert len({tuple(ids[:8]) for _, ids in first}) == 1 and first[0][1][:8] != second[0][1][:8]
    assert len({tuple(ids[8:]) for _, ids in first + second}) == 6


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    shared_prompts.main(["--quick", "--out", str(tmp_path / "shared_prompts.json")])
    (result,) = read_results(tmp_path)
    assert [len(case.systems) for case in result.cases] == [2, 2]
    # Of 32 + 4 tokens the instruction's, for three tenants of four.
    assert [quantity.value for quantity in result.quantities] == [pytest.approx(32 / 36 * 3 / 4)] * 2
