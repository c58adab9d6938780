"""Which device an engine computes on, and why it may not be a GPU."""

from __future__ import annotations

import re

import torch

import hmi_kernels
from hmi_engine.errors import DeviceUnavailableError
from hmi_engine.memory.streams import CudaStreams, DeviceStreams, HostStreams

__all__ = ["DEVICE_NAMES", "cuda_reason", "is_device_name", "open_streams"]

DEVICE_NAMES = "'auto', 'cpu', 'cuda' or 'cuda:<number>'"
_NAME = re.compile(r"auto|cpu|cuda(:\d+)?")


def is_device_name(name: str) -> bool:
    """Whether it is one of :data:`DEVICE_NAMES`."""
    return _NAME.fullmatch(name) is not None


def cuda_reason() -> str:
    """Why engines cannot compute on a GPU here; "" if they can."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"this torch ({torch.__version__}) is built for the CPU"
        return "torch finds no CUDA device or driver"
    status = hmi_kernels.backends()
    if status["cuda"].available or status["triton"].available:
        return ""
    return f"no kernels for it: cuda: {status['cuda'].reason}; triton: {status['triton'].reason}"


def open_streams(name: str) -> DeviceStreams:
    """The streams of a device by its name; ``auto`` is the current GPU, or the CPU where there is none.

    Raises:
        DeviceUnavailableError: a GPU was asked for that cannot be used.
    """
    reason = "" if name == "cpu" else cuda_reason()
    if name == "cpu" or (name == "auto" and reason):
        return HostStreams()
    if reason:
        raise DeviceUnavailableError(
            f"device {name!r} cannot be used: {reason}; `hmi doctor` says more, device='cpu' always works"
        )
    index = int(name.partition(":")[2]) if ":" in name else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise DeviceUnavailableError(
            f"device {name!r} cannot be used: this machine's GPUs are cuda:0 to "
            f"cuda:{torch.cuda.device_count() - 1}"
        )
    return CudaStreams(torch.device("cuda", index))
