"""Grouped adapters: bottleneck and LoRA on one kernel."""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from hmi_kernels.host_indexes import SlotTable, check_on_host, has_segments_on_host, on_device
from hmi_kernels.triton.adapter_kernel import adapter_kernel
from hmi_kernels.triton.layer_norm import MAX_HIDDEN_SIZE, normalize_segments
from hmi_kernels.triton.segments import num_segment_tiles
from hmi_kernels.triton.tuned import tuned_launch

if TYPE_CHECKING:
    from hmi_kernels.adapters import BottleneckArguments, LoraArguments

__all__ = [
    "AdapterCall",
    "grouped_bottleneck",
    "grouped_bottleneck_refuses",
    "grouped_lora",
    "grouped_lora_refuses",
]

MAX_RANK = 256
UNIT = 8
"""Elements that are read at a time where sizes, strides, offsets and ranks are its multiples."""

CHUNKS = {32: 64, 256: 32, 1024: 16}
"""Columns of a chunk by the least bytes of a rank block: several stages must fit into 64 KiB on AMD."""


class AdapterCall(NamedTuple):
    """What both ops are to the kernels: a LoRA has no activations, a bottleneck has one projection."""

    output: Tensor
    hidden_states: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_ranks: Tensor
    slot_scales: Tensor
    slot_activations: Tensor | None
    output_sizes: tuple[int, ...]
    max_rank: int


def grouped_bottleneck(arguments: BottleneckArguments) -> None:
    """See :func:`hmi_kernels.grouped_bottleneck`."""
    hidden_size = arguments.output.shape[1]
    if has_segments_on_host(arguments.output.device, arguments.segment_offsets, arguments.segment_slots):
        _check_on_host(arguments, arguments.slot_activations, 0, 2 * hidden_size + 1, hidden_size)
    weight, bias = arguments.layer_norm_weight, arguments.layer_norm_bias
    with torch.cuda.device_of(arguments.output):
        call = _call(arguments, arguments.slot_activations, (hidden_size,))
        _launch(call)
        if weight is not None and bias is not None:
            normalize_segments(call, weight, bias, arguments.layer_norm_eps)


def grouped_lora(arguments: LoraArguments) -> None:
    """See :func:`hmi_kernels.grouped_lora`."""
    output_sizes = tuple(arguments.output_sizes) or (arguments.output.shape[1],)
    if has_segments_on_host(arguments.output.device, arguments.segment_offsets, arguments.segment_slots):
        for projection, size in enumerate(output_sizes):
            _check_on_host(arguments, None, projection, arguments.hidden_states.shape[1] + size, 0)
    with torch.cuda.device_of(arguments.output):
        _launch(_call(arguments, None, output_sizes))


def grouped_bottleneck_refuses(arguments: BottleneckArguments) -> str:
    """Why these kernels cannot take the arguments; "" if they can."""
    hidden_size = arguments.output.shape[1]
    if arguments.layer_norm_weight is not None and hidden_size > MAX_HIDDEN_SIZE:
        return f"a layer norm needs at most {MAX_HIDDEN_SIZE} columns of output, which has {hidden_size}"
    return grouped_lora_refuses(arguments)


def grouped_lora_refuses(arguments: BottleneckArguments | LoraArguments) -> str:
    """Why these kernels cannot take the arguments; "" if they can."""
    if arguments.output.dtype is torch.float64:
        return "output must not be torch.float64"
    max_rank = _max_rank(arguments)
    return f"max_rank must be at most {MAX_RANK}, not {max_rank}" if max_rank > MAX_RANK else ""


def _max_rank(arguments: BottleneckArguments | LoraArguments) -> int:
    ranks = arguments.slot_ranks
    if arguments.max_rank is not None:
        return arguments.max_rank
    if ranks.device.type != "cpu":
        return MAX_RANK  # to read them would be to wait for the device
    return int(ranks.max()) if ranks.numel() else 0


def _check_on_host(
    arguments: BottleneckArguments | LoraArguments,
    slot_activations: Tensor | None,
    projection: int,
    per_rank: int,
    fixed: int,
) -> None:
    num_slots = arguments.slot_offsets.shape[-1]
    first = projection * num_slots
    offsets, ranks = (
        table.view(-1)[first : first + num_slots] for table in (arguments.slot_offsets, arguments.slot_ranks)
    )
    table = SlotTable(offsets, ranks, slot_activations, arguments.arena.shape[0], per_rank, fixed)
    output, offsets, slots = arguments.output, arguments.segment_offsets, arguments.segment_slots
    check_on_host(output.device, offsets, slots, output.shape[0], table, max_rank=_max_rank(arguments))


def _call(
    arguments: BottleneckArguments | LoraArguments,
    slot_activations: Tensor | None,
    output_sizes: tuple[int, ...],
) -> AdapterCall:
    device = arguments.output.device
    return AdapterCall(
        arguments.output,
        arguments.hidden_states,
        arguments.arena,
        on_device(arguments.segment_offsets, device),
        on_device(arguments.segment_slots, device),
        on_device(arguments.slot_offsets, device),
        on_device(arguments.slot_ranks, device),
        on_device(arguments.slot_scales, device),
        None if slot_activations is None else on_device(slot_activations, device),
        output_sizes,
        _max_rank(arguments),
    )


def _launch(call: AdapterCall) -> None:
    (num_tokens, num_columns), num_segments = call.output.shape, call.segment_slots.shape[0]
    input_size, num_slots = call.hidden_states.shape[1], call.slot_offsets.shape[-1]
    if 0 in (num_tokens, num_columns, num_segments, num_slots, call.max_rank):
        return
    strides = (call.output.stride()[0], call.hidden_states.stride()[0])
    is_even = gcd(UNIT, input_size, *strides, *call.output_sizes) == UNIT
    rank_block = max(16, triton.next_power_of_2(call.max_rank))
    tokens_per_segment = triton.next_power_of_2(triton.cdiv(num_tokens, num_segments))

    tokens_class = min(128, max(16, tokens_per_segment))
    is_bottleneck, unit = int(call.slot_activations is not None), UNIT if is_even else 1

    def grid(chosen: dict[str, Any]) -> tuple[int, int]:
        return num_segment_tiles(num_tokens, num_segments, chosen["tile_rows"]), len(call.output_sizes)

    tuned_launch(
        adapter_kernel,
        grid,
        (tokens_class, input_size, call.output_sizes, is_bottleneck, rank_block, unit, call.output.dtype),
        call.output,
        strides[0],
        call.hidden_states,
        strides[1],
        num_tokens,
        call.arena,
        call.arena.shape[0],
        call.segment_offsets,
        call.segment_slots,
        num_segments,
        call.slot_offsets,
        call.slot_ranks,
        call.slot_activations,
        call.slot_scales,
        num_slots,
        call.max_rank,
        tokens_class,
        input_size=input_size,
        output_sizes=call.output_sizes,
        is_bottleneck=is_bottleneck,
        rank_block=rank_block,
        chunk=_chunk(rank_block * call.output.element_size()),
        unit=unit,
    )


@cache
def _chunk(bytes_of_ranks: int) -> int:
    return max((least, chunk) for least, chunk in CHUNKS.items() if least <= bytes_of_ranks)[1]
