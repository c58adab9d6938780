"""The check and the benchmark of the GPU run end to end without one, and then time nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from emulator.harness import emulated

ROOT = Path(__file__).parents[2]


def run_dry(name: str, output: Path, *options: str) -> dict:
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--dry", "--output", str(output), *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(output.read_text())


@pytest.mark.slow
def test_benchmark(tmp_path: Path) -> None:
    result = run_dry("bench", tmp_path / "bench.json", "--quick")
    assert result["dry"] and not result["failures"] and not result["left_out"]
    assert {case["family"] for case in result["cases"]} == {
        "lora",
        "bottleneck",
        "vectors",
        "lookup",
        "merge",
        "copies",
    }
    systems = [system for case in result["cases"] for system in case["systems"]]
    assert not [system["name"] for system in systems if system["skipped"]]
    for system in systems:
        assert system["eager"] is None and system["graph"] is None and system["host_microseconds"] is None
    assert result["peaks"] is None and not result["quantities"]


@pytest.mark.slow
def test_quick_check(tmp_path: Path) -> None:
    with emulated("plain"):  # compiled here, if nobody has yet: that takes longer than steps may
        pass
    result = run_dry("check", tmp_path / "check.json", "--quick")
    outcomes = {step["name"]: step["outcome"] for step in result["steps"]}
    assert outcomes == {"memory": "passed", "streams": "passed"}


@pytest.mark.slow
def test_serving(tmp_path: Path) -> None:
    result = run_dry("serving", tmp_path / "serving.json")
    [case] = result["cases"]
    assert len(case["systems"]) == 6 and not result["quantities"]


@pytest.mark.slow
def test_generation(tmp_path: Path) -> None:
    result = run_dry("generation", tmp_path / "generation.json")
    [case] = result["cases"]
    assert len(case["systems"]) == 4 and len(result["curves"]) == 4


@pytest.mark.slow
def test_check(tmp_path: Path) -> None:
    result = run_dry("check", tmp_path / "check.json")
    assert result["dry"]
    assert not [step for step in result["steps"] if step["outcome"] == "failed"]
    skipped = {step["name"] for step in result["steps"] if step["outcome"] == "skipped"}
    assert skipped <= {"machine code"}
