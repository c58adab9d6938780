"""Runs the steps of the check, some at a time, and gathers their answers."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

from rich.console import Console
from rich.progress import Progress

from benchmarks.gpu.options import Options
from benchmarks.gpu.platform import choose_platform, current_commit, describe_device
from benchmarks.gpu.result import CheckResult, Step
from benchmarks.gpu.steps import check_steps, run_step
from hmi_engine.demo.environment import describe_machine, installed_versions

__all__ = ["check"]

AT_A_TIME = max(2, min(8, (os.cpu_count() or 1) // 2))
"""Most of a step is compiling and starting up, on the host."""
QUICK_STEPS = ("memory", "streams")
_COLORS = {"passed": "green", "failed": "red", "skipped": "yellow"}


def check(options: Options, console: Console) -> CheckResult:
    """All steps on the GPU, or in dry runs on the CPU."""
    platform = choose_platform(is_dry=options.is_dry)
    steps = _run_steps(options, console)
    return CheckResult(
        command=options.command,
        commit=current_commit(),
        dry=options.is_dry,
        device=describe_device(platform),
        machine=describe_machine(),
        versions=installed_versions(),
        steps=tuple(steps),
    )


def _run_steps(options: Options, console: Console) -> list[Step]:
    """All steps, or the quick ones; in their own order, whichever ended first."""
    steps = check_steps(is_dry=options.is_dry)
    if options.is_quick:
        steps = [step for step in steps if step.name in QUICK_STEPS]
    ends_at = time.monotonic() + options.seconds
    with ThreadPoolExecutor(AT_A_TIME) as executor, Progress(console=console, transient=True) as progress:
        task = progress.add_task("steps", total=len(steps))
        running: list[Future[Step]] = [executor.submit(run_step, step, ends_at) for step in steps]
        for ended in as_completed(running):
            _print(ended.result(), console)
            progress.advance(task)
    return [ended.result() for ended in running]


def _print(step: Step, console: Console) -> None:
    console.print(f"{step.name}: {step.outcome} ({step.seconds:.1f} s)", style=_COLORS[step.outcome])
    console.print(f"  {step.detail}", highlight=False, markup=False)
