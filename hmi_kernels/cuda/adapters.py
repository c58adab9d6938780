"""Grouped adapters on the backend ``cuda``."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hmi_kernels.cuda import driver
from hmi_kernels.cuda.segments import MAX_RANK, SIZE_MULTIPLE, misaligned, too_many
from hmi_kernels.host_indexes import SlotTable, check_on_host, has_segments_on_host, on_device
from hmi_kernels.library import Implementation

if TYPE_CHECKING:
    from hmi_kernels.adapters import BottleneckArguments, LoraArguments

__all__ = ["BOTTLENECK", "LORA", "check_adapter_shape"]

HIDDEN_SIZES = (256, 4096)
"""Of a bottleneck; smallest and largest."""
LORA_SIZES = (8, 16384)
"""Of the inputs and of each projection's outputs."""
PLANNED_SHARED_BYTES = 163 * 1024
"""Of one block, on sm_80: whatever these limits allow fits. GPUs of 8.6, 8.9 and 12 have less."""


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


def _refuses(arguments: BottleneckArguments | LoraArguments, output_sizes: tuple[int, ...]) -> str:
    output, hidden_states = arguments.output, arguments.hidden_states
    if output.dtype not in (torch.float16, torch.bfloat16):
        return f"output must be torch.float16 or torch.bfloat16, not {output.dtype}"
    if arguments.max_rank is not None and arguments.max_rank > MAX_RANK:
        return f"max_rank must be at most {MAX_RANK}, not {arguments.max_rank}"
    if excess := too_many(output.shape[0], arguments.segment_slots.shape[0]):
        return excess
    return (
        misaligned("output", output)
        or misaligned("hidden_states", hidden_states)
        or misaligned("arena", arguments.arena)
        or _too_large(arguments, output_sizes)
    )


def _too_large(arguments: BottleneckArguments | LoraArguments, output_sizes: tuple[int, ...]) -> str:
    max_bytes = driver.max_shared_bytes(arguments.output.device.index)
    if max_bytes >= PLANNED_SHARED_BYTES:
        return ""
    max_rank = _max_rank(arguments)
    if _plan(arguments, output_sizes, max_rank).is_launchable:
        return ""
    return (
        f"adapters of rank {max_rank} on {sum(output_sizes)} columns do not fit "
        f"the {max_bytes:,} bytes of shared memory that a block has on this GPU"
    )


def _bottleneck_refuses(arguments: BottleneckArguments) -> str:
    hidden_size = arguments.output.shape[1]
    smallest, largest = HIDDEN_SIZES
    if not smallest <= hidden_size <= largest:
        return f"output must have {smallest} to {largest} columns, not {hidden_size}"
    if _address(arguments.layer_norm_weight) % 16 or _address(arguments.layer_norm_bias) % 16:
        return "layer_norm_weight and layer_norm_bias must start at multiples of 16 bytes"
    return _refuses(arguments, (hidden_size,))


def _lora_refuses(arguments: LoraArguments) -> str:
    sizes = arguments.output_sizes or (arguments.output.shape[1],)
    smallest, largest = LORA_SIZES
    for place, size in enumerate((arguments.hidden_states.shape[1], *sizes)):
        if not smallest <= size <= largest or size % SIZE_MULTIPLE:
            name = "output" if place else "hidden_states"
            return (
                f"{name} must have {smallest} to {largest} columns, a multiple of {SIZE_MULTIPLE}, not {size}"
            )
    return _refuses(arguments, tuple(sizes))


def _max_rank(arguments: BottleneckArguments | LoraArguments) -> int:
    """What the caller says, else what can be read without waiting for the device."""
    if arguments.max_rank is not None:
        return min(arguments.max_rank, MAX_RANK)
    if arguments.slot_ranks.device != arguments.output.device and arguments.slot_ranks.numel():
        return max(0, min(int(arguments.slot_ranks.max()), MAX_RANK))
    return MAX_RANK


def _bottleneck(arguments: BottleneckArguments) -> None:
    hidden_size = arguments.output.shape[1]
    if has_segments_on_host(arguments.output.device, arguments.segment_offsets, arguments.segment_slots):
        tables = (arguments.slot_offsets, arguments.slot_ranks, arguments.slot_activations)
        table = SlotTable(*tables, arguments.arena.shape[0], 2 * hidden_size + 1, hidden_size)
        _check_on_host(arguments, table)
    norms = (arguments.layer_norm_weight, arguments.layer_norm_bias)
    _launch(arguments, [hidden_size], arguments.slot_activations, norms, arguments.layer_norm_eps)


def _lora(arguments: LoraArguments) -> None:
    sizes = list(arguments.output_sizes) or [arguments.output.shape[1]]
    if has_segments_on_host(arguments.output.device, arguments.segment_offsets, arguments.segment_slots):
        _check_projections_on_host(arguments, sizes)
    _launch(arguments, sizes, None, (None, None), 0.0)


def _check_projections_on_host(arguments: LoraArguments, sizes: list[int]) -> None:
    input_size, arena_size = arguments.hidden_states.shape[1], arguments.arena.shape[0]
    offsets, ranks = (table.view(len(sizes), -1) for table in (arguments.slot_offsets, arguments.slot_ranks))
    for p, size in enumerate(sizes):
        table = SlotTable(offsets[p], ranks[p], None, arena_size, input_size + size, 0)
        _check_on_host(arguments, table)


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
    max_rank, device = _max_rank(arguments), output.device
    offsets = on_device(arguments.segment_offsets, device)
    slots = on_device(arguments.segment_slots, device)
    slot_offsets = on_device(arguments.slot_offsets, device)
    slot_ranks = on_device(arguments.slot_ranks, device)
    slot_scales = on_device(arguments.slot_scales, device)
    activations = None if slot_activations is None else on_device(slot_activations, device)
    num_elements = _plan(arguments, tuple(output_sizes), max_rank).workspace_elements
    workspace = output.new_empty(num_elements, dtype=torch.float32) if num_elements else None
    with driver.launch_on(output) as launch:
        driver.module().grouped_adapter(
            driver.DATA_TYPES[output.dtype],
            output.data_ptr(),
            output.stride()[0],
            output_sizes,
            hidden_states.data_ptr(),
            hidden_states.stride()[0],
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
            _address(workspace),
            driver.max_shared_bytes(device.index),
            launch.fault,
            launch.stream,
        )


class _Plan(NamedTuple):
    """What a launch asks of its caller."""

    is_launchable: bool
    workspace_elements: int


def _plan(
    arguments: BottleneckArguments | LoraArguments, output_sizes: tuple[int, ...], max_rank: int
) -> _Plan:
    return _plan_of_shape(
        driver.module(),
        *arguments.hidden_states.shape,
        arguments.segment_slots.shape[0],
        sum(output_sizes),
        len(output_sizes),
        max_rank,
        getattr(arguments, "layer_norm_weight", None) is not None,
        driver.max_shared_bytes(arguments.output.device.index),
    )


@lru_cache(maxsize=1024)
def _plan_of_shape(functions: Any, num_tokens: int, input_size: int, num_segments: int, *rest: int) -> _Plan:
    plan = functions.plan_adapter(num_tokens, num_segments, input_size, *rest)
    return _Plan(plan.kernel == "gemv" or plan.tile_rows > 0, plan.workspace_elements)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


BOTTLENECK = Implementation(_bottleneck, _bottleneck_refuses)
LORA = Implementation(_lora, _lora_refuses)
