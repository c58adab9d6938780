"""Grouped adapters on the backend ``cuda``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hmi_kernels.cuda import driver
from hmi_kernels.cuda.segments import MAX_RANK, SIZE_MULTIPLE, misaligned, too_many
from hmi_kernels.host_indexes import SlotTable, check_on_host, on_device
from hmi_kernels.library import Implementation

if TYPE_CHECKING:
    from hmi_kernels.adapters import BottleneckArguments, LoraArguments

__all__ = ["BOTTLENECK", "LORA", "check_adapter_shape"]

HIDDEN_SIZES = (256, 4096)
"""Of a bottleneck; smallest and largest."""
LORA_SIZES = (8, 16384)
"""Of the inputs and of each projection's outputs."""


def check_adapter_shape(*, input_size: int, output_size: int, rank: int, is_bottleneck: bool) -> None:
    """Raises ValueError if the CUDA kernels cannot run an adapter of this shape, naming what to change.

    To be asked when an adapter is registered: a kernel that meets such a rank only leaves its segment alone.
    """
    smallest, largest = HIDDEN_SIZES if is_bottleneck else LORA_SIZES
    for name, size in (("input_size", input_size), ("output_size", output_size)):
        if not smallest <= size <= largest or size % SIZE_MULTIPLE:
            raise ValueError(
                f"{name} must be a multiple of {SIZE_MULTIPLE} from {smallest} to {largest} on the cuda "
                f"backend, not {size}; the triton backend takes any"
            )
    if not SIZE_MULTIPLE <= rank <= MAX_RANK or rank % SIZE_MULTIPLE:
        raise ValueError(
            f"rank must be a multiple of {SIZE_MULTIPLE} up to {MAX_RANK} on the cuda backend, not {rank}: "
            "pad the adapter with zeros to the next multiple, which changes no result"
        )


def _refuses(arguments: BottleneckArguments | LoraArguments) -> str:
    output, hidden_states = arguments.output, arguments.hidden_states
    if output.dtype not in (torch.float16, torch.bfloat16):
        return f"output must be torch.float16 or torch.bfloat16, not {output.dtype}"
    if excess := too_many(output.shape[0], arguments.segment_slots.shape[0]):
        return excess
    named = (("output", output), ("hidden_states", hidden_states), ("arena", arguments.arena))
    return next((reason for name, tensor in named if (reason := misaligned(name, tensor))), "")


def _bottleneck_refuses(arguments: BottleneckArguments) -> str:
    hidden_size = arguments.output.shape[1]
    smallest, largest = HIDDEN_SIZES
    if not smallest <= hidden_size <= largest:
        return f"output must have {smallest} to {largest} columns, not {hidden_size}"
    norms = (arguments.layer_norm_weight, arguments.layer_norm_bias)
    if any(norm is not None and norm.data_ptr() % 16 for norm in norms):
        return "layer_norm_weight and layer_norm_bias must start at multiples of 16 bytes"
    return _refuses(arguments)


def _lora_refuses(arguments: LoraArguments) -> str:
    sizes = arguments.output_sizes or (arguments.output.shape[1],)
    for name, size in (("hidden_states", arguments.hidden_states.shape[1]), *(("output", s) for s in sizes)):
        smallest, largest = LORA_SIZES
        if not smallest <= size <= largest or size % SIZE_MULTIPLE:
            return (
                f"{name} must have {smallest} to {largest} columns, a multiple of {SIZE_MULTIPLE}, not {size}"
            )
    return _refuses(arguments)


def _max_rank(arguments: BottleneckArguments | LoraArguments) -> int:
    """What the caller says, else what can be read without waiting for the device."""
    if arguments.max_rank is not None:
        return min(arguments.max_rank, MAX_RANK)
    if arguments.slot_ranks.device != arguments.output.device and arguments.slot_ranks.numel():
        return max(0, min(int(arguments.slot_ranks.max()), MAX_RANK))
    return MAX_RANK


def _bottleneck(arguments: BottleneckArguments) -> None:
    hidden_size, tables = arguments.output.shape[1], (arguments.slot_offsets, arguments.slot_ranks)
    sizes = (arguments.arena.shape[0], 2 * hidden_size + 1, hidden_size)
    table = SlotTable(*tables, arguments.slot_activations, *sizes)
    _check_on_host(arguments, table)
    norms = (arguments.layer_norm_weight, arguments.layer_norm_bias)
    _launch(arguments, [hidden_size], arguments.slot_activations, norms, arguments.layer_norm_eps)


def _lora(arguments: LoraArguments) -> None:
    input_size, arena_size = arguments.hidden_states.shape[1], arguments.arena.shape[0]
    sizes = list(arguments.output_sizes or arguments.output.shape[1:])
    offsets, ranks = (table.view(len(sizes), -1) for table in (arguments.slot_offsets, arguments.slot_ranks))
    for p, size in enumerate(sizes):
        table = SlotTable(offsets[p], ranks[p], None, arena_size, input_size + size, 0)
        _check_on_host(arguments, table)
    _launch(arguments, sizes, None, (None, None), 0.0)


def _check_on_host(arguments: BottleneckArguments | LoraArguments, table: SlotTable) -> None:
    check_on_host(
        arguments.output.device,
        arguments.segment_offsets,
        arguments.segment_slots,
        arguments.output.shape[0],
        table,
        multiple=SIZE_MULTIPLE,
        max_rank=MAX_RANK,
    )


def _launch(
    arguments: BottleneckArguments | LoraArguments,
    output_sizes: list[int],
    slot_activations: Tensor | None,
    layer_norm: tuple[Tensor | None, Tensor | None],
    layer_norm_eps: float,
) -> None:
    output, hidden_states, arena = arguments.output, arguments.hidden_states, arguments.arena
    num_tokens, input_size = hidden_states.shape
    num_segments, num_slots = arguments.segment_slots.shape[0], arguments.slot_offsets.shape[-1]
    if num_tokens == 0 or num_segments == 0:
        return
    max_rank = _max_rank(arguments)
    offsets, slots, slot_offsets, slot_ranks, slot_scales = (
        on_device(index, output.device)
        for index in (
            arguments.segment_offsets,
            arguments.segment_slots,
            arguments.slot_offsets,
            arguments.slot_ranks,
            arguments.slot_scales,
        )
    )
    activations = None if slot_activations is None else on_device(slot_activations, output.device)
    plan = driver.module().plan_adapter(
        num_tokens,
        num_segments,
        input_size,
        sum(output_sizes),
        len(output_sizes),
        max_rank,
        layer_norm[0] is not None,
    )
    workspace = output.new_empty(plan.workspace_elements, dtype=torch.float32)
    with driver.launch_on(output) as launch:
        driver.module().grouped_adapter(
            driver.DATA_TYPES[output.dtype],
            output.data_ptr(),
            output.stride(0),
            output_sizes,
            hidden_states.data_ptr(),
            hidden_states.stride(0),
            num_tokens,
            input_size,
            arena.data_ptr(),
            arena.shape[0],
            offsets.data_ptr(),
            slots.data_ptr(),
            num_segments,
            slot_offsets.data_ptr(),
            slot_ranks.data_ptr(),
            _address(activations),
            slot_scales.data_ptr(),
            num_slots,
            max_rank,
            _address(layer_norm[0]),
            _address(layer_norm[1]),
            layer_norm_eps,
            workspace.data_ptr(),
            launch.fault,
            launch.stream,
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


BOTTLENECK = Implementation(_bottleneck, _bottleneck_refuses)
LORA = Implementation(_lora, _lora_refuses)
