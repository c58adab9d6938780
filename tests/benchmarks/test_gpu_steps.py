"""A step of the check: what its program's end means, and that nothing runs beyond its limit."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.steps import CheckStep, Program, check_steps, run_step


def step_of(code: str, limit: float = 60.0) -> CheckStep:
    return CheckStep("a step", "Is it?", limit, lambda: Program([sys.executable, "-c", code]))


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("print('first'); print('last')", "passed"),
        ("print('last'); raise SystemExit(77)", "skipped"),
        ("print('last'); raise SystemExit(1)", "failed"),
    ],
)
def test_exit_status_decides(code: str, outcome: str) -> None:
    step = run_step(step_of(code), time.monotonic() + 60)
    assert step.outcome == outcome
    assert step.detail.splitlines()[0] == "last"


def test_a_crash_is_a_failure_and_its_output_is_kept() -> None:
    step = run_step(step_of("import os; print('before', flush=True); os.abort()"), time.monotonic() + 60)
    assert step.outcome == "failed" and "before" in step.detail


def test_beyond_the_limit_all_that_was_started_is_killed(tmp_path: Path) -> None:
    """Also a grandchild, which holds the pipe open."""
    code = (
        "import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', "
        f"'import time; time.sleep(600)']); open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); "
        "print('started', flush=True); time.sleep(600)"
    )
    step = run_step(step_of(code, limit=3.0), time.monotonic() + 60)
    assert step.outcome == "failed" and "did not end within 3 s; last line: started" in step.detail
    process = Path("/proc") / (tmp_path / "child").read_text() / "status"
    time.sleep(0.2)
    assert not process.exists() or "zombie" in process.read_text()


def test_no_program_is_a_skipped_step_and_no_time_a_failed_one() -> None:
    missing = CheckStep("a step", "Is it?", 60, lambda: "NOT CHECKED: nothing here")
    assert run_step(missing, time.monotonic() + 60).outcome == "skipped"
    assert run_step(step_of("pass"), time.monotonic() - 1).outcome == "failed"


def test_steps_on_a_gpu_are_those_of_the_dry_run_and_triton() -> None:
    names = [step.name for step in check_steps(is_dry=True)]
    assert [step.name for step in check_steps(is_dry=False)] == ["triton tests", *names]
