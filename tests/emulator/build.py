"""Compiles the CUDA kernels for the CPU, with the emulator in place of the device: one Python module per variant.

``python -m emulator.build plain`` from ``tests/`` does it by hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["PRODUCTION", "BuildError", "Program", "build", "cuda_include_folders", "module_name"]

EMULATOR = Path(__file__).parent.resolve()
ROOT = EMULATOR.parent.parent
BUILD = ROOT / "build" / "emulator"
JOBS = 2


class BuildError(RuntimeError):
    """The compiler's messages."""


class Program(NamedTuple):
    """Kernels that become one module. Patterns are relative to the repository."""

    name: str
    kernels: tuple[str, ...]
    """CUDA sources: the files whose accesses to memory are observed."""
    host: tuple[str, ...]
    """C++ without kernels, the definition of ``hmi::bindings::define_cuda`` among it."""


PRODUCTION = Program(
    "hmi_emulated",
    kernels=("csrc/cuda/*.cu",),
    host=("csrc/cuda/*.cpp", "csrc/common/*.cpp", "csrc/bindings/cuda*.cpp", "csrc/bindings/pool.cpp"),
)
EMULATOR_SOURCES = "tests/emulator/src/*.cpp"

COMMON_FLAGS = (
    "-x c++ -std=c++17 -g -fPIC -pthread -Wall -Wno-unknown-pragmas",
    # Device code may view memory as another type; the toolkit's own half and bfloat16 do.
    "-fno-strict-aliasing",
    # Two variants in one process keep their own variables, those of inline functions and templates included.
    "-fvisibility=hidden -fno-gnu-unique",
    # As setup.py: a multiply-add is fused where the source says so.
    "-ffp-contract=off",
)
VARIANT_FLAGS = {
    "plain": "-O2",
    "race": "-O1",
    "sanitize": "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer",
}
# Without SRA a load of a struct stays one access, as of a uint4 on the device.
OBSERVED = "-O1 -fsanitize=thread -fno-tree-sra"
UCONTEXT = "-DEMULATOR_UCONTEXT"


def module_name(program: Program, variant: str) -> str:
    return f"{program.name}_{variant}"


def build(variant: str, program: Program = PRODUCTION, *, flags: str = "") -> Path:
    """Builds what is out of date and returns the module's file.

    ``variant``: plain (fast); race (kernels report every access: races and counters); sanitize (AddressSanitizer
    and UndefinedBehaviorSanitizer; its runtime must be preloaded, see :func:`emulator.harness.run_sanitized`).
    ``flags`` are added to every compilation; such builds have a folder of their own.
    Raises :class:`BuildError` with the compiler's messages.
    """
    if variant not in VARIANT_FLAGS:
        raise ValueError(f"variant must be one of {', '.join(VARIANT_FLAGS)}, not {variant!r}")
    name = module_name(program, variant)
    folder = BUILD / (name + ("-" + "".join(c if c.isalnum() else "_" for c in flags) if flags else ""))
    module = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        _write_if_changed(folder / "build.ninja", _ninja_file(variant, program, module, flags))
        ninja = subprocess.run(
            [_ninja(), "-C", str(folder), "-j", str(JOBS)], capture_output=True, text=True, check=False
        )
    if ninja.returncode:
        raise BuildError(f"building {name} failed:\n{ninja.stdout[-20000:]}{ninja.stderr}")
    return module


def cuda_include_folders() -> list[Path]:
    """Folders with cuda_runtime_api.h, cuda_fp16.h and what they include.

    CUDA_HOME's, the toolkit's usual place, or the PyPI packages nvidia-cuda-runtime, -crt and -cccl.
    Raises :class:`BuildError` if there are none.
    """
    homes = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in homes:
        if home and (Path(home) / "include" / "cuda_fp16.h").exists():
            return [Path(home) / "include", Path(home) / "include" / "cccl"]
    if folders := packaged_include_folders():
        return folders
    raise BuildError(
        "the emulator needs CUDA's headers: set CUDA_HOME, or pip install nvidia-cuda-runtime "
        "nvidia-cuda-crt nvidia-cuda-cccl (hmi[test] has them)"
    )


def packaged_include_folders() -> list[Path]:
    """The headers of the PyPI packages; none if they are not installed."""
    specification = importlib.util.find_spec("nvidia")
    locations = list(specification.submodule_search_locations or ()) if specification else []
    for include in (path for place in locations for path in sorted(Path(place).glob("cu*/include"))):
        if (include / "cuda_fp16.h").exists() and (include / "crt" / "host_defines.h").exists():
            return [include, include / "cccl"]
    return []


def _ninja() -> str:
    found = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
    if not Path(found).exists():
        raise BuildError("the emulator is built by ninja: pip install ninja")
    return found


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process builds at a time; the others then find everything done."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _sources(patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def _include_flags() -> str:
    import pybind11

    system = [*cuda_include_folders(), Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    return " ".join(
        [f"-I{EMULATOR / 'include'}", f"-I{ROOT / 'csrc'}", *(f"-isystem {folder}" for folder in system)]
    )


def _definitions(variant: str, module: Path) -> str:
    name = module.name.split(".")[0]
    return " ".join(
        [
            f"-DHMI_EMULATOR_MODULE={name}",
            f"-DHMI_EMULATOR_OBSERVES={int(variant == 'race')}",
            # A table of bound types for each module: several define the same types.
            f"-DPYBIND11_BUILD_ABI='\"_{name}\"'",
        ]
    )


def _ninja_file(variant: str, program: Program, module: Path, flags: str) -> str:
    lines = [
        f"flags = {' '.join(COMMON_FLAGS)} {_include_flags()} {_definitions(variant, module)} {flags}",
        "rule compile",
        f"  command = {_compiler()} -MMD -MF $out.d $flags $file_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {_compiler()} -shared -pthread $link_flags $in -o $out.new && mv $out.new $out",
    ]
    kernels = set(_sources(program.kernels))
    # Kernels last: of an inline function that is in several objects the first is kept, which must not be an
    # observed one.
    sources = [*_sources((EMULATOR_SOURCES, *program.host)), *sorted(kernels)]
    objects = [
        module.parent / f"{source.relative_to(ROOT).as_posix().replace('/', '_')}.o" for source in sources
    ]
    for source, compiled in zip(sources, objects, strict=True):
        lines.append(f"build {compiled}: compile {source}")
        lines.append(f"  file_flags = {_file_flags(variant, source, observed=source in kernels)}")
    lines.append(f"build {module}: link {' '.join(map(str, objects))}")
    lines.append(f"  link_flags = {VARIANT_FLAGS[variant] if variant == 'sanitize' else ''}")
    return "\n".join([*lines, ""])


def _file_flags(variant: str, source: Path, *, observed: bool) -> str:
    # Bindings need no optimization and no checks: they hold no kernel, and pybind11 is slow to compile.
    if source.parent.name == "bindings" or source.stem.endswith(("bindings", "module")):
        return "-O0 -g0"
    if variant == "race":
        return OBSERVED if observed else "-O2"
    return VARIANT_FLAGS[variant]


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["plain"]:
        print(build(wanted))
