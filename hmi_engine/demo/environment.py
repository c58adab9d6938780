"""What a measurement ran on: versions of the software and a description of the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

import hmi_kernels

__all__ = ["PACKAGES", "Machine", "Versions", "describe_machine", "installed_versions"]

PACKAGES = (
    "duckdb",
    "faiss-cpu",
    "hmi",
    "numba",
    "numpy",
    "peft",
    "ray",
    "safetensors",
    "scikit-learn",
    "seqeval",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "zstandard",
)
"""What takes part in what is computed, or is measured beside it."""


class Versions(BaseModel):
    """Version of Python, and of each installed package that took part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str
    packages: dict[str, str]


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


def installed_versions() -> Versions:
    """Versions of what is installed here."""
    found = {package: _version(package) for package in PACKAGES}
    present = {package: number for package, number in found.items() if number is not None}
    return Versions(python=platform.python_version(), packages=present)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
