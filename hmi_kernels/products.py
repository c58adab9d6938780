"""Grouped products and the gradients of their matrices: what the adapters' backward pass is made of.

Each of the two ops is the other's derivative, so both can be differentiated as often as one likes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hmi_kernels import reference
from hmi_kernels.checks import GROUPED_TYPES, require_rows, require_vector
from hmi_kernels.cuda.products import PRODUCT, WEIGHT_GRADIENT
from hmi_kernels.library import Implementation, define, define_gradient, implemented_in
from hmi_kernels.native import native

__all__ = ["ProductArguments", "WeightGradientArguments", "grouped_product", "grouped_weight_gradient"]


def grouped_product(
    inputs: Tensor,
    arena: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_rows: Tensor,
    slot_columns: Tensor,
    *,
    output_size: int,
    transposed: bool = False,
    any_matrix: bool = False,
) -> Tensor:
    """Multiplies the rows of each segment with the matrix of its slot.

    Semantics, for ``slot = segment_slots[g]`` and ``t`` in ``segment_offsets[g] .. segment_offsets[g + 1]``:
    ``output[t, :columns] = inputs[t, :rows] @ matrix``, where ``matrix[rows, columns]`` starts at
    ``arena[slot_offsets[slot]]``; with ``transposed``
    ``output[t, :rows] = inputs[t, :columns] @ matrix.T``. All other elements are zero. Sums are made in
    float32. A token's result depends neither on the other tokens nor on the number of threads, bit for bit.

    Args:
        inputs: [tokens, in] of float32 (CPU), float16 or bfloat16 (GPU); rows may lie apart.
        arena: [elements] of the same dtype.
        segment_offsets: int64 [segments + 1], not decreasing.
        segment_slots: int32 [segments]; -1 for none.
        slot_offsets: int64 [slots], in elements of the arena.
        slot_rows: int32 [slots]; 0 for a slot that has nothing here.
        slot_columns: likewise.
        output_size: columns of the result, at least the most that a slot has.
        transposed: whether the matrices' transposes are meant.
        any_matrix: whether rows, columns and offsets may be others than multiples of 8, which the backend
            ``cuda`` refuses. It cannot see them before it runs.

    On the backend ``cuda`` sizes, rows, columns and offsets are multiples of 8. Index tensors may stay in
    host memory, as with :func:`hmi_kernels.grouped_lora`. Differentiable in ``inputs`` and ``arena``.

    Returns: [tokens, output_size].

    Raises TypeError or ValueError on arguments of another kind or out of bounds.
    """
    result: Tensor = _grouped_product(
        inputs,
        arena,
        segment_offsets,
        segment_slots,
        slot_offsets,
        slot_rows,
        slot_columns,
        output_size=output_size,
        transposed=transposed,
        any_matrix=any_matrix,
    )
    return result


def grouped_weight_gradient(
    inputs: Tensor,
    output_gradients: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_rows: Tensor,
    slot_columns: Tensor,
    *,
    arena_size: int,
    any_matrix: bool = True,
) -> Tensor:
    """The gradient of the matrices of :func:`grouped_product`, without atomics: the same bits every time.

    Semantics: the matrix of a slot in the result is the sum, over the tokens t of its segments, of the outer
    product of ``inputs[t, :rows]`` and ``output_gradients[t, :columns]``; all else is zero.

    Args:
        inputs: [tokens, in] as for :func:`grouped_product`.
        output_gradients: [tokens, out], likewise, of the same dtype.
        segment_offsets, segment_slots, slot_offsets, slot_rows, slot_columns: as there. The matrices of slots
            in use must not overlap. On the backend ``cuda`` rows, columns and offsets may be any number.
        arena_size: elements of the result.
        any_matrix: as for :func:`grouped_product`, of which the derivative is made: without it that too runs
            on the backend ``cuda``, but only on multiples of 8.

    Returns: [arena_size]. Differentiable in ``inputs`` and ``output_gradients``.

    Raises TypeError or ValueError on arguments of another kind or out of bounds.
    """
    result: Tensor = _grouped_weight_gradient(
        inputs,
        output_gradients,
        segment_offsets,
        segment_slots,
        slot_offsets,
        slot_rows,
        slot_columns,
        arena_size=arena_size,
        any_matrix=any_matrix,
    )
    return result


class ProductArguments(NamedTuple):
    """What :func:`grouped_product` is given."""

    inputs: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_rows: Tensor
    slot_columns: Tensor
    output_size: int
    transposed: bool = False
    any_matrix: bool = False


class WeightGradientArguments(NamedTuple):
    """What :func:`grouped_weight_gradient` is given."""

    inputs: Tensor
    output_gradients: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_rows: Tensor
    slot_columns: Tensor
    arena_size: int
    any_matrix: bool = True


def _check_indexes(arguments: ProductArguments | WeightGradientArguments) -> None:
    num_segments, num_slots = arguments.segment_slots.shape[0], arguments.slot_offsets.shape[0]
    require_vector("segment_slots", arguments.segment_slots, torch.int32)
    require_vector("segment_offsets", arguments.segment_offsets, torch.int64, num_segments + 1)
    require_vector("slot_offsets", arguments.slot_offsets, torch.int64)
    require_vector("slot_rows", arguments.slot_rows, torch.int32, num_slots)
    require_vector("slot_columns", arguments.slot_columns, torch.int32, num_slots)


def _check_product(arguments: ProductArguments) -> None:
    require_rows("inputs", arguments.inputs, (None, None), GROUPED_TYPES)
    require_vector("arena", arguments.arena, arguments.inputs.dtype)
    _check_indexes(arguments)
    if arguments.output_size < 0:
        raise ValueError(f"output_size must not be negative, but is {arguments.output_size}")


def _check_weight_gradient(arguments: WeightGradientArguments) -> None:
    inputs, gradients = arguments.inputs, arguments.output_gradients
    require_rows("inputs", inputs, (None, None), GROUPED_TYPES)
    require_rows("output_gradients", gradients, (inputs.shape[0], None), (inputs.dtype,))
    _check_indexes(arguments)
    if arguments.arena_size < 0:
        raise ValueError(f"arena_size must not be negative, but is {arguments.arena_size}")


def _cpu_refuses(arguments: ProductArguments | WeightGradientArguments) -> str:
    is_float32 = arguments.inputs.dtype is torch.float32
    return "" if is_float32 else f"inputs must be torch.float32, not {arguments.inputs.dtype}"


def _product_on_cpu(arguments: ProductArguments) -> Tensor:
    inputs, arena = arguments.inputs, arguments.arena
    output = inputs.new_zeros(inputs.shape[0], arguments.output_size)
    native.grouped_product(
        output.data_ptr(),
        arguments.output_size,
        inputs.data_ptr(),
        inputs.stride(0),
        inputs.shape[1],
        inputs.shape[0],
        arena.data_ptr(),
        arena.shape[0],
        arguments.segment_offsets.data_ptr(),
        arguments.segment_slots.data_ptr(),
        arguments.segment_slots.shape[0],
        arguments.slot_offsets.data_ptr(),
        arguments.slot_rows.data_ptr(),
        arguments.slot_columns.data_ptr(),
        arguments.slot_offsets.shape[0],
        arguments.transposed,
        torch.get_num_threads(),
    )
    return output


def _weight_gradient_on_cpu(arguments: WeightGradientArguments) -> Tensor:
    inputs, gradients = arguments.inputs, arguments.output_gradients
    result = inputs.new_zeros(arguments.arena_size)
    native.grouped_weight_gradient(
        result.data_ptr(),
        arguments.arena_size,
        inputs.data_ptr(),
        inputs.stride(0),
        inputs.shape[1],
        gradients.data_ptr(),
        gradients.stride(0),
        gradients.shape[1],
        inputs.shape[0],
        arguments.segment_offsets.data_ptr(),
        arguments.segment_slots.data_ptr(),
        arguments.segment_slots.shape[0],
        arguments.slot_offsets.data_ptr(),
        arguments.slot_rows.data_ptr(),
        arguments.slot_columns.data_ptr(),
        arguments.slot_offsets.shape[0],
        torch.get_num_threads(),
    )
    return result


def _save_product(ctx: Any, values: tuple[Any, ...], output: Tensor) -> None:
    arguments = ProductArguments(*values)
    ctx.save_for_backward(*arguments[:7])
    ctx.transposed, ctx.any_matrix = arguments.transposed, arguments.any_matrix


def _product_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    inputs, arena, *indexes = ctx.saved_tensors
    gradient = gradient.contiguous()
    input_gradient, arena_gradient = None, None
    if ctx.needs_input_grad[0]:
        input_gradient = grouped_product(
            gradient,
            arena,
            *indexes,
            output_size=inputs.shape[1],
            transposed=not ctx.transposed,
            any_matrix=ctx.any_matrix,
        )
    if ctx.needs_input_grad[1]:
        sides = (gradient, inputs) if ctx.transposed else (inputs, gradient)
        arena_gradient = grouped_weight_gradient(
            *sides, *indexes, arena_size=arena.shape[0], any_matrix=ctx.any_matrix
        )
    return input_gradient, arena_gradient, *[None] * 8


def _save_weight_gradient(ctx: Any, values: tuple[Any, ...], output: Tensor) -> None:
    arguments = WeightGradientArguments(*values)
    ctx.save_for_backward(*arguments[:7])
    ctx.any_matrix = arguments.any_matrix


def _weight_gradient_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    inputs, output_gradients, *indexes = ctx.saved_tensors
    gradient = gradient.contiguous()
    first, second = None, None
    if ctx.needs_input_grad[0]:
        first = grouped_product(
            output_gradients,
            gradient,
            *indexes,
            output_size=inputs.shape[1],
            transposed=True,
            any_matrix=ctx.any_matrix,
        )
    if ctx.needs_input_grad[1]:
        second = grouped_product(
            inputs, gradient, *indexes, output_size=output_gradients.shape[1], any_matrix=ctx.any_matrix
        )
    return first, second, *[None] * 7


_INDEXES = (
    "Tensor segment_offsets, Tensor segment_slots, Tensor slot_offsets, Tensor slot_rows, Tensor slot_columns"
)
_MAY_BE_ON_HOST = ("segment_offsets", "segment_slots", "slot_offsets", "slot_rows", "slot_columns")
_grouped_product = define(
    f"grouped_product(Tensor inputs, Tensor arena, {_INDEXES}, *, SymInt output_size, "
    "bool transposed=False, bool any_matrix=False) -> Tensor",
    arguments=ProductArguments,
    check=_check_product,
    implementations={
        "cuda": PRODUCT,
        "triton": implemented_in("hmi_kernels.triton.products", "grouped_product"),
        "cpu": Implementation(_product_on_cpu, _cpu_refuses),
    },
    reference=reference.grouped_product,
    fake=lambda arguments: arguments.inputs.new_empty(arguments.inputs.shape[0], arguments.output_size),
    may_be_on_host=_MAY_BE_ON_HOST,
)
define_gradient(_grouped_product, save=_save_product, backward=_product_backward)
_grouped_weight_gradient = define(
    f"grouped_weight_gradient(Tensor inputs, Tensor output_gradients, {_INDEXES}, *, "
    "SymInt arena_size, bool any_matrix=True) -> Tensor",
    arguments=WeightGradientArguments,
    check=_check_weight_gradient,
    implementations={
        "cuda": WEIGHT_GRADIENT,
        "triton": implemented_in("hmi_kernels.triton.products", "grouped_weight_gradient"),
        "cpu": Implementation(_weight_gradient_on_cpu, _cpu_refuses),
    },
    reference=reference.grouped_weight_gradient,
    fake=lambda arguments: arguments.inputs.new_empty(arguments.arena_size),
    may_be_on_host=_MAY_BE_ON_HOST,
)
define_gradient(_grouped_weight_gradient, save=_save_weight_gradient, backward=_weight_gradient_backward)
