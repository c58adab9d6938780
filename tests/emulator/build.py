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
USUAL_TOOLKIT = "/usr/local/cuda"
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
    "plain": Variant("-O1", "-O2"),
    # -fsanitize=thread without its library: src/memory_access.cpp defines what it calls. Without SRA a load
    # of a struct stays one access, as of a uint4 on the device.
    "race": Variant("-O1 -g1 -fsanitize=thread -fno-tree-sra", "-O2", observes=True),
    "sanitize": Variant(f"-O1 -g1 {SANITIZERS}", f"-O1 -g1 {SANITIZERS}", SANITIZERS),
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
    folder = build_folder(program, flags)
    modules = {
        module_path(folder, program, name): (compilations(folder, program, name), VARIANTS[name].link)
        for name in VARIANTS
    }
    module = module_path(folder, program, variant)
    run_ninja(folder, ninja_file(f"{include_flags()} {flags}", modules), module)
    return module


def build_folder(program: Program, flags: str = "") -> Path:
    """One for each way to compile: headers of another place are another way."""
    return BUILD / f"{program.name}-{hashlib.sha256(f'{include_flags()} {flags}'.encode()).hexdigest()[:8]}"


def module_path(folder: Path, program: Program, variant: str) -> Path:
    return folder / f"{module_name(program, variant)}{sysconfig.get_config_var('EXT_SUFFIX')}"


def run_ninja(folder: Path, text: str, target: Path) -> None:
    """Builds the target by the text of a build.ninja. Raises :class:`BuildError`."""
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        _write_if_changed(folder / "build.ninja", text)
        command = [ninja_command(), "-C", str(folder), "-j", str(JOBS), str(target)]
        ninja = subprocess.run(command, capture_output=True, text=True, check=False)
    if ninja.returncode:
        raise BuildError(f"building {target.name} failed:\n{ninja.stdout[-20000:]}{ninja.stderr}")


def cuda_include_folders() -> list[Path]:
    """Folders with cuda_runtime_api.h, cuda_fp16.h and what they include.

    CUDA_HOME's, the toolkit's usual place, or the PyPI packages nvidia-cuda-runtime, -crt and -cccl.
    Raises :class:`BuildError` if there are none.
    """
    homes = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), USUAL_TOOLKIT]
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


def ninja_command() -> str:
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


def include_flags() -> str:
    import pybind11

    system = [*cuda_include_folders(), Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    return " ".join(
        [f"-I{EMULATOR / 'include'}", f"-I{ROOT / 'csrc'}", *(f"-isystem {folder}" for folder in system)]
    )


class Compilation(NamedTuple):
    """One object file."""

    source: Path | None
    """None: the object is there already."""
    target: Path
    flags: str


def ninja_file(flags: str, modules: dict[Path, tuple[list[Compilation], str]]) -> str:
    """The text of build.ninja. For each module: compilations, in the order of linking, and linker's flags.

    Targets that several modules share are compiled once.
    """
    compiler = shlex.join(compiler_command())
    objects: dict[Path, list[str]] = {}
    links: list[str] = []
    for module, (compiled, link_flags) in modules.items():
        for source, target, file_flags in compiled:
            if source is None:
                continue
            objects[target] = [f"build {target}: compile {source}", f"  file_flags = {file_flags}"]
        links.append(f"build {module}: link {' '.join(str(each.target) for each in compiled)}")
        links.append(f"  link_flags = {link_flags}")
    return "\n".join(
        [
            f"flags = {' '.join(COMMON_FLAGS)} {flags}",
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d $file_flags $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            # Replaced, never overwritten: a process may have the old module mapped.
            f"  command = {compiler} -shared -pthread $link_flags $in -o $out.new && mv $out.new $out",
            *(line for statement in objects.values() for line in statement),
            *links,
            "",
        ]
    )


def compilations(folder: Path, program: Program, variant: str) -> list[Compilation]:
    """The object files of a module, in the order of linking. Writes the file that joins its bindings."""
    module = module_name(program, variant)
    how = VARIANTS[variant]
    # A table of bound types for each module: several modules bind the same types.
    isolation = f"-DPYBIND11_BUILD_ABI='\"_{module}\"'"
    module_flags = f"-DHMI_EMULATOR_MODULE={module} -DHMI_EMULATOR_OBSERVES={int(how.observes)} {isolation}"
    host = _sources((*RUNTIME, *program.host))
    bindings = [
        source for source in host if source == MODULE or "bindings" in (source.stem[-8:], source.parent.name)
    ]
    others = [source for source in host if source not in bindings]

    def compiled(source: Path, subfolder: str, file_flags: str) -> Compilation:
        target = folder / subfolder / f"{'_'.join(source.relative_to(ROOT).parts)}.o"
        return Compilation(source, target, file_flags)

    # Variants share what they compile alike.
    shared = "sanitized" if how.link else "optimized"
    return [
        # Bindings hold no kernel and need no optimization. All in one: most of the time goes into pybind11.
        Compilation(
            _joined(bindings, folder / module), folder / module / "bindings.o", f"-O0 -I{ROOT} {module_flags}"
        ),
        *(compiled(source, shared, how.others) for source in others),
        # Kernels last: of an inline function that is in several objects the first is kept, which must not be
        # an observed one.
        *(compiled(source, variant, how.kernels) for source in _sources(program.kernels)),
    ]


def _joined(sources: list[Path], folder: Path) -> Path:
    """A file that includes the sources, by their paths from the repository's root."""
    path = folder / "bindings.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    _write_if_changed(path, "".join(f'#include "{source.relative_to(ROOT)}"\n' for source in sources))
    return path


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["plain"]:
        print(build(wanted))
