"""Where CUDA's headers come from, and the build for processors without our switch of stacks."""

from __future__ import annotations

import re
import subprocess

import pytest

from emulator import build as builds
from emulator.build import EMULATOR, EMULATOR_TESTS, ROOT, BuildError, build
from emulator.harness import MODULE_VARIABLES, run_python

CODE = """
import numpy as np
from emulator.shim import floats, launch, shim
with shim(order="random"):
    output = launch("pipeline", np.zeros((7, 64), np.float32), floats(7 * 64 * 4), 7)
assert np.array_equal(output, np.roll(floats(7 * 64 * 4).reshape(7, 64, 4).sum(2), -1, axis=1))
"""


@pytest.fixture
def packaged(monkeypatch):
    """No toolkit: only the PyPI packages."""
    folders = builds.packaged_include_folders()
    if not folders:
        pytest.skip("nvidia-cuda-runtime, -crt and -cccl are not installed; hmi[test] has them")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(builds, "USUAL_TOOLKIT", "/nowhere")
    return folders


def test_kernels_compile_with_packaged_headers(packaged):
    assert builds.cuda_include_folders() == packaged
    kernel = EMULATOR / "kernels" / "tensor_core.cu"
    flags = f"{' '.join(builds.COMMON_FLAGS)} -fsyntax-only {builds.include_flags()}"
    result = subprocess.run(
        [*builds.compiler_command(), *flags.split(), str(kernel)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_emulated_device_has_all_names_of_the_real_one():
    real = (ROOT / "csrc/cuda/device.cuh").read_text()
    emulated = (ROOT / "tests/emulator/include/cuda/device.cuh").read_text()
    functions = re.findall(r"^(?:__device__ __forceinline__|inline) [\w ]+?[ *&]+(\w+)\(", real, re.MULTILINE)
    names = {*functions, *re.findall(r"^#define (HMI_\w+)\(", real, re.MULTILINE)}
    assert {"cp_async16", "ldmatrix_x4", "launch", "HMI_SHARED"} <= names
    missing = {name for name in names if not re.search(rf"\b{name}\(", emulated)}
    assert missing == {"shared_address"}, "only PTX needs it"


def test_the_error_without_headers_says_what_to_install(packaged, monkeypatch):
    monkeypatch.setattr(builds, "packaged_include_folders", lambda: [])
    with pytest.raises(BuildError, match="pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"):
        build("plain", EMULATOR_TESTS)


def test_a_compiler_error_is_told():
    with pytest.raises(BuildError, match=r"no_such_header.h: No such file"):
        build("plain", EMULATOR_TESTS, flags="-include no_such_header.h")


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="plain, race, sanitize, not 'fast'"):
        build("fast")


@pytest.mark.slow
def test_fibers_by_ucontext_and_packaged_headers_run_the_same(packaged):
    module = build("plain", EMULATOR_TESTS, flags="-DEMULATOR_UCONTEXT")
    result = run_python(CODE, {MODULE_VARIABLES["plain"]: str(module)})
    assert result.returncode == 0, result.stderr
