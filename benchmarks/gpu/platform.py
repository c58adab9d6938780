"""Where the kernels run: on the GPU, or for ``--dry`` on the CPU by emulator and interpreter."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.options import ROOT
from benchmarks.gpu.result import Device

__all__ = ["Platform", "choose_platform", "current_commit", "describe_device"]

_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


@dataclass(frozen=True)
class Platform:
    """A device for tensors, and what stands in for it in dry runs."""

    device: torch.device
    is_dry: bool
    variant: str = "plain"
    """Of the emulator, in dry runs."""

    @contextlib.contextmanager
    def backend(self, name: str) -> Iterator[None]:
        """Makes the ops run on this backend: ``cuda``, ``triton`` or ``reference``; empty: no change."""
        import hmi_kernels

        if not name:
            yield
            return
        if self.is_dry and name == "cuda":
            from emulator.harness import emulated  # type: ignore[import-not-found]  # tests/emulator

            with emulated(self.variant):
                yield
            return
        with hmi_kernels.use_backend(name):
            yield

    def own_stream(self) -> AbstractContextManager[Any]:
        """Makes a stream of its own current: the legacy default stream takes no batches of copies."""
        return contextlib.nullcontext() if self.is_dry else torch.cuda.stream(torch.cuda.Stream(self.device))

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.is_dry:
            self._emulator().run_everything()
        else:
            torch.cuda.synchronize(self.device)

    def new_stream(self) -> int | torch.cuda.Stream:
        """A stream that does not wait for the default stream; in dry runs the emulator's handle of one."""
        if self.is_dry:
            return int(self._emulator().create_stream(device=0, is_blocking=False))
        return torch.cuda.Stream(self.device)

    def device_bytes(self, count: int) -> Tensor:
        """uint8 [count] of device memory, zero; in dry runs of memory that the emulator takes for it."""
        if self.is_dry:
            return torch.frombuffer(self._emulator().DeviceMemory(count, 0), dtype=torch.uint8).zero_()
        return torch.zeros(count, dtype=torch.uint8, device=self.device)

    def _emulator(self) -> Any:
        """The controls of the emulator, within ``backend("cuda")``."""
        from hmi_kernels.cuda import driver

        return driver.module().emulator


def choose_platform(*, is_dry: bool, variant: str = "plain") -> Platform:
    """The GPU, or for dry runs the CPU, with one thread.

    Ends the program with advice if there is no GPU and the run is not dry.
    """
    if is_dry:
        torch.set_num_threads(1)
        return Platform(torch.device("cpu"), True, variant)
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device. --dry runs everything on the CPU, and measures nothing")
    return Platform(torch.device("cuda", torch.cuda.current_device()), False)


def describe_device(chosen: Platform) -> Device | None:
    """The GPU in use, or None in a dry run."""
    if chosen.is_dry:
        return None
    properties = torch.cuda.get_device_properties(chosen.device)
    return Device(
        name=properties.name,
        compute_capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        driver=_nvidia_smi("driver_version"),
        cuda_of_torch=str(torch.version.cuda),
        cuda_of_kernels=_cuda_of_kernels(),
        triton=_version_of_triton(),
        clocks={name: _nvidia_smi(name) for name in _CLOCKS},
    )


def current_commit() -> str:
    """The checkout's commit, with ``-changed`` if files differ from it.

    A copy that has left git behind takes what ``HMI_COMMIT`` says, else ``unknown``.
    """
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return os.environ.get("HMI_COMMIT", "unknown")
    status = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() + ("-changed" if status.stdout.strip() else "")


def _nvidia_smi(query: str) -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "nvidia-smi not found"
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    found = subprocess.run(
        [command, f"--query-gpu={query}", "--format=csv,noheader", f"--id={index}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    return found.stdout.strip() or "not told"


def _cuda_of_kernels() -> str:
    from hmi_kernels.cuda import driver

    if driver.reason():
        return driver.reason()
    of_driver, of_runtime = (
        f"{number // 1000}.{number % 1000 // 10}" for number in driver.module().versions()
    )
    return f"runtime {of_runtime}, driver {of_driver}"


def _version_of_triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"
