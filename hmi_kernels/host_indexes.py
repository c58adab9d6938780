"""Segments and slot tables that a caller left in host memory while the batch is on a device."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hmi_kernels.native import native

__all__ = [
    "MatrixTable",
    "SlotTable",
    "check_matrices_on_host",
    "check_on_host",
    "check_values",
    "has_segments_on_host",
    "on_device",
]


class SlotTable(NamedTuple):
    """Where the slots' blocks lie; a block of rank r takes ``r * per_rank + fixed`` elements of the arena."""

    offsets: Tensor
    ranks: Tensor | None
    """None for blocks without a rank, whose offset -1 says that the slot has none."""
    activations: Tensor | None
    arena_size: int
    per_rank: int
    fixed: int


def has_segments_on_host(device: torch.device, segment_offsets: Tensor, segment_slots: Tensor) -> bool:
    """Whether :func:`check_on_host` has something to check."""
    return device not in (segment_offsets.device, segment_slots.device)


def check_on_host(
    device: torch.device,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    num_tokens: int,
    table: SlotTable,
    *,
    multiple: int = 1,
    max_rank: int | None = None,
) -> None:
    """Raises ValueError on values out of bounds in tensors of another memory than the device's own.

    What lies on the device is for the kernels to check. ``multiple`` (of ranks and offsets) and ``max_rank``
    are what the backend asks for beyond that blocks lie in the arena.
    """
    if not has_segments_on_host(device, segment_offsets, segment_slots):
        return
    parts = (table.offsets, table.ranks, table.activations)
    is_whole = all(part is None or part.device != device for part in parts)
    check_values(
        segment_offsets,
        segment_slots,
        num_tokens,
        table,
        has_table=is_whole,
        multiple=multiple,
        max_rank=max_rank,
    )


def check_values(
    segment_offsets: Tensor,
    segment_slots: Tensor,
    num_tokens: int,
    table: SlotTable,
    *,
    has_table: bool = True,
    multiple: int = 1,
    max_rank: int | None = None,
) -> None:
    """Raises ValueError on values out of bounds; of the table only if it ``has_table`` in host memory."""
    parts = (table.offsets, table.ranks, table.activations)
    offsets, ranks, activations = (part.data_ptr() if has_table and part is not None else 0 for part in parts)
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
        multiple,
        table.arena_size if max_rank is None else max_rank,
    )


class _MatrixBatch(Protocol):
    """What the ops on slots' matrices have in common."""

    @property
    def inputs(self) -> Tensor: ...
    @property
    def segment_offsets(self) -> Tensor: ...
    @property
    def segment_slots(self) -> Tensor: ...
    @property
    def slot_offsets(self) -> Tensor: ...
    @property
    def slot_rows(self) -> Tensor: ...
    @property
    def slot_columns(self) -> Tensor: ...


class MatrixTable(NamedTuple):
    """Where the slots' matrices lie, and what the op and its backend allow."""

    offsets: Tensor
    rows: Tensor
    columns: Tensor
    arena_size: int
    most: tuple[int, int]
    """Rows and columns."""
    multiple: int
    """Of offsets, rows and columns."""

    @classmethod
    def of(cls, batch: _MatrixBatch, arena_size: int, most: tuple[int, int], multiple: int) -> MatrixTable:
        """The table of a batch's slots."""
        return cls(batch.slot_offsets, batch.slot_rows, batch.slot_columns, arena_size, most, multiple)


def check_matrices_on_host(
    batch: _MatrixBatch, table: MatrixTable, *, must_be_disjoint: bool = False
) -> None:
    """Raises ValueError on values out of bounds in tensors of another memory than the device's own."""
    device = batch.inputs.device
    if device in (batch.segment_offsets.device, batch.segment_slots.device):
        return
    parts = (table.offsets, table.rows, table.columns)
    is_whole = all(part.device != device for part in parts)
    slot_offsets, slot_rows, slot_columns = (part.data_ptr() if is_whole else 0 for part in parts)
    native.check_matrices(
        batch.segment_offsets.data_ptr(),
        batch.segment_slots.data_ptr(),
        batch.segment_slots.shape[0],
        batch.inputs.shape[0],
        table.offsets.shape[0],
        slot_offsets,
        slot_rows,
        slot_columns,
        table.arena_size,
        *table.most,
        table.multiple,
        must_be_disjoint,
    )


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from host memory through page-locked memory, without waiting.

    Raises ValueError under graph capture, which would keep the values of this one call.
    """
    if tensor.device == device:
        return tensor
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("under CUDA graph capture all tensors must be on the device")
    return tensor.pin_memory().to(device, non_blocking=True)
