"""Compiles the CUDA kernels for the CPU, with the emulator in place of the device.

``python -m emulator.build plain race`` from ``tests/`` does it by hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "EMULATOR_TESTS",
    "PRODUCTION",
    "ROOT",
    "BuildError",
    "Program",
    "build",
    "compiler_command",
    "cuda_include_folders",
    "module_name",
    "packaged_include_folders",
]

EMULATOR = Path(__file__).parent.resolve()
ROOT = EMULATOR.parent.parent
BUILD = ROOT / "build" / "emulator"
JOBS = 2


class BuildError(RuntimeError):
    """The compiler's messages."""


class Program(NamedTuple):
    """Sources that become one Python module, together with the emulator. Patterns start at the repository."""

    name: str
    kernels: tuple[str, ...]
    """CUDA: the files whose accesses to memory are observed."""
    host: tuple[str, ...]
    """C++ without kernels, the definition of ``hmi::bindings::define_cuda`` among it."""


PRODUCTION = Program(
    "hmi_emulated",
    kernels=("csrc/cuda/*.cu",),
    host=("csrc/cuda/*.cpp", "csrc/common/*.cpp", "csrc/bindings/cuda*.cpp", "csrc/bindings/pool.cpp"),
)
EMULATOR_TESTS = Program(
    "hmi_emulator_tests", kernels=("tests/emulator/kernels/*.cu",), host=("tests/emulator/kernels/*.cpp",)
)
RUNTIME = ("tests/emulator/src/*.cpp",)
MODULE = ROOT / "tests/emulator/src/module.cpp"

COMMON_FLAGS = (
    "-x c++ -std=c++17 -fPIC -pthread -Wall -Wno-unknown-pragmas",
    # Device code may view memory as another type; the toolkit's own half and bfloat16 do.
    "-fno-strict-aliasing",
    # Two variants in one process keep their own variables, those of inline functions and templates included.
    "-fvisibility=hidden -fno-gnu-unique",
    # As setup.py: a multiply-add is fused where the source says so.
    "-ffp-contract=off",
)
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"


class Variant(NamedTuple):
    """How the parts of a program are compiled."""

    kernels: str
    others: str
    link: str = ""
    observes: bool = False


VARIANTS = {
    "plain": Variant("-O2", "-O2"),
    # -fsanitize=thread without its library: src/memory_access.cpp defines what it calls. Without SRA a load
    # of a struct stays one access, as of a uint4 on the device.
    "race": Variant("-O1 -g -fsanitize=thread -fno-tree-sra", "-O2", observes=True),
    "sanitize": Variant(f"-O1 -g {SANITIZERS}", f"-O1 -g {SANITIZERS}", SANITIZERS),
}


def module_name(program: Program, variant: str) -> str:
    return f"{program.name}_{variant}"


def build(variant: str, program: Program = PRODUCTION, *, flags: str = "") -> Path:
    """Compiles what is out of date and returns the module's file.

    ``variant``: plain (fast); race (kernels report every access: races and counters); sanitize
    (AddressSanitizer and UndefinedBehaviorSanitizer; for :func:`emulator.harness.run_sanitized`).
    ``flags`` are added to every compilation; such builds have a folder of their own.
    Raises :class:`BuildError` with the compiler's messages.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
    includes = _include_flags()
    folder = BUILD / f"{program.name}-{hashlib.sha256(f'{includes} {flags}'.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    module = _module(folder, program, variant)
    with _lock(folder):
        _write_if_changed(folder / "build.ninja", _ninja_file(folder, program, f"{includes} {flags}"))
        command = [_ninja(), "-C", str(folder), "-j", str(JOBS), str(module)]
        ninja = subprocess.run(command, capture_output=True, text=True, check=False)
    if ninja.returncode:
        raise BuildError(f"building {module.name} failed:\n{ninja.stdout[-20000:]}{ninja.stderr}")
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


def compiler_command() -> list[str]:
    """CXX, or g++."""
    return shlex.split(os.environ.get("CXX") or "g++")


def _ninja() -> str:
    found = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
    if not Path(found).exists():
        raise BuildError("the emulator is built by ninja: pip install ninja")
    return found


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


def _module(folder: Path, program: Program, variant: str) -> Path:
    return folder / f"{module_name(program, variant)}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _ninja_file(folder: Path, program: Program, flags: str) -> str:
    """All variants: what they have in common is compiled once."""
    compiler = shlex.join(compiler_command())
    objects: dict[Path, str] = {}
    modules: list[str] = []
    for name, variant in VARIANTS.items():
        compiled = _objects(folder, program, name, variant)
        objects.update(compiled)
        modules.append(f"build {_module(folder, program, name)}: link {' '.join(map(str, compiled))}")
        modules.append(f"  link_flags = {variant.link}")
    return "\n".join(
        [
            f"flags = {' '.join(COMMON_FLAGS)} {flags}",
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d $flags $file_flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            # Replaced, never overwritten: a process may have the old module mapped.
            f"  command = {compiler} -shared -pthread $link_flags $in -o $out.new && mv $out.new $out",
            *objects.values(),
            *modules,
            "",
        ]
    )


def _objects(folder: Path, program: Program, name: str, variant: Variant) -> dict[Path, str]:
    """The object files of a module, in the order of linking, and ninja's statements for them."""
    module = module_name(program, name)
    definitions = [
        f"-DHMI_EMULATOR_MODULE={module}",
        f"-DHMI_EMULATOR_OBSERVES={int(variant.observes)}",
    ]
    # A table of bound types for each module: several modules bind the same types.
    isolation = f"-DPYBIND11_BUILD_ABI='\"_{module}\"'"
    statements = {}

    def compile_all(sources: list[Path], file_flags: str, subfolder: str) -> None:
        for source in sources:
            target = folder / subfolder / f"{'_'.join(source.relative_to(ROOT).parts)}.o"
            statements[target] = f"build {target}: compile {source}\n  file_flags = {file_flags}"

    # Bindings hold no kernel; they need no optimization, and pybind11 is slow to compile.
    bindings = [source for source in _sources((*RUNTIME, *program.host)) if source.stem.endswith("bindings")]
    bindings += [source for source in _sources(program.host) if source.parent.name == "bindings"]
    others = [source for source in _sources(program.host) if source not in bindings]
    runtime = [source for source in _sources(RUNTIME) if source not in (*bindings, MODULE)]
    checks = "sanitized" if variant.link else "optimized"
    compile_all([MODULE], f"-O0 {' '.join(definitions)} {isolation}", module)
    compile_all(bindings, f"-O0 {isolation}", module)
    compile_all([*runtime, *others], variant.others, checks)
    # Kernels last: of an inline function that is in several objects the first is kept, which must not be an
    # observed one.
    compile_all(_sources(program.kernels), variant.kernels, name)
    return statements


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["plain"]:
        print(build(wanted))
