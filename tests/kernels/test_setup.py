"""setup.py: what it makes of the compilers and the environment that it finds. Nothing is compiled."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[2]
CUDA_13 = (75, 80, 86, 87, 89, 90, 100, 103, 120)


@pytest.fixture
def build() -> ModuleType:
    """setup.py, which has remembered nothing."""
    specification = importlib.util.spec_from_file_location("hmi_setup", ROOT / "setup.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "HMI_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


def write_command(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for CUDA 13, in a folder that has a space, with its headers where conda-forge puts them."""
    home = tmp_path / "a toolkit"
    monkeypatch.setenv("CUDA_HOME", str(home))
    write_nvcc(home)
    return home


def write_nvcc(home: Path, architectures: tuple[int, ...] = CUDA_13) -> None:
    listed = " ".join(f"compute_{number}" for number in architectures)
    include = f'"-I{home}/bin/../targets/x86_64-linux/include"'
    write_command(
        home / "bin" / "nvcc",
        f'[ "$1" = --list-gpu-arch ] && printf "%s\\n" {listed}',
        f"""echo '#$ TOP={home}/bin/..' >&2; echo '#$ INCLUDES={include}  ' >&2""",
    )


@pytest.mark.parametrize(
    ("requested", "architectures", "expected", "told"),
    [
        (None, CUDA_13, "8.0 9.0+PTX", ""),
        ("", CUDA_13, "8.0 9.0+PTX", ""),
        ("8.0;9.0a 10.0+PTX", CUDA_13, "8.0 9.0a 10.0+PTX", ""),
        ("6.0 7.5 8.0 8.6 9.0+PTX", CUDA_13, "8.0 8.6 9.0+PTX", "not compiled for 7.5"),
        ("Turing;Ampere;Hopper", CUDA_13, "8.0 8.6+PTX 9.0+PTX", "not compiled for 7.5"),
        # CUDA before 11.8: later GPUs are served by the driver's compiler.
        (None, (52, 75, 80, 86, 87), "8.0+PTX", "not compiled for 9.0+PTX, which "),
        ("8.0 9.0", (52, 75, 80, 86, 87), "8.0", "not compiled for 9.0, which "),
        ("7.0 7.5+PTX", CUDA_13, "", "run on GPUs from 8.0 on"),
        (None, (), "", "not compiled for 8.0"),
    ],
)
def test_architectures_are_those_that_can_be_compiled(
    build: ModuleType,
    toolkit: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    requested: str | None,
    architectures: tuple[int, ...],
    expected: str,
    told: str,
) -> None:
    write_nvcc(toolkit, architectures)
    if requested is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", requested)
    assert " ".join(build.architectures()) == expected
    output = capsys.readouterr().out
    assert told in output
    assert bool(output) == bool(told)
    # Without any, a build that nobody asked to have CUDA has none.
    assert build.wants_cuda() == bool(expected)
    monkeypatch.setenv("HMI_BUILD_CUDA", "1")
    if expected:
        assert build.wants_cuda()
    else:
        with pytest.raises(SystemExit, match=r"no architecture to compile for.*let TORCH_CUDA_ARCH_LIST"):
            build.wants_cuda()


@pytest.mark.parametrize("requested", ["Fermi", "80", "8.0,9.0", "sm_90", "9.0b"])
def test_what_names_no_architecture_ends_the_build(
    build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch, requested: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", requested)
    with pytest.raises(
        SystemExit, match=f"names '{requested}', which is no architecture: use numbers such as"
    ):
        build.wants_cuda()


def test_architectures_become_flags_once(
    build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;Ampere;9.0a")
    assert build.architecture_flags() == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_86,code=compute_86",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


def test_nvcc_is_given_the_compiler_without_its_launcher(
    build: ModuleType, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = write_command(tmp_path / "launcher", 'exec "$@"')
    compiler = build.host_compiler(build.find_cxx())
    monkeypatch.setattr(build, "kept_pybind11", lambda: tmp_path)
    monkeypatch.setenv("CXX", f"{launcher} {compiler} -m64")
    text = build.ninja_file(build.find_cxx(), True, tmp_path / "module", tmp_path)
    commands = {
        line.split(" = ", maxsplit=1)[1] for line in text.splitlines() if line.startswith("  command = ")
    }
    assert len(commands) == 3
    by_nvcc = [shlex.split(command) for command in commands if "bin/nvcc" in command]
    assert len(by_nvcc) == 2
    for words in by_nvcc:
        assert words[words.index("-ccbin") + 1] == compiler
        assert str(launcher) not in words
    assert any(command.startswith(f"{launcher} {compiler} -m64 ") for command in commands)
    assert f"-isystem {shlex.quote(str(toolkit / 'targets/x86_64-linux/include'))}" in text


@pytest.mark.parametrize("with_cuda", [False, True])
def test_every_source_is_compiled_once_and_again_only_when_it_changed(
    build: ModuleType, tmp_path: Path, with_cuda: bool
) -> None:
    units = build.translation_units("g++", with_cuda, tmp_path)
    joined = [source for source, _ in units if source.parent == tmp_path]
    included = [
        build.ROOT / line.removeprefix('#include "').removesuffix('"')
        for source in joined
        for line in source.read_text().splitlines()
    ]
    compiled = [source for source, _ in units if source not in joined] + included
    csrc = build.ROOT / "csrc"
    expected = [*csrc.rglob("*.cpp"), *(csrc.rglob("*.cu") if with_cuda else [])]
    if not with_cuda:
        of_cuda = [csrc / "cuda", csrc / "bindings" / "cuda"]
        expected = [each for each in expected if not str(each).startswith(tuple(map(str, of_cuda)))]
    left_out = set() if build.targets_x86("g++") else {build.ROOT / source for source in build.SIMD_FLAGS}
    assert sorted(compiled) == sorted(set(expected) - left_out)
    times = [source.stat().st_mtime_ns for source in joined]
    build.translation_units("g++", with_cuda, tmp_path)
    assert [source.stat().st_mtime_ns for source in joined] == times


def test_a_command_that_names_no_compiler_is_none_for_nvcc(build: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"let it be the last word but for options.*or set HMI_BUILD_CUDA=0"):
        build.host_compiler("g++ --sysroot /nowhere/at/all")


def test_a_compiler_without_what_the_sources_use_is_not_taken(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GCC 7 and 8 know C++17, but not every builtin."""
    old = write_command(tmp_path / "old-g++", "! grep -q __builtin_convertvector")
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(SystemExit, match=r"needs a C.*17 compiler, GCC 9 or later or Clang; tried .*old-g"):
        build.find_cxx()
