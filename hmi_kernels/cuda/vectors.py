"""Grouped vectors on the backend ``cuda``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hmi_kernels.cuda import driver
from hmi_kernels.cuda.segments import SIZE_MULTIPLE, misaligned, too_many
from hmi_kernels.host_indexes import SlotTable, check_on_host, has_segments_on_host, on_device
from hmi_kernels.library import Implementation

if TYPE_CHECKING:
    from hmi_kernels.vectors import VectorArguments

__all__ = ["BIAS", "SCALE"]


def _refuses(arguments: VectorArguments) -> str:
    if arguments.rows.dtype not in (torch.float16, torch.bfloat16):
        return f"the rows must be torch.float16 or torch.bfloat16, not {arguments.rows.dtype}"
    excess = too_many(arguments.rows.shape[0], arguments.segment_slots.shape[0])
    return excess or misaligned("the rows", arguments.rows) or misaligned("arena", arguments.arena)


def _run(arguments: VectorArguments, *, is_scale: bool) -> None:
    rows, arena = arguments.rows, arguments.arena
    num_tokens, hidden_size = rows.shape
    device, offsets, slots = rows.device, arguments.segment_offsets, arguments.segment_slots
    if has_segments_on_host(device, offsets, slots):
        table = SlotTable(arguments.slot_offsets, None, None, arena.shape[0], 0, hidden_size)
        check_on_host(device, offsets, slots, num_tokens, table, multiple=SIZE_MULTIPLE)
    offsets, slots = on_device(offsets, device), on_device(slots, device)
    slot_offsets = on_device(arguments.slot_offsets, device)
    with driver.launch_on(rows) as launch:
        driver.module().grouped_vector(
            is_scale,
            driver.DATA_TYPES[rows.dtype],
            rows.data_ptr(),
            rows.stride()[0],
            num_tokens,
            hidden_size,
            arena.data_ptr(),
            arena.shape[0],
            offsets.data_ptr(),
            slots.data_ptr(),
            slots.shape[0],
            slot_offsets.data_ptr(),
            slot_offsets.shape[0],
            launch.fault,
            launch.stream,
        )


def _scale(arguments: VectorArguments) -> None:
    _run(arguments, is_scale=True)


def _bias(arguments: VectorArguments) -> None:
    _run(arguments, is_scale=False)


SCALE = Implementation(_scale, _refuses)
BIAS = Implementation(_bias, _refuses)
