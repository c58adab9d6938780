"""Builds hmi_kernels._C: one pybind11 module, C++17 always, CUDA where nvcc is found. Torch is never needed.

CXX=g++   HMI_BUILD_CUDA=auto|0|1   TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX"   MAX_JOBS=n   DEBUG=0|1
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEBUG = os.environ.get("DEBUG", "0") == "1"
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# No contraction: a multiply-add is fused where the source says so, hence alike in every instance of a kernel.
CXX_FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-pthread",
    *WARNINGS,
]
# The same kernels are compiled once per level; csrc/cpu/simd/dispatch.cpp chooses at run time.
# GCC 12 takes the lanes that its own AVX-512 header leaves undefined on purpose for a mistake of ours.
HEADER_WARNINGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
SIMD_FLAGS = {
    "csrc/cpu/simd/avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/simd/avx512.cpp": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mf16c",
        *HEADER_WARNINGS,
    ],
}
# What the sources need beyond C++17: GCC knows the builtin from version 9 on.
CXX_PROBE = b"""
#include <string_view>
typedef float Floats __attribute__((vector_size(16)));
typedef int Ints __attribute__((vector_size(16)));
Floats converted(Ints values) { return __builtin_convertvector(values, Floats); }
"""
ARCHITECTURE = re.compile(r"(\d+)\.(\d+)([af]?)(\+PTX)?")
DEFAULT_ARCHITECTURES = "8.0 9.0+PTX"
OLDEST_ARCHITECTURE = (8, 0)
# What torch takes in place of numbers.
ARCHITECTURES_BY_NAME = {
    "Kepler": "3.5",
    "Maxwell": "5.0",
    "Pascal": "6.0",
    "Volta": "7.0",
    "Turing": "7.5",
    "Ampere": "8.0 8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 12.0+PTX",
}


def optimization_flags() -> list[str]:
    return ["-O0", "-g"] if DEBUG else ["-O3"]


def find_cxx() -> str:
    """The C++ compiler's command; ends the build with advice if there is none that knows what we use."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        probe = [*shlex.split(candidate), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
        if (
            shutil.which(probe[0])
            and not subprocess.run(probe, input=CXX_PROBE, capture_output=True, check=False).returncode
        ):
            return candidate
    sys.exit(
        f"hmi_kernels needs a C++17 compiler, GCC 9 or later or Clang; tried {', '.join(candidates)}. "
        "Install one (Debian/Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or set CXX to its "
        "command."
    )


def host_compiler(cxx: str) -> str:
    """The compiler in a command such as ``ccache g++``: nvcc takes no more than its name.

    Ends the build with advice if the command names none.
    """
    commands = [word for word in shlex.split(cxx) if not word.startswith("-")]
    if commands and shutil.which(commands[-1]):
        return commands[-1]
    sys.exit(
        f"nvcc needs the name of the compiler in CXX={cxx!r}: let it be the last word but for options that "
        "begin with -, or set HMI_BUILD_CUDA=0"
    )


def targets_x86(cxx: str) -> bool:
    """Asks the compiler, not the machine, so that cross-compiling works."""
    target = subprocess.run(
        [*shlex.split(cxx), "-dumpmachine"], capture_output=True, text=True, check=True
    ).stdout
    return target.startswith(("x86_64", "amd64"))


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else []
    places += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and Path(place).exists()), None)


def wants_cuda() -> bool:
    """Whether the CUDA kernels are compiled: where nvcc can compile them, unless HMI_BUILD_CUDA decides."""
    mode = os.environ.get("HMI_BUILD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"HMI_BUILD_CUDA must be auto, 0 or 1, not {mode!r}")
    if mode == "1" and find_nvcc() is None:
        sys.exit("HMI_BUILD_CUDA=1 but nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    if mode == "0" or find_nvcc() is None:
        return False
    if not architectures() and mode == "1":
        sys.exit(
            "HMI_BUILD_CUDA=1 but there is no architecture to compile for, see above: let "
            "TORCH_CUDA_ARCH_LIST name GPUs from 8.0 on that nvcc knows (nvcc --list-gpu-arch), "
            "or install a later CUDA toolkit"
        )
    return bool(architectures())


def sources(suffix: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob(f"*{suffix}"))


def needs_cuda(source: str) -> bool:
    return source.startswith(("csrc/cuda/", "csrc/bindings/cuda"))


def cuda_includes(cxx: str) -> list[Path]:
    """The headers of the toolkit whose nvcc compiles, where nvcc itself looks for them.

    The nvcc on PATH may be a link or a script, and not every toolkit has its headers beside it.
    """
    command = [str(find_nvcc()), "-ccbin", host_compiler(cxx), "--dryrun", "-x", "cu", "-c", "/dev/null"]
    dry_run = subprocess.run(command, capture_output=True, text=True, check=True)
    said = re.search(r"^#\$ INCLUDES=(.*)$", dry_run.stderr, re.MULTILINE)
    words = shlex.split(said[1]) if said else []  # none where they lie among the system's own
    return [Path(word.removeprefix("-I")).resolve() for word in words if word.startswith("-I")]


@functools.cache
def architectures() -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST, e.g. "8.0 9.0a 10.0+PTX", read without importing torch.

    Without those that the kernels do not run on or nvcc does not know, of which it tells. Ends the build with
    advice on what names no architecture.
    """
    known, chosen = known_architectures(), []
    for entry in requested_architectures():
        match = ARCHITECTURE.fullmatch(entry)
        if match is None:
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST names {entry!r}, which is no architecture: use numbers such as 8.0, "
                "9.0a or 10.0+PTX with spaces or semicolons between them, or the names "
                f"{', '.join(ARCHITECTURES_BY_NAME)}"
            )
        major, minor = int(match[1]), int(match[2])
        if (major, minor) < OLDEST_ARCHITECTURE:
            print(f"hmi_kernels: not compiled for {entry}: the CUDA kernels run on GPUs from 8.0 on")
        elif f"compute_{major}{minor}" not in known:
            print(f"hmi_kernels: not compiled for {entry}, which {find_nvcc()} does not know")
            if chosen and match[4] and re.fullmatch(r"[\d.]+", chosen[-1]):
                chosen[-1] += "+PTX"  # which serves the same GPUs, compiled by their driver
        else:
            chosen.append(entry)
    return tuple(chosen)


def requested_architectures() -> list[str]:
    """What the environment asks for, names replaced by numbers; the default if it says nothing."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    numbers = [ARCHITECTURES_BY_NAME.get(entry, entry) for entry in requested]
    return " ".join(numbers or [DEFAULT_ARCHITECTURES]).split()


def known_architectures() -> set[str]:
    """What nvcc can compile for, e.g. compute_80."""
    listed = subprocess.run(
        [str(find_nvcc()), "--list-gpu-arch"], capture_output=True, text=True, check=False
    )
    return set(listed.stdout.split())


def architecture_flags() -> list[str]:
    flags = []
    for arch in architectures():
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


def kept_pybind11() -> Path:
    """A copy of pybind11's headers: where pip puts them differs between its builds, and when; this does not.

    So a build after another, by pip or by hand, compiles nothing anew.
    """
    import pybind11

    kept = ROOT / "build" / f"pybind11-{pybind11.__version__}"
    if not kept.exists():
        unfinished = Path(tempfile.mkdtemp(dir=kept.parent, prefix=f"{kept.name}."))
        shutil.copytree(pybind11.get_include(), unfinished / "include")
        with contextlib.suppress(OSError):  # another build was faster
            (unfinished / "include").rename(kept)
        shutil.rmtree(unfinished)
    return kept


def in_command(path: object) -> str:
    """The path as a word of a command in build.ninja: folders may have spaces."""
    return shlex.quote(str(path)).replace("$", "$$")


def as_target(path: object) -> str:
    """The path as an output or input of build.ninja; ninja itself quotes what stands for $in and $out."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def translation_units(cxx: str, with_cuda: bool, folder: Path) -> list[tuple[Path, list[str]]]:
    """What is compiled, each with flags of its own; writes the files that join the bindings.

    Most of the time of a file of bindings goes into pybind11's headers: two that include all the others take
    a third of it. Two, as those of the CUDA kernels have functions of the same names.
    """
    skipped = set() if targets_x86(cxx) else set(SIMD_FLAGS)
    compiled = [
        source
        for source in [*sources(".cpp"), *sources(".cu")]
        if source not in skipped and (with_cuda or not needs_cuda(source))
    ]
    bindings = [source for source in compiled if source.startswith("csrc/bindings/")]
    units = [(ROOT / source, SIMD_FLAGS.get(source, [])) for source in compiled if source not in bindings]
    for name, of_cuda in (("bindings.cpp", False), ("bindings_cuda.cpp", True)):
        if joined := [source for source in bindings if needs_cuda(source) == of_cuda]:
            text = "".join(f'#include "{source}"\n' for source in joined)
            if not (folder / name).exists() or (folder / name).read_text() != text:
                (folder / name).write_text(text)
            units.append((folder / name, [f"-I{in_command(ROOT)}"]))
    return units


def ninja_file(cxx: str, with_cuda: bool, module: Path, folder: Path) -> str:
    """The text of build.ninja: header-aware through depfiles, every SIMD level with flags of its own."""
    # -isystem: their warnings are not ours.
    headers = [kept_pybind11(), sysconfig.get_path("include"), *(cuda_includes(cxx) if with_cuda else [])]
    system = [f"-isystem {in_command(folder)}" for folder in headers]
    common = [*optimization_flags(), f"-I{in_command(ROOT / 'csrc')}", f"-DHMI_WITH_CUDA={int(with_cuda)}"]
    names = [f"-DHMI_CUDA_ARCHITECTURES='\"{' '.join(architectures() if with_cuda else ())}\"'"]
    nvcc_flags = ["-std=c++17", "-lineinfo", "-Xfatbin=-compress-all", "--expt-relaxed-constexpr"]
    nvcc_flags += architecture_flags() if with_cuda else []
    nvcc = f"{in_command(find_nvcc())} -ccbin {in_command(host_compiler(cxx))}" if with_cuda else ""
    linker = f"{nvcc} --cudart=static -Xcompiler -pthread" if with_cuda else f"{cxx} -pthread"
    lines = [
        "ninja_required_version = 1.3",
        f"cxx_flags = {' '.join([*CXX_FLAGS, *common, *system, *names])}",
        f"nvcc_flags = {' '.join([*nvcc_flags, *common])} -Xcompiler -fPIC,-fvisibility=hidden",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d $cxx_flags $file_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {nvcc} -MMD -MF $out.d $nvcc_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {linker} -shared $in -o $out -ldl",
    ]
    objects = []
    for source, file_flags in translation_units(cxx, with_cuda, folder):
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        place = source.relative_to(ROOT) if source.is_relative_to(ROOT / "csrc") else Path(source.name)
        objects.append(as_target(folder / f"{'_'.join(place.parts)}.o"))
        lines.append(f"build {objects[-1]}: {rule} {as_target(source)}")
        lines.append(f"  file_flags = {' '.join(file_flags)}")
    return "\n".join([*lines, f"build {as_target(module)}: link {' '.join(objects)}", ""])


class NinjaBuild(build_ext):
    """Writes one build.ninja and runs it; the objects stay in build/, so that a rebuild is incremental."""

    def build_extension(self, ext: Extension) -> None:
        folder = (
            ROOT
            / "build"
            / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}{'-debug' * DEBUG}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / Path(self.get_ext_filename(ext.name)).name
        (folder / "build.ninja").write_text(ninja_file(find_cxx(), wants_cuda(), built, folder))
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(["ninja", "-C", str(folder), *(["-j", jobs] if jobs else [])], check=True)
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        # Replace, never overwrite: a process may have the old module mapped.
        shutil.copy2(built, module.with_suffix(".new"))
        module.with_suffix(".new").replace(module)


if __name__ == "__main__":
    extension = Extension(
        "hmi_kernels._C",
        sources=[*sources(".cpp"), *sources(".cu")],
        depends=[*sources(".h"), *sources(".cuh")],
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": NinjaBuild})
