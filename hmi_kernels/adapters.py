"""Grouped adapters: one call for a batch whose segments of tokens belong to different tenants."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hmi_kernels import reference
from hmi_kernels.checks import require_no_overlap, require_rows, require_vector
from hmi_kernels.library import define
from hmi_kernels.native import native

__all__ = ["ACTIVATIONS", "grouped_bottleneck", "grouped_lora"]

ACTIVATIONS = reference.ACTIVATIONS
"""Names of the activations; the place of a name is its number in ``slot_activations``."""


def grouped_bottleneck(
    output: Tensor,
    hidden_states: Tensor,
    arena: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_ranks: Tensor,
    slot_activations: Tensor,
    slot_scales: Tensor,
) -> None:
    """Adds each segment's bottleneck adapter to ``output``, in place (Houlsby et al., arXiv 1902.00751).

    Semantics, for ``slot = segment_slots[g]`` and ``t`` in ``segment_offsets[g] .. segment_offsets[g + 1]``:
    ``output[t] += scale * (activation(hidden_states[t] @ down + down_bias) @ up + up_bias)``, where the block
    ``down[hidden, rank], down_bias[rank], up[rank, hidden], up_bias[hidden]`` starts at
    ``arena[slot_offsets[slot]]``.
    A token's result depends neither on the other tokens nor on the number of threads, bit for bit.

    Args:
        output: float32 [tokens, hidden]; rows may lie apart (a column slice of a wider tensor).
        hidden_states: float32 [tokens, hidden], likewise; must not share memory with ``output``.
        arena: float32 [elements].
        segment_offsets: int64 [segments + 1], not decreasing; tokens of no segment stay as they are.
        segment_slots: int32 [segments]; -1 for no adapter.
        slot_offsets: int64 [slots], in elements of the arena. Multiples of 16 are fastest.
        slot_ranks: int32 [slots]; 0 for a slot that has nothing here.
        slot_activations: int32 [slots], places in ``ACTIVATIONS``.
        slot_scales: float32 [slots].

    Raises TypeError or ValueError, before anything is changed, on arguments of another kind or out of bounds.
    """
    _grouped_bottleneck(
        output,
        hidden_states,
        arena,
        segment_offsets,
        segment_slots,
        slot_offsets,
        slot_ranks,
        slot_activations,
        slot_scales,
    )


def grouped_lora(
    output: Tensor,
    hidden_states: Tensor,
    arena: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_ranks: Tensor,
    slot_scales: Tensor,
) -> None:
    """Adds each segment's LoRA to ``output``, in place (Hu et al., arXiv 2106.09685).

    Semantics: ``output[t] += scale * ((hidden_states[t] @ a) @ b)``, where the block
    ``a[in, rank], b[rank, out]`` (the transposes of PEFT's ``lora_A`` and ``lora_B``) starts at
    ``arena[slot_offsets[slot]]``.

    Args:
        output: float32 [tokens, out]; rows may lie apart (a column slice of a wider tensor).
        hidden_states: float32 [tokens, in], likewise; must not share memory with ``output``.
        arena, segment_offsets, segment_slots, slot_offsets, slot_ranks, slot_scales: as for
            :func:`grouped_bottleneck`.

    Raises TypeError or ValueError, before anything is changed, on arguments of another kind or out of bounds.
    """
    _grouped_lora(
        output, hidden_states, arena, segment_offsets, segment_slots, slot_offsets, slot_ranks, slot_scales
    )


class _LoraArguments(NamedTuple):
    output: Tensor
    hidden_states: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_ranks: Tensor
    slot_scales: Tensor


class _BottleneckArguments(NamedTuple):
    output: Tensor
    hidden_states: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_ranks: Tensor
    slot_activations: Tensor
    slot_scales: Tensor


def _check_lora(arguments: _LoraArguments | _BottleneckArguments) -> None:
    output, hidden_states = arguments.output, arguments.hidden_states
    require_rows("output", output, (None, None))
    require_rows("hidden_states", hidden_states, (output.shape[0], None))
    require_no_overlap(output, hidden_states)
    require_vector("arena", arguments.arena, torch.float32)
    require_vector("segment_slots", arguments.segment_slots, torch.int32)
    num_segments = arguments.segment_slots.shape[0]
    require_vector("segment_offsets", arguments.segment_offsets, torch.int64, num_segments + 1)
    require_vector("slot_offsets", arguments.slot_offsets, torch.int64)
    num_slots = arguments.slot_offsets.shape[0]
    require_vector("slot_ranks", arguments.slot_ranks, torch.int32, num_slots)
    require_vector("slot_scales", arguments.slot_scales, torch.float32, num_slots)


def _check_bottleneck(arguments: _BottleneckArguments) -> None:
    _check_lora(arguments)
    num_tokens, hidden_size = arguments.output.shape
    require_rows("hidden_states", arguments.hidden_states, (num_tokens, hidden_size))
    num_slots = arguments.slot_offsets.shape[0]
    require_vector("slot_activations", arguments.slot_activations, torch.int32, num_slots)


def _run_on_cpu(arguments: _LoraArguments | _BottleneckArguments) -> None:
    output, hidden_states = arguments.output, arguments.hidden_states
    num_tokens, output_size = output.shape
    native.grouped_adapter(
        output.data_ptr(),
        output.stride(0),
        output_size,
        hidden_states.data_ptr(),
        hidden_states.stride(0),
        hidden_states.shape[1],
        num_tokens,
        arguments.arena.data_ptr(),
        arguments.arena.shape[0],
        arguments.segment_offsets.data_ptr(),
        arguments.segment_slots.data_ptr(),
        arguments.segment_slots.shape[0],
        arguments.slot_offsets.data_ptr(),
        arguments.slot_ranks.data_ptr(),
        arguments.slot_activations.data_ptr() if isinstance(arguments, _BottleneckArguments) else 0,
        arguments.slot_scales.data_ptr(),
        arguments.slot_offsets.shape[0],
        torch.get_num_threads(),
    )


def _fake_in_place(arguments: _LoraArguments | _BottleneckArguments) -> None:
    """The output exists; nothing is made."""


_SHARED_ARGUMENTS = (
    "Tensor(a!) output, Tensor hidden_states, Tensor arena, Tensor segment_offsets, Tensor segment_slots, "
    "Tensor slot_offsets, Tensor slot_ranks"
)
_grouped_bottleneck = define(
    f"grouped_bottleneck({_SHARED_ARGUMENTS}, Tensor slot_activations, Tensor slot_scales) -> ()",
    arguments=_BottleneckArguments,
    check=_check_bottleneck,
    cpu=_run_on_cpu,
    reference=reference.grouped_bottleneck,
    fake=_fake_in_place,
)
_grouped_lora = define(
    f"grouped_lora({_SHARED_ARGUMENTS}, Tensor slot_scales) -> ()",
    arguments=_LoraArguments,
    check=_check_lora,
    cpu=_run_on_cpu,
    reference=reference.grouped_lora,
    fake=_fake_in_place,
)
