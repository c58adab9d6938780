"""The page's GPU section: figures of a GPU as they are in the file, and nothing of a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.costs import Cost
from benchmarks.gpu.result import BenchResult, CheckResult, Device, GpuCase, GpuSystem, Peaks, Speed, Step
from benchmarks.gpu.section import NOTHING, gpu_section
from hmi_engine.demo.environment import describe_machine, installed_versions

DEVICE = Device(
    name="NVIDIA H100 80GB HBM3",
    compute_capability="9.0",
    multiprocessors=132,
    memory_bytes=80 << 30,
    l2_bytes=50 << 20,
    driver="580.1",
    cuda_of_torch="13.0",
    cuda_of_kernels="runtime 13.0, driver 13.0",
    triton="3.5",
    clocks={"clocks.sm": "1980 MHz"},
)
PEAKS = Peaks(
    measured_bandwidth=3e12, measured_flops=7e14, data_sheet_bandwidth=3.35e12, data_sheet_flops=9.89e14
)


def bench_result(*, is_dry: bool) -> BenchResult:
    cost = Cost(3_000_000, 0)

    def speed(microseconds: float) -> Speed | None:
        return None if is_dry else Speed.of([microseconds / 1e6] * 3, cost, PEAKS.measured())

    systems = (
        GpuSystem(name="hmi cuda", description="", error=0.0, eager=speed(4), graph=speed(2)),
        GpuSystem(name="torch", description="", error=0.0, eager=speed(6)),
        GpuSystem(name="other", description="", skipped="not here"),
    )
    case = GpuCase(family="lora", name="a case", settings={}, least_bytes=3_000_000, flop=0, systems=systems)
    return BenchResult(
        command="python -m benchmarks.gpu.bench",
        commit="abc",
        dry=is_dry,
        is_quick=False,
        device=None if is_dry else DEVICE,
        machine=describe_machine(),
        versions=installed_versions(),
        peaks=None if is_dry else PEAKS,
        notes=("A note.",),
        cases=(case,),
        left_out=("another case",),
        failures=(),
    )


def check_result(*, is_dry: bool) -> CheckResult:
    step = Step(
        name="graphs",
        question="Right?",
        outcome="failed",
        seconds=3.2,
        limit_seconds=60,
        detail="a | b\nmore",
    )
    return CheckResult(
        command="python -m benchmarks.gpu.check",
        commit="abc",
        dry=is_dry,
        device=None if is_dry else DEVICE,
        machine=describe_machine(),
        versions=installed_versions(),
        steps=(step,),
    )


@pytest.mark.parametrize("has_dry_files", [False, True])
def test_without_a_gpu_no_figure_is_given(tmp_path: Path, has_dry_files: bool) -> None:
    if has_dry_files:
        bench_result(is_dry=True).write(tmp_path / "bench.json")
        check_result(is_dry=True).write(tmp_path / "check.json")
    text = "\n".join(gpu_section(tmp_path))
    assert NOTHING in text
    assert "|" not in text


def test_figures_of_a_gpu(tmp_path: Path) -> None:
    bench_result(is_dry=False).write(tmp_path / "bench.json")
    check_result(is_dry=False).write(tmp_path / "check.json")
    text = "\n".join(gpu_section(tmp_path))
    assert NOTHING not in text
    assert "NVIDIA H100 80GB HBM3" in text and "driver 580.1" in text
    assert "3,000 GB/s, 700 TFLOP/s; by its data sheet 3,350 GB/s, 989 TFLOP/s" in text
    assert "| a case | 2.0 (2.0 to 2.0) | 1,500 | 0.0 | 50% | 3.00 |  |" in text
    assert "Left out for want of time: 1 cases." in text
    assert "| Right? | failed | 3 | a \\| b |" in text
