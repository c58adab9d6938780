"""The table of what the compiler made of the kernels, for docs/kernels.md."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from benchmarks.gpu.compiled import Kernel, compiled_module, describe_kernels, find_cuobjdump

__all__ = ["compiled_table", "rows_of"]


def compiled_table() -> str:
    """Markdown: a row for each family of kernels and architecture.

    Raises RuntimeError if hmi_kernels is built without CUDA or cuobjdump is missing.
    """
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise RuntimeError("cuobjdump is neither in CUDA_HOME nor in triton's package")
    header = [
        "| kernel | architecture | compiled for | registers a thread | static shared memory | spilled |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*header, *rows_of(describe_kernels(cuobjdump, compiled_module()))])


def rows_of(kernels: Sequence[Kernel]) -> list[str]:
    """Kernels that differ in template arguments alone share a row, with the least and the most of each."""

    def family(kernel: Kernel) -> tuple[str, str]:
        return kernel.name.split("<")[0], kernel.architecture

    rows = []
    for (name, architecture), group in groupby(sorted(kernels, key=family), key=family):
        members = list(group)
        registers = _range([kernel.registers for kernel in members], "")
        shared = _range([kernel.shared_bytes for kernel in members], " B")
        spilled = max(kernel.local_bytes + kernel.stack_bytes for kernel in members)
        variants = f"{len(members)} shape{'s' if len(members) > 1 else ''}"
        rows.append(f"| `{name}` | {architecture} | {variants} | {registers} | {shared} | {spilled} B |")
    return rows


def _range(values: Sequence[int], unit: str) -> str:
    low, high = min(values), max(values)
    return f"{low:,}{unit}" if low == high else f"{low:,} to {high:,}{unit}"
