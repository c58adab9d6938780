"""Segments and slot tables on their way to a kernel: checked if they are in host memory, then uploaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hmi_kernels.cuda import driver
from hmi_kernels.native import native

__all__ = ["MAX_RANK", "SIZE_MULTIPLE", "SlotTable", "check_on_host", "misaligned", "on_device"]

SIZE_MULTIPLE = 8
"""Elements in 16 bytes: what sizes, ranks and offsets are multiples of (csrc/cuda/adapter_plan.h)."""
MAX_RANK = 256


class SlotTable(NamedTuple):
    """Where the slots' blocks lie; a block of rank r takes ``r * per_rank + fixed`` elements of the arena."""

    offsets: Tensor
    ranks: Tensor | None
    """None for blocks without a rank, whose offset -1 says that the slot has none."""
    activations: Tensor | None
    arena_size: int
    per_rank: int
    fixed: int


def check_on_host(segment_offsets: Tensor, segment_slots: Tensor, num_tokens: int, table: SlotTable) -> None:
    """Raises ValueError on values out of bounds in the tensors that lie in host memory.

    On the emulator all do, and nothing is checked: what is tested there are the kernels' own checks.
    """
    if not (is_on_host(segment_offsets) and is_on_host(segment_slots)):
        return
    parts = (table.offsets, table.ranks, table.activations)
    has_tables = all(part is None or is_on_host(part) for part in parts)
    offsets, ranks, activations = (
        part.data_ptr() if has_tables and part is not None else 0 for part in parts
    )
    native.check_segments(
        segment_offsets.data_ptr(),
        segment_slots.data_ptr(),
        segment_slots.shape[0],
        num_tokens,
        table.offsets.shape[0],
        offsets,
        ranks,
        activations,
        table.arena_size,
        table.per_rank,
        table.fixed,
        SIZE_MULTIPLE,
        MAX_RANK,
    )


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from host memory through page-locked memory, without waiting.

    Raises ValueError under graph capture, which would keep the values of this one call.
    """
    if not is_on_host(tensor):
        return tensor
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("under CUDA graph capture all tensors must be on the device")
    return tensor.pin_memory().to(device, non_blocking=True)


def is_on_host(tensor: Tensor) -> bool:
    """Whether a kernel cannot read the tensor where it lies."""
    return not tensor.is_cuda and not driver.is_emulated()


def misaligned(name: str, tensor: Tensor) -> str:
    """Why the tensor's rows cannot be read 16 bytes at a time, "" if they can."""
    if tensor.data_ptr() % 16:
        return f"{name} must start at a multiple of 16 bytes"
    if tensor.dim() == 1:
        return ""
    if tensor.shape[1] % SIZE_MULTIPLE:
        return f"{name} must have a multiple of {SIZE_MULTIPLE} columns, not {tensor.shape[1]}"
    if tensor.shape[0] > 1 and tensor.stride(0) % SIZE_MULTIPLE:
        return f"rows of {name} must be a multiple of {SIZE_MULTIPLE} elements apart, not {tensor.stride(0)}"
    return ""
