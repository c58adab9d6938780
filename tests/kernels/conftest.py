"""What the kernel tests share: every implementation that this machine can run, and packed sequences."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import hmi_kernels
from hmi_kernels.native import native, native_reason

if native_reason:
    pytest.fail(f"hmi_kernels._C must be built to be tested: {native_reason}", pytrace=False)

IMPLEMENTATIONS = [*(f"cpu-{level}" for level in native.available_simd_levels()), "reference"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every SIMD level of the cpu backend, and on the reference."""
    backend, _, level = request.param.partition("-")
    native.set_simd_level(level or "auto")
    with hmi_kernels.use_backend(backend):
        yield request.param
    native.set_simd_level("auto")


@pytest.fixture(params=native.available_simd_levels())
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every SIMD level of the cpu backend."""
    native.set_simd_level(request.param)
    with hmi_kernels.use_backend("cpu"):
        yield request.param
    native.set_simd_level("auto")


@pytest.fixture(params=["pool", "openmp"])
def threads_mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on our own threads and on torch's."""
    native.set_threads_mode(request.param)
    yield request.param
    native.set_threads_mode("auto")
