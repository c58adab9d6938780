"""Grouped vectors: each tenant's own scale or bias in one call for the whole batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hmi_kernels import reference
from hmi_kernels.checks import GROUPED_TYPES, require_rows, require_vector
from hmi_kernels.cuda.vectors import BIAS, SCALE
from hmi_kernels.library import Implementation, define, implemented_in
from hmi_kernels.native import native

__all__ = ["VectorArguments", "grouped_bias", "grouped_scale"]


def grouped_scale(
    hidden_states: Tensor, arena: Tensor, segment_offsets: Tensor, segment_slots: Tensor, slot_offsets: Tensor
) -> None:
    """Multiplies each segment by its vector, in place: IA3 (Liu et al., arXiv 2205.05638).

    Semantics, for ``slot = segment_slots[g]`` and ``t`` in ``segment_offsets[g] .. segment_offsets[g + 1]``:
    ``hidden_states[t] *= arena[slot_offsets[slot] : slot_offsets[slot] + hidden]``.

    Args:
        hidden_states: [tokens, hidden] of float32 (CPU), float16 or bfloat16 (GPU); rows may lie apart.
        arena: [elements] of the same dtype.
        segment_offsets: int64 [segments + 1], not decreasing; tokens of no segment stay as they are.
        segment_slots: int32 [segments]; -1 for none.
        slot_offsets: int64 [slots], in elements of the arena (on a GPU multiples of 8); -1 for a slot that
            has nothing here.

    Raises TypeError or ValueError, before anything is changed, on arguments of another kind or out of bounds.
    """
    _grouped_scale(hidden_states, arena, segment_offsets, segment_slots, slot_offsets)


def grouped_bias(
    output: Tensor, arena: Tensor, segment_offsets: Tensor, segment_slots: Tensor, slot_offsets: Tensor
) -> None:
    """Adds its vector to each segment, in place: the biases of BitFit (Ben Zaken et al., arXiv 2106.10199).

    Semantics: ``output[t] += arena[slot_offsets[slot] : slot_offsets[slot] + hidden]``; arguments and errors
    are those of :func:`grouped_scale`.
    """
    _grouped_bias(output, arena, segment_offsets, segment_slots, slot_offsets)


class VectorArguments(NamedTuple):
    """What :func:`grouped_scale` (rows: hidden_states) and :func:`grouped_bias` (output) are given."""

    rows: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor


def _check(arguments: VectorArguments) -> None:
    rows = arguments.rows
    require_rows("the rows to change", rows, (None, None), GROUPED_TYPES)
    require_vector("arena", arguments.arena, rows.dtype)
    require_vector("segment_slots", arguments.segment_slots, torch.int32)
    num_segments = arguments.segment_slots.shape[0]
    require_vector("segment_offsets", arguments.segment_offsets, torch.int64, num_segments + 1)
    require_vector("slot_offsets", arguments.slot_offsets, torch.int64)


def _cpu_refuses(arguments: VectorArguments) -> str:
    is_float32 = arguments.rows.dtype is torch.float32
    return "" if is_float32 else f"the rows must be torch.float32, not {arguments.rows.dtype}"


def _run_on_cpu(arguments: VectorArguments, *, is_scale: bool) -> None:
    rows = arguments.rows
    native.grouped_vector(
        is_scale,
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        rows.shape[1],
        arguments.arena.data_ptr(),
        arguments.arena.shape[0],
        arguments.segment_offsets.data_ptr(),
        arguments.segment_slots.data_ptr(),
        arguments.segment_slots.shape[0],
        arguments.slot_offsets.data_ptr(),
        arguments.slot_offsets.shape[0],
        torch.get_num_threads(),
    )


def _scale_on_cpu(arguments: VectorArguments) -> None:
    _run_on_cpu(arguments, is_scale=True)


def _bias_on_cpu(arguments: VectorArguments) -> None:
    _run_on_cpu(arguments, is_scale=False)


def _fake_in_place(arguments: VectorArguments) -> None:
    """The rows exist; nothing is made."""


_INDEXES = ("segment_offsets", "segment_slots", "slot_offsets")
_ARGUMENTS = "Tensor arena, Tensor segment_offsets, Tensor segment_slots, Tensor slot_offsets) -> ()"
_grouped_scale = define(
    f"grouped_scale(Tensor(a!) hidden_states, {_ARGUMENTS}",
    arguments=VectorArguments,
    check=_check,
    implementations={
        "cuda": SCALE,
        "triton": implemented_in("hmi_kernels.triton.vectors", "grouped_scale"),
        "cpu": Implementation(_scale_on_cpu, _cpu_refuses),
    },
    reference=reference.grouped_scale,
    fake=_fake_in_place,
    may_be_on_host=_INDEXES,
)
_grouped_bias = define(
    f"grouped_bias(Tensor(a!) output, {_ARGUMENTS}",
    arguments=VectorArguments,
    check=_check,
    implementations={
        "cuda": BIAS,
        "triton": implemented_in("hmi_kernels.triton.vectors", "grouped_bias"),
        "cpu": Implementation(_bias_on_cpu, _cpu_refuses),
    },
    reference=reference.grouped_bias,
    fake=_fake_in_place,
    may_be_on_host=_INDEXES,
)
