"""The steps of the check: programs, their limits of time, and how their answers are read."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.checks import SKIPPED
from benchmarks.gpu.options import ROOT
from benchmarks.gpu.result import Step

__all__ = ["CheckStep", "Program", "check_steps", "run_step"]

DEVICE_TESTS = ("tests/kernels/cuda", "tests/kernels/test_vectors.py")
DRY_TESTS = (
    "tests/kernels/cuda/test_torch_compile.py",
    "tests/kernels/cuda/test_plot.py::test_lookup",
    "tests/kernels/triton/test_dispatch.py",
)
TRITON_TESTS = ("tests/kernels/triton",)
ENGINE_TESTS = ("tests/devices/test_gpu.py", "tests/devices/test_gpu_decoder.py")
DRY_ENGINE_TESTS = ("tests/devices/test_deferred.py::test_each_mistake_is_seen",)
SANITIZER_ERROR = 99
OUTPUT_SHOWN = 4000
"""Characters of the output of a step that failed."""
SANITIZERS = {"memcheck": "sanitize", "racecheck": "race"}
"""compute-sanitizer's tools, and the variants of the emulator that look for the same."""


@dataclass(frozen=True)
class Program:
    """What a step runs; ``read`` makes the answer's detail out of its output, given the exit status."""

    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[str], str] | None = None


@dataclass(frozen=True)
class CheckStep:
    """A step before it is run; ``make`` gives the program, or why there is none here."""

    name: str
    question: str
    limit_seconds: float
    make: Callable[[], Program | str]


def check_steps(*, is_dry: bool) -> list[CheckStep]:
    """All steps, the longest first."""
    dry = ["--dry"] if is_dry else []

    def module(name: str) -> Callable[[], Program]:
        return lambda: Program([sys.executable, "-m", f"benchmarks.gpu.checks.{name}", *dry])

    tests = "a selection of the kernels' tests" if is_dry else "all tests of the CUDA kernels"
    steps = [
        CheckStep(
            "tests",
            f"Do {tests} pass?",
            210,
            lambda: _pytest(DRY_TESTS) if is_dry else _pytest(DEVICE_TESTS, processes=6),
        ),
        *(
            CheckStep(tool, f"Does {what} find nothing?", 150, _sanitizer(tool, is_dry=is_dry))
            for tool, what in (("memcheck", "a watch on every access"), ("racecheck", "a watch for races"))
        ),
        CheckStep(
            "engine",
            "Does an engine answer as on the CPU, with batches in flight and tenants that come and go?",
            150,
            lambda: _pytest(DRY_ENGINE_TESTS if is_dry else ENGINE_TESTS),
        ),
        CheckStep("graphs", "Do CUDA graphs of all ops replay on other inputs?", 120, module("graphs")),
        CheckStep("streams", "Do copies and kernels keep the order of events?", 60, module("streams")),
        CheckStep("memory", "Does everything work after memory has run out?", 60, module("memory")),
        CheckStep("compile", "Does torch.compile take every op?", 120, module("compilation")),
        CheckStep("machine code", "Nothing spilled, tensor cores in use?", 90, module("machine_code")),
    ]
    if not is_dry:
        triton = CheckStep(
            "triton tests",
            "Do the Triton kernels' tests pass?",
            420,
            lambda: _pytest(TRITON_TESTS, processes=4),
        )
        steps.insert(0, triton)
    return steps


def run_step(step: CheckStep, ends_at: float) -> Step:
    """Runs a step within its limit, and before ``ends_at`` (of ``time.monotonic``)."""
    started = time.monotonic()
    limit = min(step.limit_seconds, ends_at - started)
    program = step.make()

    def answer(outcome: str, detail: str) -> Step:
        return Step.model_validate(
            {
                "name": step.name,
                "question": step.question,
                "outcome": outcome,
                "seconds": round(time.monotonic() - started, 1),
                "limit_seconds": step.limit_seconds,
                "detail": detail,
            }
        )

    if isinstance(program, str):
        return answer("skipped", program)
    if limit <= 0:
        return answer("failed", "no time was left for it")
    status, output = _run(program, limit)
    if status is None:
        return answer("failed", f"did not end within {limit:.0f} s; last line: {_last_line(output)}")
    outcome = {0: "passed", SKIPPED: "skipped"}.get(status, "failed")
    detail = (program.read or _last_line)(output)
    return answer(outcome, detail if outcome != "failed" else f"{detail}\n{output[-OUTPUT_SHOWN:]}")


def _run(program: Program, limit_seconds: float) -> tuple[int | None, str]:
    """Exit status and output; None for the status if the program, with all that it started, was killed."""
    started = subprocess.Popen(
        program.command,
        cwd=ROOT,
        env={**os.environ, **program.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with started:
        try:
            output, _ = started.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            # The whole group: a sanitizer's own child would hold the pipe open.
            os.killpg(started.pid, signal.SIGKILL)
            output, _ = started.communicate()
            return None, output
    return started.returncode, output


def _last_line(output: str) -> str:
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")


def _pytest(tests: tuple[str, ...], processes: int = 0) -> Program:
    """The tests in a pytest of their own, on the GPU if there is one.

    More processes share it: worth it where most of the time goes into compiling, or into small calls.
    """
    report = Path(tempfile.mkdtemp(prefix="hmi-gpu-check-")) / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        f"-n{processes}",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    import torch

    device = ["--device", "cuda"] if torch.cuda.is_available() else []

    def read(output: str) -> str:
        detail = _counts(report) or _last_line(output)
        shutil.rmtree(report.parent, ignore_errors=True)
        return detail

    return Program([*command, *device, *tests], read=read)


def _counts(report: Path) -> str:
    """What a JUnit file says in all, "" if there is none."""
    if not report.exists():
        return ""
    suites = list(ElementTree.parse(report).iter("testsuite"))

    def count(key: str) -> int:
        return sum(int(suite.get(key, "0")) for suite in suites)

    failed, skipped = count("failures") + count("errors"), count("skipped")
    return f"{count('tests') - failed - skipped} passed, {failed} failed, {skipped} skipped"


def _sanitizer(tool: str, *, is_dry: bool) -> Callable[[], Program | str]:
    cases = "benchmarks.gpu.sanitized_cases"

    def emulated() -> Program:
        variant = SANITIZERS[tool]
        if variant == "race":
            return Program([sys.executable, "-m", cases, "--emulated", variant])
        code = f"import runpy, sys; sys.argv = ['', '--emulated', {variant!r}]; "
        code += f"runpy.run_module({cases!r}, run_name='__main__')"
        launcher = (
            "import sys; sys.path.insert(0, 'tests'); from emulator.harness import run_sanitized; "
            f"ended = run_sanitized({code!r}); print(ended.stderr[-4000:], ended.stdout); "
            "sys.exit(ended.returncode)"
        )
        return Program([sys.executable, "-c", launcher])

    def on_device() -> Program | str:
        sanitizer = find_sanitizer()
        if sanitizer is None:
            return "NOT CHECKED: compute-sanitizer is neither on PATH nor in CUDA_HOME"
        # Without torch's cache every tensor is an allocation of its own, beyond which nothing may be touched.
        return Program(
            [
                sanitizer,
                "--tool",
                tool,
                "--error-exitcode",
                str(SANITIZER_ERROR),
                sys.executable,
                "-m",
                cases,
            ],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            _sanitizer_summary,
        )

    return emulated if is_dry else on_device


def _sanitizer_summary(output: str) -> str:
    """The line in which compute-sanitizer counts what it found."""
    lines = [line.strip("= \n") for line in output.splitlines() if "SUMMARY" in line]
    return lines[-1] if lines else _last_line(output)


def find_sanitizer() -> str | None:
    """compute-sanitizer of PATH, of the toolkit, or of a package of NVIDIA's."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    places += [Path(home) / "compute-sanitizer" / "compute-sanitizer" for home in homes if home]
    specification = importlib.util.find_spec("nvidia")
    for location in (specification.submodule_search_locations or ()) if specification else ():
        places += sorted(Path(location).glob("*/bin/compute-sanitizer"))
        places += sorted(Path(location).glob("*/compute-sanitizer/compute-sanitizer"))
    return shutil.which("compute-sanitizer") or next((str(place) for place in places if place.exists()), None)
