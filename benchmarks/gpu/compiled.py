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

__all__ = ["Kernel", "compiled_module", "describe_kernels", "find_cuobjdump", "instructions_of"]

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


def instructions_of(cuobjdump: str, binary: Path, kernel_name: str) -> dict[str, set[str]]:
    """By architecture, the instructions (without suffixes) of the kernels of whose names this is a part."""
    instructions: dict[str, set[str]] = {}
    architecture, is_wanted = "", False
    for line in _dump(cuobjdump, "--dump-sass", binary):
        if found := _ARCHITECTURE.match(line):
            architecture = found[1]
        elif found := _FUNCTION.match(line):
            is_wanted = kernel_name in found[1]
        elif is_wanted and (found := _INSTRUCTION.match(line)):
            instructions.setdefault(architecture, set()).add(found[1].split(".")[0])
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
