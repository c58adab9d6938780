"""The page's section about the GPU, from what check and bench wrote; dry results never come into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.result import (
    BenchResult,
    CheckResult,
    Device,
    GpuCase,
    GpuSystem,
    Peaks,
    Speed,
    read_bench,
    read_check,
)

__all__ = ["gpu_section"]

TITLE = "## How fast are the kernels on a GPU?"
NOTHING = "No GPU run has ended in full yet; what a shorter one has measured is in [gpu.md](gpu.md)."
READY = (
    "`make gpu-check` and `make gpu-bench` are ready for a machine with a GPU; without one they run dry: on "
    "the CPU, by emulator and interpreter, timing nothing."
)
FAMILIES = {
    "lora": "LoRA",
    "bottleneck": "Bottleneck adapters with layer norm",
    "vectors": "Scaling vectors",
    "lookup": "PLOT look-up",
    "merge": "PLOT merge",
    "copies": "Copies from host memory",
}


def gpu_section(folder: Path) -> list[str]:
    """Lines of Markdown from the folder's ``bench.json`` and ``check.json``.

    Raises pydantic's ValidationError for a file of another format.
    """
    bench, check = read_bench(folder), read_check(folder)
    lines = [TITLE, ""]
    if bench is None or bench.dry or bench.device is None:
        lines += [f"{NOTHING} {READY}", ""]
    else:
        lines += _bench_lines(bench, bench.device)
    if check is not None and not check.dry and check.device is not None:
        lines += _check_lines(check, check.device)
    return lines


def _bench_lines(bench: BenchResult, device: Device) -> list[str]:
    lines = []
    if bench.is_quick:
        lines += [
            "**These figures are of a `--quick` run, which proves that it works and measures little.**",
            "",
        ]
    lines += [f"Command: `{bench.command}`, commit {bench.commit}  ", f"{_device(device)}  "]
    if bench.peaks is not None:
        lines.append(_peaks(bench.peaks))
    lines += ["", *(f"- {note}" for note in bench.notes), ""]
    for family, title in FAMILIES.items():
        if cases := [case for case in bench.cases if case.family == family]:
            lines += [f"### {title}", "", *_table(cases), ""]
    if bench.quantities:
        lines += ["| what | value |", "| --- | ---: |"]
        lines += [f"| {item.name} | {item.value:.0%} |" for item in bench.quantities] + [""]
    if bench.left_out:
        lines += [f"Left out for want of time: {len(bench.left_out)} cases.", ""]
    if bench.failures:
        lines += ["**Wrong or failed:**", "", *(f"- {failure}" for failure in bench.failures), ""]
    return lines


def _device(device: Device) -> str:
    clocks = ", ".join(f"{name} {value}" for name, value in device.clocks.items())
    return (
        f"Device: {device.name} (compute capability {device.compute_capability}, "
        f"{device.multiprocessors} multiprocessors, {device.memory_bytes / 2**30:.0f} GiB), driver "
        f"{device.driver}, kernels by CUDA {device.cuda_of_kernels}, torch's CUDA {device.cuda_of_torch}, "
        f"triton {device.triton}; {clocks}"
    )


def _peaks(peaks: Peaks) -> str:
    text = (
        f"Peaks, measured in the same run: {peaks.measured_bandwidth / 1e9:,.0f} GB/s, "
        f"{peaks.measured_flops / 1e12:,.0f} TFLOP/s"
    )
    if peaks.data_sheet_bandwidth is None or peaks.data_sheet_flops is None:
        return f"{text}; its data sheet is not known here"
    return (
        f"{text}; by its data sheet {peaks.data_sheet_bandwidth / 1e9:,.0f} GB/s, "
        f"{peaks.data_sheet_flops / 1e12:,.0f} TFLOP/s"
    )


def _table(cases: Sequence[GpuCase]) -> list[str]:
    """A row for each case: our time, and how many times as long each other system took."""
    others = list(dict.fromkeys(system.name for case in cases for system in case.systems[1:]))
    header = [
        "case",
        "us",
        "GB/s",
        "TFLOP/s",
        "of the roofline",
        *(f"{name}: times as long" for name in others),
    ]
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    for case in cases:
        ours = _best(case.systems[0])
        if ours is None:
            reason = case.systems[0].skipped or "not timed"
            lines.append(f"| {case.name} | {reason} |{' |' * (len(header) - 2)}")
            continue
        share = "" if ours.share_of_roofline is None else f"{ours.share_of_roofline:.0%}"
        us = ours.microseconds
        cells = [f"{us.value:.1f} ({us.low:.1f} to {us.high:.1f})", f"{ours.gigabytes_per_second:,.0f}"]
        cells += [f"{ours.teraflops_per_second:.1f}", share, *_times(case, others, ours)]
        lines.append(f"| {case.name} | {' | '.join(cells)} |")
    return lines


def _times(case: GpuCase, others: Sequence[str], ours: Speed) -> list[str]:
    systems = {system.name: system for system in case.systems}
    speeds = [_best(systems[name]) if name in systems else None for name in others]
    return [
        "" if each is None else f"{each.microseconds.value / ours.microseconds.value:.2f}" for each in speeds
    ]


def _best(system: GpuSystem) -> Speed | None:
    """The time in a graph, where one could be captured: it holds nothing of the host."""
    return system.graph or system.eager


def _check_lines(check: CheckResult, device: Device) -> list[str]:
    lines = ["### Are they right there?", ""]
    lines += [f"Command: `{check.command}`, commit {check.commit}  ", _device(device), ""]
    lines += ["| question | answer | seconds | what was seen |", "| --- | --- | ---: | --- |"]
    for step in check.steps:
        detail = step.detail.splitlines()[0].replace("|", "\\|") if step.detail else ""
        lines.append(f"| {step.question} | {step.outcome} | {step.seconds:.0f} | {detail} |")
    return [*lines, ""]
