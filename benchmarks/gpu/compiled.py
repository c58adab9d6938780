"""What the compiler made of the kernels, as cuobjdump tells it: registers, memory, instructions."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "REQUIRED_INSTRUCTIONS",
    "Kernel",
    "compiled_module",
    "describe_kernels",
    "find_cuobjdump",
    "instructions_of",
    "missing_instructions",
    "spilled",
]

TILES_KERNEL = "adapter_tiles_kernel"
REQUIRED_INSTRUCTIONS = {
    "HMMA": "products on tensor cores",
    "LDSM": "their operands read by ldmatrix",
    "LDGSTS": "copies from device memory to shared memory beside the products",
}
"""What a kernel of tiles is made of."""

SECONDS = 240
_ARCHITECTURE = re.compile(r"^arch = (sm_\w+)$")
_FUNCTION = re.compile(r"^\s*Function\s*:?\s+(\S+?):?$")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)")


class Kernel(NamedTuple):
    """One kernel for one architecture; stack and local memory are of a thread, in slow device memory."""

    architecture: str
    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int


def find_cuobjdump() -> str | None:
    """The program of the toolkit, or the one in triton's wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/cuobjdump"] if home else []
    places += [shutil.which("cuobjdump") or "", "/usr/local/cuda/bin/cuobjdump"]
    specification = importlib.util.find_spec("triton")
    for location in (specification.submodule_search_locations or ()) if specification else ():
        places.append(f"{location}/backends/nvidia/bin/cuobjdump")
    return next((place for place in places if place and Path(place).exists()), None)


def compiled_module() -> Path:
    """The file of hmi_kernels._C. Raises RuntimeError if it is not built or holds no CUDA kernels."""
    from hmi_kernels.native import native, native_reason

    if native_reason:
        raise RuntimeError(native_reason)
    if not native.with_cuda:
        raise RuntimeError("hmi_kernels was compiled without CUDA (no nvcc, or HMI_BUILD_CUDA=0)")
    return Path(str(native.__file__))


def describe_kernels(cuobjdump: str, binary: Path) -> list[Kernel]:
    """Every kernel in the file, for every architecture that it holds machine code for.

    Raises RuntimeError if cuobjdump fails.
    """
    kernels, architecture, name = [], "", ""
    for line in _dump(cuobjdump, "--dump-resource-usage", binary):
        if found := _ARCHITECTURE.match(line):
            architecture = found[1]
        elif found := _FUNCTION.match(line):
            name = found[1]
        elif (found := _USAGE.search(line)) and name:
            kernels.append(Kernel(architecture, name, *map(int, found.groups())))
            name = ""
    names = _readable([kernel.name for kernel in kernels])
    return [kernel._replace(name=readable) for kernel, readable in zip(kernels, names, strict=True)]


def spilled(kernels: Sequence[Kernel]) -> list[str]:
    """A sentence for each kernel that keeps anything of a thread's in slow memory."""
    return [
        f"{kernel.name} for {kernel.architecture} has {kernel.stack_bytes} bytes of stack and "
        f"{kernel.local_bytes} of local memory"
        for kernel in kernels
        if kernel.stack_bytes or kernel.local_bytes
    ]


def missing_instructions(cuobjdump: str, binary: Path) -> list[str]:
    """A sentence for each kernel of tiles that lacks one of :data:`REQUIRED_INSTRUCTIONS`; see there."""
    found = instructions_of(cuobjdump, binary, TILES_KERNEL)
    if not found:
        return [f"the module holds no machine code of {TILES_KERNEL}"]
    return [
        f"{name} for {architecture} lacks {', '.join(sorted(missing))}"
        for (architecture, name), instructions in found.items()
        if (missing := REQUIRED_INSTRUCTIONS.keys() - instructions)
    ]


def instructions_of(cuobjdump: str, binary: Path, name_part: str) -> dict[tuple[str, str], set[str]]:
    """By architecture and (mangled) name, the instructions, without suffixes, of kernels so named."""
    instructions: dict[tuple[str, str], set[str]] = {}
    architecture, name = "", ""
    for line in _dump(cuobjdump, "--dump-sass", binary):
        if found := _ARCHITECTURE.match(line):
            architecture = found[1]
        elif found := _FUNCTION.match(line):
            name = found[1] if name_part in found[1] else ""
        elif name and (found := _INSTRUCTION.match(line)):
            instructions.setdefault((architecture, name), set()).add(found[1].split(".")[0])
    return instructions


def _dump(cuobjdump: str, what: str, binary: Path) -> Iterator[str]:
    command = [cuobjdump, what, str(binary)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    if found.returncode or "does not contain device code" in found.stdout + found.stderr:
        raise RuntimeError(f"{' '.join(command)}: {(found.stderr or found.stdout).strip()}")
    yield from found.stdout.splitlines()


def _readable(mangled: Sequence[str]) -> list[str]:
    """Names with template arguments, without namespaces and parameters; as they are if c++filt is missing."""
    command = shutil.which("c++filt") or shutil.which("cu++filt")
    if command is None:
        return list(mangled)
    found = subprocess.run([command], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = [
        re.sub(r"^void |\(anonymous namespace\)::|hmi::cuda::", "", line)
        for line in found.stdout.splitlines()
    ]
    return [name[: name.rindex("(")] if name.endswith(")") else name for name in names]
