"""What a measurement ran on: versions of the software and a description of the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

import hmi_kernels
from hmi_engine.versions import PACKAGES, Versions, installed_versions

__all__ = ["PACKAGES", "Machine", "Versions", "describe_machine", "installed_versions"]


class Machine(BaseModel):
    """The machine: processor, how much of it was used, and how its SIMD units were."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    cores: int
    threads: int
    torch_simd: str
    kernels_simd: str
    memory_bytes: int
    device: str
    system: str


def describe_machine() -> Machine:
    """This machine, as torch and the kernels see it."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch_simd=torch.backends.cpu.get_cpu_capability(),
        kernels_simd=str(hmi_kernels.build_info().get("simd_active", "none")),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        device="cpu",
        system=f"{platform.system()} {platform.machine()}",
    )


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
