"""``hmi doctor``: what was compiled, what runs, and why something is off."""

from __future__ import annotations

import platform
import shutil
from typing import Any

import torch
from rich.table import Table

import hmi_kernels
from hmi_engine.cli.output import AsJson, cell, console, print_json
from hmi_engine.demo.environment import PACKAGES, installed_versions
from hmi_engine.memory.device_choice import cuda_reason
from hmi_engine.models.linear import has_bfloat16_products, has_packed_matmul


def doctor(as_json: AsJson = False) -> None:
    """Say what is on, what is off, and why."""
    report = _examine()
    if as_json:
        print_json(report)
        return
    for title, rows in report.items():
        table = Table(title=title, show_header=False, title_justify="left", min_width=60)
        for name, value in rows.items():
            shown = value if isinstance(value, str) else ", ".join(map(str, _as_list(value)))
            table.add_row(name, cell(shown))
        console.print(table)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _examine() -> dict[str, dict[str, Any]]:
    return {
        "Versions": _versions(),
        "Kernels": dict(hmi_kernels.build_info()),
        "Backends": {
            name: "on" if status.available else f"off: {status.reason}"
            for name, status in hmi_kernels.backends().items()
        },
        "Machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "shared layers": "oneDNN, weights reordered"
            if has_packed_matmul()
            else "torch.nn.functional.linear",
            "bfloat16": "multiplied: an engine may have dtype='bfloat16'"
            if has_bfloat16_products()
            else "not multiplied: engines on the CPU compute in float32",
            "GPU": _gpu(),
            "nvcc": shutil.which("nvcc") or "not found: CUDA kernels are not compiled",
        },
    }


def _versions() -> dict[str, str]:
    found = installed_versions()
    packages = {name: found.packages.get(name, "not installed") for name in PACKAGES}
    return {"python": found.python} | packages


def _gpu() -> str:
    if reason := cuda_reason():
        return f"off: {reason}"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return "; ".join(f"cuda:{index}: {name}" for index, name in enumerate(names)) + " (engines take cuda:0)"
