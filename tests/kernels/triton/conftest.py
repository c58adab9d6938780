"""Runs every test of this folder on the Triton kernels, which numpy interprets where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import hmi_kernels
from hmi_kernels.settings import is_triton_interpreted


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    if not is_triton_interpreted():
        pytest.skip("Triton compiles for the GPU of this machine; these tests are of CPU tensors")
    with hmi_kernels.use_backend("triton"):
        yield
