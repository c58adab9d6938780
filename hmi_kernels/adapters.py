"""Grouped adapters: one call for a batch whose segments of tokens belong to different tenants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hmi_kernels import reference
from hmi_kernels.checks import (
    GROUPED_TYPES,
    require_no_overlap,
    require_rows,
    require_tensor,
    require_vector,
)
from hmi_kernels.cuda.adapters import BOTTLENECK, LORA
from hmi_kernels.library import Implementation, define, implemented_in
from hmi_kernels.native import native

__all__ = ["ACTIVATIONS", "BottleneckArguments", "LoraArguments", "grouped_bottleneck", "grouped_lora"]

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
    *,
    layer_norm_weight: Tensor | None = None,
    layer_norm_bias: Tensor | None = None,
    layer_norm_eps: float = 1e-12,
    max_rank: int | None = None,
) -> None:
    """Adds each segment's bottleneck adapter to ``output``, in place (Houlsby et al., arXiv 1902.00751).

    Semantics, for ``slot = segment_slots[g]`` and ``t`` in ``segment_offsets[g] .. segment_offsets[g + 1]``:
    ``output[t] += scale * (activation(hidden_states[t] @ down + down_bias) @ up + up_bias)``, where the block
    ``down[hidden, rank], down_bias[rank], up[rank, hidden], up_bias[hidden]`` starts at
    ``arena[slot_offsets[slot]]``; then, if there is a layer norm, ``output[t] = LayerNorm(output[t])``, also
    for segments without an adapter. Sums are made in float32.
    A token's result depends neither on the other tokens nor on the number of threads, bit for bit.

    Args:
        output: [tokens, hidden] of float32 (CPU), float16 or bfloat16 (GPU); rows may lie apart (a column
            slice of a wider tensor).
        hidden_states: likewise, of the same dtype; must not share memory with ``output``.
        arena: [elements] of the same dtype.
        segment_offsets: int64 [segments + 1], not decreasing; tokens of no segment stay as they are.
        segment_slots: int32 [segments]; -1 for no adapter.
        slot_offsets: int64 [slots], in elements of the arena. Multiples of 16 are fastest on a CPU; a GPU
            takes multiples of 8.
        slot_ranks: int32 [slots]; 0 for a slot that has nothing here. A GPU takes multiples of 8 up to 256.
        slot_activations: int32 [slots], places in ``ACTIVATIONS``.
        slot_scales: float32 [slots].
        layer_norm_weight: [hidden] of the dtype of ``output``; None for no layer norm.
        layer_norm_bias: likewise; needed with the weight.
        layer_norm_eps: added to the variance.
        max_rank: at least the largest of ``slot_ranks``, if the caller knows it: kernels on a GPU then take
            smaller tiles. By default it is read from ``slot_ranks`` in host memory; on a GPU it is 256.

    On a GPU ``segment_offsets``, ``segment_slots`` and the ``slot_`` tensors may stay in host memory: they
    are then checked and uploaded by each call. On the device the kernels themselves check them: segments
    whose values are out of bounds stay as they are; the backend ``cuda`` tells of them by
    :func:`raise_faults`, ``triton`` does not.

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
        layer_norm_weight=layer_norm_weight,
        layer_norm_bias=layer_norm_bias,
        layer_norm_eps=layer_norm_eps,
        max_rank=max_rank,
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
    *,
    output_sizes: Sequence[int] = (),
    max_rank: int | None = None,
) -> None:
    """Adds each segment's LoRA to ``output``, in place (Hu et al., arXiv 2106.09685).

    Semantics: ``output[t] += scale * ((hidden_states[t] @ a) @ b)``, where the block
    ``a[in, rank], b[rank, out]`` (the transposes of PEFT's ``lora_A`` and ``lora_B``) starts at
    ``arena[slot_offsets[slot]]``. With ``output_sizes`` several projections of the same hidden states (query,
    key and value) are made in one call: projection p adds to the p-th group of columns.

    Args:
        output: [tokens, out]; rows may lie apart (a column slice of a wider tensor).
        hidden_states: [tokens, in], likewise; must not share memory with ``output``.
        slot_offsets, slot_ranks, slot_scales: [slots], or [projections, slots] with ``output_sizes``.
        output_sizes: the number of columns of each projection, at most four; they add up to out.
        arena, segment_offsets, segment_slots, max_rank: as for :func:`grouped_bottleneck`, as are the dtypes.

    Raises TypeError or ValueError, before anything is changed, on arguments of another kind or out of bounds.
    """
    _grouped_lora(
        output,
        hidden_states,
        arena,
        segment_offsets,
        segment_slots,
        slot_offsets,
        slot_ranks,
        slot_scales,
        output_sizes=list(output_sizes),
        max_rank=max_rank,
    )


class LoraArguments(NamedTuple):
    """What :func:`grouped_lora` is given."""

    output: Tensor
    hidden_states: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_ranks: Tensor
    slot_scales: Tensor
    output_sizes: Sequence[int] = ()
    max_rank: int | None = None


class BottleneckArguments(NamedTuple):
    """What :func:`grouped_bottleneck` is given."""

    output: Tensor
    hidden_states: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_ranks: Tensor
    slot_activations: Tensor
    slot_scales: Tensor
    layer_norm_weight: Tensor | None = None
    layer_norm_bias: Tensor | None = None
    layer_norm_eps: float = 1e-12
    max_rank: int | None = None


def _check_shared(arguments: LoraArguments | BottleneckArguments, *, is_square: bool) -> None:
    output, hidden_states = arguments.output, arguments.hidden_states
    require_rows("output", output, (None, None), GROUPED_TYPES)
    num_tokens, output_size = output.shape
    shape = (num_tokens, output_size if is_square else None)
    require_rows("hidden_states", hidden_states, shape, (output.dtype,))
    require_no_overlap(output, hidden_states)
    require_vector("arena", arguments.arena, output.dtype)
    require_vector("segment_slots", arguments.segment_slots, torch.int32)
    num_segments = arguments.segment_slots.shape[0]
    require_vector("segment_offsets", arguments.segment_offsets, torch.int64, num_segments + 1)
    if arguments.max_rank is not None and arguments.max_rank < 0:
        raise ValueError(f"max_rank must not be negative, but is {arguments.max_rank}")


def _check_lora(arguments: LoraArguments) -> None:
    _check_shared(arguments, is_square=False)
    sizes = arguments.output_sizes
    _check_slots(arguments, (len(sizes), None) if sizes else (None,))
    if not sizes:
        return
    if len(sizes) > 4 or min(sizes) < 1 or sum(sizes) != arguments.output.shape[1]:
        raise ValueError(
            "output_sizes must be one to four positive numbers that add up to the "
            f"{arguments.output.shape[1]} columns of output, not {sizes}"
        )


def _check_slots(arguments: LoraArguments | BottleneckArguments, shape: tuple[int | None, ...]) -> None:
    require_tensor("slot_offsets", arguments.slot_offsets, torch.int64, shape)
    shape = arguments.slot_offsets.shape
    require_tensor("slot_ranks", arguments.slot_ranks, torch.int32, shape)
    require_tensor("slot_scales", arguments.slot_scales, torch.float32, shape)


def _check_bottleneck(arguments: BottleneckArguments) -> None:
    _check_shared(arguments, is_square=True)
    _check_slots(arguments, (None,))
    output, weight, bias = arguments.output, arguments.layer_norm_weight, arguments.layer_norm_bias
    hidden_size = output.shape[1]
    num_slots = arguments.slot_offsets.shape[0]
    require_vector("slot_activations", arguments.slot_activations, torch.int32, num_slots)
    if (weight is None) != (bias is None):
        raise ValueError("layer_norm_weight and layer_norm_bias must be given together")
    if weight is not None and bias is not None:
        require_vector("layer_norm_weight", weight, output.dtype, hidden_size)
        require_vector("layer_norm_bias", bias, output.dtype, hidden_size)


def _cpu_refuses(arguments: LoraArguments | BottleneckArguments) -> str:
    is_float32 = arguments.output.dtype is torch.float32
    return "" if is_float32 else f"output must be torch.float32, not {arguments.output.dtype}"


def _bottleneck_on_cpu(arguments: BottleneckArguments) -> None:
    _add_on_cpu(arguments, [arguments.output.shape[1]], arguments.slot_activations.data_ptr())
    if arguments.layer_norm_weight is None or arguments.segment_slots.shape[0] == 0:
        return
    rows = arguments.output[int(arguments.segment_offsets[0]) : int(arguments.segment_offsets[-1])]
    weight, bias, eps = arguments.layer_norm_weight, arguments.layer_norm_bias, arguments.layer_norm_eps
    rows.copy_(functional.layer_norm(rows, rows.shape[1:], weight, bias, eps))


def _lora_on_cpu(arguments: LoraArguments) -> None:
    _add_on_cpu(arguments, arguments.output_sizes or [arguments.output.shape[1]])


def _add_on_cpu(
    arguments: LoraArguments | BottleneckArguments, output_sizes: Sequence[int], slot_activations: int = 0
) -> None:
    output, hidden_states = arguments.output, arguments.hidden_states
    native.grouped_adapter(
        output.data_ptr(),
        output.stride(0),
        output_sizes,
        hidden_states.data_ptr(),
        hidden_states.stride(0),
        hidden_states.shape[1],
        output.shape[0],
        arguments.arena.data_ptr(),
        arguments.arena.shape[0],
        arguments.segment_offsets.data_ptr(),
        arguments.segment_slots.data_ptr(),
        arguments.segment_slots.shape[0],
        arguments.slot_offsets.data_ptr(),
        arguments.slot_ranks.data_ptr(),
        slot_activations,
        arguments.slot_scales.data_ptr(),
        arguments.slot_offsets.shape[-1],
        torch.get_num_threads(),
    )


def _fake_in_place(arguments: LoraArguments | BottleneckArguments) -> None:
    """The output exists; nothing is made."""


_SHARED_ARGUMENTS = (
    "Tensor(a!) output, Tensor hidden_states, Tensor arena, Tensor segment_offsets, Tensor segment_slots, "
    "Tensor slot_offsets, Tensor slot_ranks"
)
_INDEXES = ("segment_offsets", "segment_slots", "slot_offsets", "slot_ranks", "slot_scales")
_grouped_bottleneck = define(
    f"grouped_bottleneck({_SHARED_ARGUMENTS}, Tensor slot_activations, Tensor slot_scales, *, "
    "Tensor? layer_norm_weight=None, Tensor? layer_norm_bias=None, float layer_norm_eps=1e-12, "
    "int? max_rank=None) -> ()",
    arguments=BottleneckArguments,
    check=_check_bottleneck,
    implementations={
        "cuda": BOTTLENECK,
        "triton": implemented_in("hmi_kernels.triton.adapters", "grouped_bottleneck"),
        "cpu": Implementation(_bottleneck_on_cpu, _cpu_refuses),
    },
    reference=reference.grouped_bottleneck,
    fake=_fake_in_place,
    may_be_on_host=(*_INDEXES, "slot_activations"),
)
_grouped_lora = define(
    f"grouped_lora({_SHARED_ARGUMENTS}, Tensor slot_scales, *, int[] output_sizes=[], int? max_rank=None) "
    "-> ()",
    arguments=LoraArguments,
    check=_check_lora,
    implementations={
        "cuda": LORA,
        "triton": implemented_in("hmi_kernels.triton.adapters", "grouped_lora"),
        "cpu": Implementation(_lora_on_cpu, _cpu_refuses),
    },
    reference=reference.grouped_lora,
    fake=_fake_in_place,
    may_be_on_host=_INDEXES,
)
