"""The benchmark of parity: a whole quick run, and the table that the page gets."""

import pytest

from benchmarks import parity
from benchmarks.parity_cases import PEFT_CASES, Errors
from benchmarks.report import render
from benchmarks.result import read_results


@pytest.mark.slow
def test_a_quick_run_is_rendered(tmp_path):
    parity.main(["--quick", "--out", str(tmp_path / "results" / "parity.json")])
    (result,) = read_results(tmp_path / "results")
    peft, hub = result.tables
    assert [row[0] for row in peft.rows] == list(PEFT_CASES)
    assert len(hub.rows) >= 10
    page = render([result], tmp_path, relative_to=tmp_path)
    header, rule, row = page[page.index("| kind and head") :].splitlines()[:3]
    assert header.count("|") == rule.count("|") == row.count("|") == 5
    assert "e-0" in row  # an error by its power of ten, not rounded to zero


def test_an_error_above_the_bar_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "peft_references", lambda *_: iter(()))
    monkeypatch.setattr(
        parity, "largest_errors", lambda _, __, names, ___: dict.fromkeys(names, Errors(2e-4, 1))
    )
    with pytest.raises(SystemExit):
        parity.main(["--quick", "--out", str(tmp_path / "parity.json")])
