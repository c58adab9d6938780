"""Segments and slot tables that a caller left in host memory: checked there, then uploaded."""

from __future__ import annotations

import torch
from torch import Tensor

from hmi_kernels.cuda.segments import SlotTable, on_device
from hmi_kernels.native import native

__all__ = ["check_on_host", "uploaded"]


def check_on_host(
    device: torch.device, segment_offsets: Tensor, segment_slots: Tensor, num_tokens: int, table: SlotTable
) -> None:
    """Raises ValueError on values out of bounds in tensors of another memory than the device's own."""
    if device in (segment_offsets.device, segment_slots.device):
        return  # what lies on the device is for the kernels to check
    parts = (table.offsets, table.ranks, table.activations)
    is_whole = all(part is None or part.device != device for part in parts)
    offsets, ranks, activations = (part.data_ptr() if is_whole and part is not None else 0 for part in parts)
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
        1,
        table.arena_size,
    )


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting. Raises ValueError if graph capture would copy it."""
    return tensor if tensor.device == device else on_device(tensor, device)
