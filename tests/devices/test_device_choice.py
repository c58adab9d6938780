"""Which device an engine takes, and what it says where there is no GPU for it."""

from __future__ import annotations

import pytest
import torch

import hmi_engine as hmi
import hmi_kernels
from hmi_engine import serving_core
from hmi_engine.errors import DeviceUnavailableError
from hmi_engine.memory import device_choice
from hmi_engine.memory.device_choice import cuda_reason, open_streams
from hmi_engine.memory.streams import HostStreams
from hmi_kernels.backends import BackendStatus


@pytest.fixture
def machine(monkeypatch):
    """A function that makes torch see so many GPUs, and kernels that can or cannot be used on them."""

    def make(gpus, cuda="", triton=""):
        status = {"cuda": BackendStatus(not cuda, cuda), "triton": BackendStatus(not triton, triton)}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(hmi_kernels, "backends", lambda: status)
        monkeypatch.setattr(device_choice, "CudaStreams", lambda device: device)

    return make


def test_auto_is_the_gpu_if_it_can_be_used(machine):
    machine(gpus=0)
    assert isinstance(open_streams("auto"), HostStreams) and isinstance(open_streams("cpu"), HostStreams)
    machine(gpus=2)
    assert open_streams("auto") == open_streams("cuda") == torch.device("cuda:0")
    assert open_streams("cuda:1") == torch.device("cuda:1")
    assert isinstance(open_streams("cpu"), HostStreams)
    machine(gpus=1, cuda="compiled without CUDA")
    assert open_streams("auto") == torch.device("cuda:0"), "Triton's kernels do"
    machine(gpus=1, cuda="compiled without CUDA", triton="triton is not installed")
    assert isinstance(open_streams("auto"), HostStreams)


def test_a_gpu_that_cannot_be_used_is_an_error_that_says_why(machine):
    machine(gpus=1, cuda="compiled without CUDA", triton="triton is not installed")
    with pytest.raises(DeviceUnavailableError, match=r"compiled without CUDA.*triton is not installed"):
        open_streams("cuda")
    machine(gpus=2)
    with pytest.raises(DeviceUnavailableError, match=r"cuda:2.*cuda:0 to cuda:1"):
        open_streams("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a GPU says")
def test_an_engine_says_that_there_is_no_gpu(store):
    with pytest.raises(DeviceUnavailableError) as raised:
        hmi.Engine(store, device="cuda")
    assert cuda_reason() and cuda_reason() in str(raised.value)
    with hmi.Engine(store, device="auto") as engine:
        assert engine.run([]) == []


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_other_names_are_refused(store, name):
    with pytest.raises(ValueError, match="device is"):
        hmi.Engine(store, device=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_cpu_computes_in_float32(store, dtype, monkeypatch):
    monkeypatch.setattr(serving_core, "has_bfloat16_products", lambda: False)
    with pytest.raises(ValueError, match="dtype is"):
        hmi.Engine(store, device="cpu", dtype=dtype)
    with hmi.Engine(store, device="cpu", dtype="float32") as engine:
        assert engine.run([]) == []
