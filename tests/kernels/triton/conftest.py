"""Runs every test of this folder on the Triton kernels, which numpy interprets where there is no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from emulator.device_choice import chosen_device
from emulator.staging import Staged

import hmi_kernels
from hmi_kernels.settings import is_triton_interpreted


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    if not is_triton_interpreted() and chosen_device() != "cuda":
        pytest.skip("Triton compiles for the GPU of this machine: --device cuda runs these tests there")
    target = {"cpu": None, "staged": "cpu", "cuda": "cuda"}[chosen_device()]
    detour = contextlib.nullcontext() if target is None else Staged(torch.device(target))
    with hmi_kernels.use_backend("triton"), detour:
        yield
