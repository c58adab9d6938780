"""The compiled CUDA kernels and what each of their calls needs: device, stream, word for faults."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hmi_kernels.cuda.architectures import compiled_architectures
from hmi_kernels.native import native, native_reason

__all__ = [
    "DATA_TYPES",
    "is_emulated",
    "launch_on",
    "max_shared_bytes",
    "module",
    "raise_faults",
    "reason",
    "use_module",
]

DATA_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.uint8: 4}
"""csrc/common/data_type.h."""

_FAULTS = (
    "",
    "segment_offsets are out of bounds or decrease at segment {}",
    "segment_slots are out of bounds at segment {}",
    "slot_offsets are out of bounds, or not a multiple of 8, at slot {}",
    "slot_ranks are out of bounds, not a multiple of 8 or above max_rank at slot {}",
    "slot_activations are out of bounds at slot {}",
    "sequence_offsets are out of bounds or decrease at sequence {}",
    "chains name an index that is not there at sequence {}",
    "input_ids are out of bounds at token {}",
    "references name a row that is not there at token {}",
    "sequence_unigram_tables are out of bounds at sequence {}",
    "sequence {} has more tokens than there are position_embeddings",
    "slot_rows or slot_columns are out of bounds, or not a multiple of 8, at slot {}",
)
"""csrc/cuda/fault.h, in its order."""

_OLDEST_CAPABILITY = (8, 0)


class _Module(NamedTuple):
    functions: Any
    is_emulated: bool


_module = _Module(None if native_reason else getattr(native, "cuda", None), False)
_fault_words: dict[int, tuple[ctypes.c_uint64, int]] = {}
_NO_FAULTS = (ctypes.c_uint64(0), 0)


def reason() -> str:
    """Why the CUDA kernels cannot run here, "" if they can."""
    if native_reason and _module.functions is None:
        return native_reason
    if _module.functions is None:
        return "compiled without CUDA (no nvcc when hmi_kernels was built, or HMI_BUILD_CUDA=0)"
    if _module.is_emulated:
        return ""
    if torch.version.cuda is None:  # for the CPU, or for AMD's GPUs, which torch calls cuda too
        return f"this torch ({torch.__version__}) is not built for CUDA"
    return _reason_of_devices() if torch.cuda.is_available() else "no CUDA device or driver"


def _reason_of_devices() -> str:
    """Of all, as a process has one choice of backends. Asks the driver only: torch's own question would take
    memory of every device."""
    compiled = compiled_architectures(native.cuda_architectures)
    for index in range(torch.cuda.device_count()):
        major, minor = _module.functions.compute_capability(index)
        if (major, minor) < _OLDEST_CAPABILITY:
            return f"the kernels need compute capability 8.0 or later, but cuda:{index} has {major}.{minor}"
        if not any(architecture.serves((major, minor)) for architecture in compiled):
            return (
                f"compiled for compute capability {native.cuda_architectures}, but cuda:{index} has "
                f"{major}.{minor}: build hmi_kernels again with {major}.{minor} in TORCH_CUDA_ARCH_LIST"
            )
    return ""


def max_shared_bytes(device: int | None) -> int:
    """Shared memory that one block of a launch on this device may have."""
    return _max_shared_bytes(_module.functions, device or 0)


@lru_cache(maxsize=64)
def _max_shared_bytes(functions: Any, device: int) -> int:
    return int(functions.max_shared_bytes(device))


def module() -> Any:
    """The functions of ``_C.cuda``."""
    return _module.functions


def is_emulated() -> bool:
    """Whether the CUDA kernels are compiled for the CPU (see :func:`use_module`)."""
    return _module.is_emulated


@contextlib.contextmanager
def use_module(functions: Any) -> Iterator[None]:
    """For tests: within the with-statement the backend ``cuda`` is these functions, over CPU tensors."""
    global _module, _fault_words
    previous = _module, _fault_words
    _module, _fault_words = _Module(functions, True), {}
    try:
        yield
    finally:
        _module, _fault_words = previous


class Launch:
    """For a with-statement, within which the device is current; holds what every launch is given: addresses.

    A class, as a generator's context takes as long as a launch.
    """

    __slots__ = ("_device", "fault", "stream")

    def __init__(self, index: int) -> None:
        self._device: torch.cuda.device | None = None
        if _module.is_emulated:
            self.stream = 0
        else:
            self.stream = _current_stream(index)
            if torch.cuda.current_device() != index:
                self._device = torch.cuda.device(index)
        if index not in _fault_words:
            with self:
                _allocate_fault_word(index)
        self.fault = _fault_words[index][1]

    def __enter__(self) -> Launch:
        if self._device is not None:
            self._device.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device is not None:
            self._device.__exit__(kind, error, trace)


def launch_on(tensor: Tensor) -> Launch:
    """Makes the tensor's device current and gives its current stream and fault word.

    Raises ValueError if an earlier call on this device was given values out of bounds.
    """
    index = tensor.device.index or 0
    raise_faults(index)
    return Launch(index)


def _public_current_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# What Triton and torch's own compiler ask too: the public way makes an object for each call.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _public_current_stream)


def raise_faults(device: int = 0) -> None:
    """Raises ValueError if a kernel on the device found offsets, slots, ids or references out of bounds.

    Such values lie on the device and cannot be checked before a launch. Kernels leave what they belong to
    as it was (no memory out of bounds is read or written) and report it here. The ops call this first;
    call it after synchronizing to learn of the last ones. Of several faults one is told.
    """
    word, _ = _fault_words.get(device, _NO_FAULTS)
    if value := word.value:
        word.value = 0
        what = _FAULTS[value >> 48].format(value & ((1 << 48) - 1))
        raise ValueError(f"in an earlier call on cuda:{device} {what}; nothing was computed for it")


def _allocate_fault_word(device: int) -> None:
    address, device_address = _module.functions.allocate_fault_word()
    _fault_words[device] = (ctypes.c_uint64.from_address(address), device_address)
