"""The format of what is found on a GPU; without a GPU (``dry``) it holds no time and no rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from benchmarks.gpu.costs import Cost
from benchmarks.gpu.roofline import Peak, roofline_share
from benchmarks.result import Interval, Quantity
from hmi_engine.demo.environment import Machine, Versions
from hmi_engine.demo.timing import median, median_interval
from hmi_engine.knowledge.atomic import atomic_write

__all__ = [
    "BenchResult",
    "CheckResult",
    "Device",
    "Family",
    "GpuCase",
    "GpuSystem",
    "Peaks",
    "Speed",
    "Step",
    "read_bench",
    "read_check",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Device(_Frozen):
    """The device and the software that drove it; ``clocks`` are nvidia-smi's, as found, in MHz."""

    name: str
    compute_capability: str
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    driver: str
    cuda_of_torch: str
    cuda_of_kernels: str
    triton: str
    clocks: dict[str, str]


class Peaks(_Frozen):
    """The device's best: as measured here by a large copy and a large product, and by its data sheet."""

    measured_bandwidth: float
    measured_flops: float
    data_sheet_bandwidth: float | None
    data_sheet_flops: float | None

    def measured(self) -> Peak:
        """What shares are shares of."""
        return Peak(self.measured_bandwidth, self.measured_flops)


class Speed(_Frozen):
    """Raw samples in seconds and what follows from them and the case's cost."""

    seconds: tuple[float, ...]
    microseconds: Interval
    gigabytes_per_second: float
    teraflops_per_second: float
    share_of_roofline: float | None

    @classmethod
    def of(cls, seconds: Sequence[float], cost: Cost, peak: Peak | None) -> Speed:
        """From raw samples; without a peak (copies, whose way is not device memory) there is no share."""
        middle = median(seconds)
        low, high = median_interval([1e6 * sample for sample in seconds])
        return cls(
            seconds=tuple(seconds),
            microseconds=Interval(value=1e6 * middle, low=low, high=high),
            gigabytes_per_second=cost.bytes / middle / 1e9,
            teraflops_per_second=cost.flop / middle / 1e12,
            share_of_roofline=None if peak is None else roofline_share(cost, peak, middle),
        )


class GpuSystem(_Frozen):
    """One way to do a case's work.

    Attributes:
        name: the system.
        description: whose design it is and how it was set up.
        error: norm of the difference from the float32 reference over the reference's norm.
        eager: time on the device of one call, launches queued ahead, caches flushed; None if dry.
        graph: the same of one replay of a CUDA graph of the call; None if dry or not capturable.
        host_microseconds: what one call keeps the host busy; None if dry.
        skipped: why it did not run; then it has neither error nor times.
    """

    name: str
    description: str
    error: float | None = None
    eager: Speed | None = None
    graph: Speed | None = None
    host_microseconds: float | None = None
    skipped: str = ""


Family = Literal["lora", "bottleneck", "vectors", "lookup", "merge", "copies"]


class GpuCase(_Frozen):
    """Ways to do the same on the same inputs, timed in turn; ours is the first."""

    family: Family
    name: str
    settings: dict[str, JsonValue]
    least_bytes: int
    flop: int
    systems: tuple[GpuSystem, ...]


class BenchResult(_Frozen):
    """What ``benchmarks.gpu.bench`` found."""

    command: str
    commit: str
    dry: bool
    is_quick: bool
    device: Device | None
    machine: Machine
    versions: Versions
    peaks: Peaks | None
    notes: tuple[str, ...]
    cases: tuple[GpuCase, ...]
    quantities: tuple[Quantity, ...] = ()
    left_out: tuple[str, ...]
    """Cases for which the time did not suffice."""
    failures: tuple[str, ...]
    """What of ours failed or was wrong."""

    def write(self, path: Path) -> None:
        """Writes the result as JSON, atomically."""
        _write(self, path)


class Step(_Frozen):
    """One question of the check and its answer."""

    name: str
    question: str
    outcome: Literal["passed", "failed", "skipped"]
    seconds: float
    limit_seconds: float
    detail: str


class CheckResult(_Frozen):
    """What ``benchmarks.gpu.check`` found."""

    command: str
    commit: str
    dry: bool
    device: Device | None
    machine: Machine
    versions: Versions
    steps: tuple[Step, ...]

    def write(self, path: Path) -> None:
        """Writes the result as JSON, atomically."""
        _write(self, path)


def _write(result: BaseModel, path: Path) -> None:
    text = result.model_dump_json(indent=1) + "\n"

    def write_text(partial: Path) -> None:
        partial.write_text(text)

    atomic_write(path, write_text)


def read_bench(folder: Path) -> BenchResult | None:
    """The folder's bench.json, or None. Raises pydantic's ValidationError for a file of another format."""
    path = folder / "bench.json"
    return BenchResult.model_validate_json(path.read_text()) if path.exists() else None


def read_check(folder: Path) -> CheckResult | None:
    """The folder's check.json; see :func:`read_bench`."""
    path = folder / "check.json"
    return CheckResult.model_validate_json(path.read_text()) if path.exists() else None
