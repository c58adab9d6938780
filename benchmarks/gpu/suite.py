"""The benchmark's cases, from the most telling on, for as long as there is time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.gpu.adapter_contests import adapter_contest
from benchmarks.gpu.adapter_problem import AdapterShape, Kind
from benchmarks.gpu.contest import Bench, Planned
from benchmarks.gpu.copy_contests import copy_contests, measure_overlap
from benchmarks.gpu.options import Options
from benchmarks.gpu.platform import Platform, choose_platform, current_commit, describe_device
from benchmarks.gpu.plot_contests import plot_contests
from benchmarks.gpu.result import BenchResult, GpuCase, Peaks
from benchmarks.gpu.roofline import data_sheet_peak
from benchmarks.gpu.shapes import adapter_shapes
from benchmarks.gpu.timing import DeviceTimer, measure_peak
from benchmarks.result import Quantity
from hmi_engine.demo.environment import describe_machine, installed_versions

__all__ = ["measure"]

REPETITIONS = 25
QUICK_REPETITIONS = 5
FIRST_SHAPES = 5
"""Of each adapter family, before the other families come."""
NOTES = (
    "A time is that of one call on the device, by events: its operands were not in the cache, its launches "
    "were queued ahead. Graph: one replay of a CUDA graph of the call. Host: for how long a call keeps the "
    "host busy.",
    "Bytes and operations are the least that the call needs (benchmarks/gpu/costs.py), the same for all "
    "systems: bandwidth and FLOP/s are those over the time taken.",
    "The roofline is that of this device as measured in the same run; its data sheet is stated beside it.",
    "Every system's output was compared with a float32 reference before anything was timed.",
)


def _plan(platform: Platform, timer: DeviceTimer | None, is_quick: bool) -> list[Planned]:
    """All cases, the most telling of every family first."""
    kinds: tuple[Kind, ...] = ("lora", "bottleneck", "vectors")
    shapes = [adapter_shapes(kind, is_dry=platform.is_dry, is_quick=is_quick) for kind in kinds]
    first = [shape for family in shapes for shape in family[:FIRST_SHAPES]]
    rest = [shape for family in shapes for shape in family[FIRST_SHAPES:]]
    others = [*plot_contests(platform.device, is_dry=platform.is_dry, is_quick=is_quick)]
    others += copy_contests(platform, is_quick=is_quick)

    def adapters(chosen: Sequence[AdapterShape]) -> list[Planned]:
        return [Planned(each.name, partial(adapter_contest, each, platform.device, timer)) for each in chosen]

    return [*adapters(first), *others, *adapters(rest)]


def _run(bench: Bench, plan: Sequence[Planned], ends_at: float, console: Console, found: _Found) -> None:
    """Runs case after case until the time is over.

    A case that cannot be set up (too little memory, say) is told as a failure; the others go on.
    """
    with Progress(console=console, transient=True) as progress:
        for planned in progress.track(plan, description="cases"):
            if time.monotonic() > ends_at:
                found.left_out.append(planned.name)
                continue
            try:
                found.cases.append(bench.run(planned.make()))
            except Exception as failure:
                bench.failures.append(f"{planned.name}: {type(failure).__name__}: {failure}")
            else:
                console.print(_line(found.cases[-1]), highlight=False)
                found.save()


def _quantities(bench: Bench) -> tuple[Quantity, ...]:
    """What copies and compute have in common; without a GPU nothing is measured."""
    try:
        return measure_overlap(bench.platform)
    except Exception as failure:
        bench.failures.append(f"overlap of copies and compute: {type(failure).__name__}: {failure}")
        return ()


def _line(case: GpuCase) -> str:
    """What was found, in a line a system."""
    lines = [case.name]
    for system in case.systems:
        found = system.skipped or f"agrees to {system.error:.1g}"
        if system.eager is not None:
            speed = system.graph or system.eager
            found = f"{system.eager.microseconds.value:.1f} us, in a graph {speed.microseconds.value:.1f} us"
            found += f", {speed.gigabytes_per_second:.0f} GB/s, {speed.teraflops_per_second:.1f} TFLOP/s"
            if speed.share_of_roofline is not None:
                found += f", {speed.share_of_roofline:.0%} of the roofline"
        lines.append(f"  {system.name}: {found}")
    return "\n".join(lines)


def _peaks(platform: Platform) -> Peaks | None:
    if platform.is_dry:
        return None
    measured = measure_peak(platform.device)
    sheet = data_sheet_peak(torch.cuda.get_device_name(platform.device))
    return Peaks(
        measured_bandwidth=measured.bandwidth,
        measured_flops=measured.flops,
        data_sheet_bandwidth=None if sheet is None else sheet.bandwidth,
        data_sheet_flops=None if sheet is None else sheet.flops,
    )


def measure(options: Options, console: Console) -> BenchResult:
    """Runs every case for which there is time; what was found so far is written after each of them."""
    started = time.monotonic()
    platform = choose_platform(is_dry=options.is_dry)
    with platform.backend("cuda"), platform.own_stream(), torch.inference_mode():
        peaks = _peaks(platform)
        timer = None
        if not platform.is_dry:
            repetitions = QUICK_REPETITIONS if options.is_quick else REPETITIONS
            timer = DeviceTimer(platform.device, repetitions=repetitions)
        bench = Bench(platform, timer, None if peaks is None else peaks.measured())
        found = _Found(bench, options.output, _about(options, platform, peaks))
        _run(bench, _plan(platform, timer, options.is_quick), started + options.seconds, console, found)
    with platform.own_stream():
        found.quantities = _quantities(bench)
    return found.result()


def _about(options: Options, platform: Platform, peaks: Peaks | None) -> BenchResult:
    """A result without cases."""
    return BenchResult(
        command=options.command,
        commit=current_commit(),
        dry=options.is_dry,
        is_quick=options.is_quick,
        device=describe_device(platform),
        machine=describe_machine(),
        versions=installed_versions(),
        peaks=peaks,
        notes=NOTES,
        cases=(),
        left_out=(),
        failures=(),
    )


@dataclass
class _Found:
    """What was found so far."""

    bench: Bench
    output: Path
    about: BenchResult
    cases: list[GpuCase] = field(default_factory=list)
    quantities: tuple[Quantity, ...] = ()
    left_out: list[str] = field(default_factory=list)

    def save(self) -> None:
        """Whoever lends a GPU for minutes may take it back at any time."""
        self.result().write(self.output)

    def result(self) -> BenchResult:
        return self.about.model_copy(
            update={
                "cases": tuple(self.cases),
                "quantities": self.quantities,
                "left_out": tuple(self.left_out),
                "failures": tuple(self.bench.failures),
            }
        )
