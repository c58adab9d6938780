"""What the grouped adapters add, as functions that autograd can differentiate: for training.

The forward pass is that of the in-place ops, which serve. The backward pass keeps nothing but what went in:
it makes the thin inner states anew, and is made of :func:`hmi_kernels.grouped_product` and
:func:`hmi_kernels.grouped_weight_gradient`, so that it too runs on every backend, and is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hmi_kernels.adapters import grouped_bottleneck, grouped_lora
from hmi_kernels.cuda.adapters import check_adapter_shape
from hmi_kernels.library import define, define_gradient
from hmi_kernels.products import grouped_product, grouped_weight_gradient
from hmi_kernels.reference import ACTIVATIONS

__all__ = ["grouped_bottleneck_delta", "grouped_lora_delta"]

_ONES = 8
"""Columns of the ones whose product with gradients is their sum: what 16-byte reads ask for at least."""


def grouped_bottleneck_delta(
    hidden_states: Tensor,
    arena: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_ranks: Tensor,
    slot_activations: Tensor,
    slot_scales: Tensor,
    *,
    max_rank: int,
) -> Tensor:
    """What :func:`hmi_kernels.grouped_bottleneck` would add, [tokens, hidden]; zero for tokens without one.

    Differentiable in ``hidden_states`` and ``arena``; the arguments are those of that op, ``max_rank`` must
    be given. The gradient of the arena needs blocks that do not overlap.

    Raises TypeError or ValueError on arguments of another kind or out of bounds.
    """
    result: Tensor = _grouped_bottleneck_delta(
        hidden_states,
        arena,
        segment_offsets,
        segment_slots,
        slot_offsets,
        slot_ranks,
        slot_activations,
        slot_scales,
        max_rank=max_rank,
    )
    return result


def grouped_lora_delta(
    hidden_states: Tensor,
    arena: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_ranks: Tensor,
    slot_scales: Tensor,
    *,
    output_sizes: Sequence[int],
    max_rank: int,
) -> Tensor:
    """What :func:`hmi_kernels.grouped_lora` would add, [tokens, sum of output_sizes].

    Differentiable in ``hidden_states`` and ``arena``; the arguments are those of that op, with tables
    [projections, slots]. ``output_sizes`` and ``max_rank`` must be given. The gradient of the arena needs
    blocks that do not overlap.

    Raises TypeError or ValueError on arguments of another kind or out of bounds.
    """
    result: Tensor = _grouped_lora_delta(
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
    return result


class _BottleneckDelta(NamedTuple):
    hidden_states: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_ranks: Tensor
    slot_activations: Tensor
    slot_scales: Tensor
    max_rank: int


class _LoraDelta(NamedTuple):
    hidden_states: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_ranks: Tensor
    slot_scales: Tensor
    output_sizes: Sequence[int]
    max_rank: int


def _bottleneck_forward(*args: Tensor, max_rank: int) -> Tensor:
    delta = torch.zeros_like(args[0], memory_format=torch.contiguous_format)
    grouped_bottleneck(delta, *args, max_rank=max_rank)
    return delta


def _lora_forward(*args: Tensor, output_sizes: Sequence[int], max_rank: int) -> Tensor:
    delta = args[0].new_zeros(args[0].shape[0], sum(output_sizes))
    grouped_lora(delta, *args, output_sizes=output_sizes, max_rank=max_rank)
    return delta


class _Matrices(NamedTuple):
    """One matrix of each slot's block, as the products take it."""

    slot_offsets: Tensor
    slot_rows: Tensor
    slot_columns: Tensor


class _Batch:
    """Segments of tokens, and the products of their rows with the matrices of their slots.

    ``any_matrix`` says of those what it says to :func:`grouped_product`.
    """

    def __init__(
        self, arena: Tensor, segment_offsets: Tensor, segment_slots: Tensor, *, any_matrix: bool
    ) -> None:
        self.arena = arena
        self._segments = (segment_offsets, segment_slots)
        self._any_matrix = any_matrix

    def product(
        self, inputs: Tensor, matrices: _Matrices, output_size: int, *, transposed: bool = False
    ) -> Tensor:
        return grouped_product(
            inputs,
            self.arena,
            *self._segments,
            *matrices,
            output_size=output_size,
            transposed=transposed,
            any_matrix=self._any_matrix,
        )

    def weight_gradient(self, inputs: Tensor, gradients: Tensor, matrices: _Matrices) -> Tensor:
        return self._weight_gradient(inputs, gradients, matrices, any_matrix=self._any_matrix)

    def _weight_gradient(
        self, inputs: Tensor, gradients: Tensor, matrices: _Matrices, *, any_matrix: bool
    ) -> Tensor:
        return grouped_weight_gradient(
            inputs,
            gradients,
            *self._segments,
            *matrices,
            arena_size=self.arena.shape[0],
            any_matrix=any_matrix,
        )

    def bias_gradient(self, gradients: Tensor, slot_offsets: Tensor, slot_sizes: Tensor) -> Tensor:
        """Of biases [slot_sizes] at slot_offsets: sums over the slots' tokens."""
        ones = gradients.new_ones(gradients.shape[0], _ONES)
        matrices = _Matrices(slot_offsets, (slot_sizes > 0).to(torch.int32), slot_sizes)
        return self._weight_gradient(ones, gradients, matrices, any_matrix=True)  # of one row

    def token_slots(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The slot of every token, int64 [T], 0 for none; and whether it has one, bool [T, 1]."""
        offsets, slots = self._segments
        segments = torch.searchsorted(
            offsets, torch.arange(num_tokens, device=offsets.device), right=True
        ).sub_(1)
        is_inside = (segments >= 0) & (segments < slots.shape[0])
        chosen = torch.where(is_inside, slots[segments.clamp(0, slots.shape[0] - 1)].long(), -1)
        return chosen.clamp(min=0), (chosen >= 0)[:, None]


def _may_be_any_matrix(
    input_size: int, output_sizes: Sequence[int], max_rank: int, *, is_bottleneck: bool
) -> bool:
    """Whether the blocks' matrices may have ranks and offsets that are no multiples of 8.

    The forward pass on the backend ``cuda`` is asked for no others; where it cannot have run there, they may.
    """
    try:
        for output_size in output_sizes:
            check_adapter_shape(
                input_size=input_size, output_size=output_size, rank=max_rank, is_bottleneck=is_bottleneck
            )
    except ValueError:
        return True
    return False


def _filled(like: Tensor, value: int) -> Tensor:
    """``value`` for slots that have a rank, 0 for the others."""
    return torch.where(like > 0, value, 0).to(torch.int32)


def _bottleneck_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    hidden_states, arena, offsets, slots, slot_offsets, slot_ranks, slot_activations, slot_scales = (
        ctx.saved_tensors
    )
    size, max_rank = hidden_states.shape[1], ctx.max_rank
    if 0 in (slots.shape[0], slot_ranks.shape[0], max_rank, *hidden_states.shape):
        return torch.zeros_like(hidden_states), torch.zeros_like(arena), *[None] * 7
    any_matrix = _may_be_any_matrix(size, [size], max_rank, is_bottleneck=True)
    batch = _Batch(arena, offsets, slots, any_matrix=any_matrix)
    sizes = _filled(slot_ranks, size)
    down_bias = slot_offsets + size * slot_ranks
    up_bias = down_bias + slot_ranks * (1 + size)
    down = _Matrices(slot_offsets, sizes, slot_ranks)
    up = _Matrices(down_bias + slot_ranks, slot_ranks, sizes)

    token_slots, has_slot = (part.to(arena.device) for part in batch.token_slots(len(hidden_states)))
    scaled = _scaled(gradient, slot_scales, token_slots, has_slot)
    biases = _bias_table(arena, down_bias, slot_ranks, max_rank)[token_slots]
    before = batch.product(hidden_states, down, max_rank) + torch.where(has_slot, biases, 0)
    inner_gradient = batch.product(scaled, up, max_rank, transposed=True)
    numbers = slot_activations.to(arena.device)[token_slots][:, None]
    inner, before_gradient = _activation_backward(before, inner_gradient, numbers)

    hidden_gradient, arena_gradient = None, None
    if ctx.needs_input_grad[0]:
        hidden_gradient = batch.product(before_gradient, down, size, transposed=True)
    if ctx.needs_input_grad[1]:
        arena_gradient = (
            batch.weight_gradient(hidden_states, before_gradient, down)
            + batch.bias_gradient(before_gradient, down_bias, slot_ranks)
            + batch.weight_gradient(inner, scaled, up)
            + batch.bias_gradient(scaled, up_bias, sizes)
        )
    return hidden_gradient, arena_gradient, *[None] * 7


def _bias_table(arena: Tensor, offsets: Tensor, ranks: Tensor, max_rank: int) -> Tensor:
    """The slots' inner biases, [slots, max_rank], zero beyond their ranks."""
    columns = torch.arange(max_rank, device=offsets.device)
    places = offsets[:, None] + columns
    # The forward pass has checked the slots in use; the tables may say anything of the others.
    is_real = (columns < ranks[:, None]) & (places >= 0) & (places < arena.shape[0])
    places = torch.where(is_real, places, 0)
    return torch.where(is_real.to(arena.device), arena[places.to(arena.device)], 0)


def _scaled(gradient: Tensor, slot_scales: Tensor, token_slots: Tensor, has_slot: Tensor) -> Tensor:
    """The gradient of what stands before the scale; zero for tokens without an adapter."""
    scales = slot_scales.to(gradient.device)[token_slots][:, None]
    return torch.where(has_slot, gradient * scales, 0).to(gradient.dtype)


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    # aten's own cannot be differentiated again.
    sigmoid = torch.sigmoid(x)
    return gradient * sigmoid * (1 + x * (1 - sigmoid))


_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (torch.relu, lambda g, x: torch.ops.aten.threshold_backward(g, x, 0)),
    "gelu": (functional.gelu, torch.ops.aten.gelu_backward),
    "silu": (functional.silu, _silu_backward),
    "gelu_tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate="tanh"),
    ),
    "tanh": (torch.tanh, lambda g, x: torch.ops.aten.tanh_backward(g, torch.tanh(x))),
}


def _activation_backward(before: Tensor, gradient: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Activated values and the gradient before them; numbers int32 [T, 1] are places in ``ACTIVATIONS``."""
    # All of them: which ones a batch has could be known only by waiting for it, and they are thin.
    activated, result = before, gradient
    for number, name in enumerate(ACTIVATIONS):
        function, backward = _FUNCTIONS[name]
        is_this = numbers == number
        activated = torch.where(is_this, function(before), activated)
        result = torch.where(is_this, backward(gradient, before), result)
    return activated, result


def _lora_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    hidden_states, arena, offsets, slots, slot_offsets, slot_ranks, slot_scales = ctx.saved_tensors
    size, max_rank = hidden_states.shape[1], ctx.max_rank
    if 0 in (slots.shape[0], slot_ranks.shape[-1], max_rank, *hidden_states.shape):
        return torch.zeros_like(hidden_states), torch.zeros_like(arena), *[None] * 7
    any_matrix = _may_be_any_matrix(size, ctx.output_sizes, max_rank, is_bottleneck=False)
    batch = _Batch(arena, offsets, slots, any_matrix=any_matrix)
    token_slots, has_slot = (part.to(arena.device) for part in batch.token_slots(len(hidden_states)))
    hidden_gradient, arena_gradient = None, None
    parts = gradient.split(ctx.output_sizes, dim=1)
    tables = [table.view(len(parts), -1) for table in (slot_offsets, slot_ranks, slot_scales)]
    for part, slot_offset, ranks, scales in zip(parts, *tables, strict=True):
        a = _Matrices(slot_offset, _filled(ranks, size), ranks)
        b = _Matrices(slot_offset + size * ranks, ranks, _filled(ranks, part.shape[1]))
        scaled = _scaled(part, scales, token_slots, has_slot)
        inner_gradient = batch.product(scaled, b, max_rank, transposed=True)
        if ctx.needs_input_grad[0]:
            more = batch.product(inner_gradient, a, size, transposed=True)
            hidden_gradient = more if hidden_gradient is None else hidden_gradient + more
        if ctx.needs_input_grad[1]:
            inner = batch.product(hidden_states, a, max_rank)
            more = batch.weight_gradient(hidden_states, inner_gradient, a)
            more = more + batch.weight_gradient(inner, scaled, b)
            arena_gradient = more if arena_gradient is None else arena_gradient + more
    return hidden_gradient, arena_gradient, *[None] * 7


def _save_bottleneck(ctx: Any, values: tuple[Any, ...], output: Tensor) -> None:
    arguments = _BottleneckDelta(*values)
    ctx.save_for_backward(*arguments[:8])
    ctx.max_rank = arguments.max_rank


def _save_lora(ctx: Any, values: tuple[Any, ...], output: Tensor) -> None:
    arguments = _LoraDelta(*values)
    ctx.save_for_backward(*arguments[:7])
    ctx.output_sizes, ctx.max_rank = list(arguments.output_sizes), arguments.max_rank


def _check_bottleneck(arguments: _BottleneckDelta) -> None:
    if arguments.max_rank < 0:
        raise ValueError(f"max_rank must not be negative, but is {arguments.max_rank}")


def _check_lora(arguments: _LoraDelta) -> None:
    if not arguments.output_sizes or min(arguments.output_sizes) < 1:
        raise ValueError(
            f"output_sizes must be one to four positive numbers, not {list(arguments.output_sizes)}"
        )
    if arguments.max_rank < 0:
        raise ValueError(f"max_rank must not be negative, but is {arguments.max_rank}")


_BATCH = (
    "Tensor hidden_states, Tensor arena, Tensor segment_offsets, Tensor segment_slots, Tensor slot_offsets, "
    "Tensor slot_ranks"
)
_MAY_BE_ON_HOST = ("segment_offsets", "segment_slots", "slot_offsets", "slot_ranks", "slot_scales")
_grouped_bottleneck_delta = define(
    f"grouped_bottleneck_delta({_BATCH}, Tensor slot_activations, Tensor slot_scales, *, int max_rank) "
    "-> Tensor",
    arguments=_BottleneckDelta,
    check=_check_bottleneck,
    implementations={},  # the in-place op's, which it calls
    reference=_bottleneck_forward,
    fake=lambda arguments: torch.empty_like(arguments.hidden_states, memory_format=torch.contiguous_format),
    may_be_on_host=(*_MAY_BE_ON_HOST, "slot_activations"),
)
define_gradient(_grouped_bottleneck_delta, save=_save_bottleneck, backward=_bottleneck_backward)
_grouped_lora_delta = define(
    f"grouped_lora_delta({_BATCH}, Tensor slot_scales, *, int[] output_sizes, int max_rank) -> Tensor",
    arguments=_LoraDelta,
    check=_check_lora,
    implementations={},  # the in-place op's, which it calls
    reference=_lora_forward,
    fake=lambda arguments: arguments.hidden_states.new_empty(
        arguments.hidden_states.shape[0], sum(arguments.output_sizes)
    ),
    may_be_on_host=_MAY_BE_ON_HOST,
)
define_gradient(_grouped_lora_delta, save=_save_lora, backward=_lora_backward)
