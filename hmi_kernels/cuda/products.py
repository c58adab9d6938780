"""Grouped products and their matrices' gradients on the backend ``cuda``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hmi_kernels.cuda import driver
from hmi_kernels.cuda.segments import SIZE_MULTIPLE, misaligned, too_many
from hmi_kernels.host_indexes import MatrixTable, check_matrices_on_host, on_device
from hmi_kernels.library import Implementation

if TYPE_CHECKING:
    from hmi_kernels.products import ProductArguments, WeightGradientArguments

__all__ = ["PRODUCT", "WEIGHT_GRADIENT"]


def _refuses(arguments: ProductArguments | WeightGradientArguments, other: str, tensor: Tensor) -> str:
    inputs = arguments.inputs
    if inputs.dtype not in (torch.float16, torch.bfloat16):
        return f"inputs must be torch.float16 or torch.bfloat16, not {inputs.dtype}"
    excess = too_many(inputs.shape[0], arguments.segment_slots.shape[0])
    return excess or misaligned("inputs", inputs) or misaligned(other, tensor)


def _product_refuses(arguments: ProductArguments) -> str:
    if arguments.any_matrix:
        return f"any_matrix is set, but rows, columns and offsets must be multiples of {SIZE_MULTIPLE}"
    if arguments.output_size % SIZE_MULTIPLE:
        return f"output_size must be a multiple of {SIZE_MULTIPLE}, not {arguments.output_size}"
    return _refuses(arguments, "arena", arguments.arena)


def _weight_gradient_refuses(arguments: WeightGradientArguments) -> str:
    return _refuses(arguments, "output_gradients", arguments.output_gradients)


def _indexes_on_device(arguments: ProductArguments | WeightGradientArguments) -> tuple[Tensor, ...]:
    device = arguments.inputs.device
    return tuple(
        on_device(index, device)
        for index in (
            arguments.segment_offsets,
            arguments.segment_slots,
            arguments.slot_offsets,
            arguments.slot_rows,
            arguments.slot_columns,
        )
    )


def _product(arguments: ProductArguments) -> Tensor:
    inputs, arena, output_size = arguments.inputs, arguments.arena, arguments.output_size
    num_tokens, input_size = inputs.shape
    most = (output_size, input_size) if arguments.transposed else (input_size, output_size)
    check_matrices_on_host(arguments, MatrixTable.of(arguments, arena.shape[0], most, SIZE_MULTIPLE))
    output = inputs.new_zeros(num_tokens, output_size)
    offsets, slots, slot_offsets, slot_rows, slot_columns = _indexes_on_device(arguments)
    with driver.launch_on(inputs) as launch:
        driver.module().grouped_product(
            driver.DATA_TYPES[inputs.dtype],
            output.data_ptr(),
            output_size,
            inputs.data_ptr(),
            inputs.stride(0),
            input_size,
            num_tokens,
            arena.data_ptr(),
            arena.shape[0],
            offsets.data_ptr(),
            slots.data_ptr(),
            slots.shape[0],
            slot_offsets.data_ptr(),
            slot_rows.data_ptr(),
            slot_columns.data_ptr(),
            slot_offsets.shape[0],
            arguments.transposed,
            launch.fault,
            launch.stream,
        )
    return output


def _weight_gradient(arguments: WeightGradientArguments) -> Tensor:
    inputs, gradients, arena_size = arguments.inputs, arguments.output_gradients, arguments.arena_size
    most = (inputs.shape[1], gradients.shape[1])
    table = MatrixTable.of(arguments, arena_size, most, 1)
    check_matrices_on_host(arguments, table, must_be_disjoint=True)
    result = inputs.new_zeros(arena_size)
    offsets, slots, slot_offsets, slot_rows, slot_columns = _indexes_on_device(arguments)
    with driver.launch_on(inputs) as launch:
        driver.module().grouped_weight_gradient(
            driver.DATA_TYPES[inputs.dtype],
            result.data_ptr(),
            arena_size,
            inputs.data_ptr(),
            inputs.stride(0),
            inputs.shape[1],
            gradients.data_ptr(),
            gradients.stride(0),
            gradients.shape[1],
            inputs.shape[0],
            offsets.data_ptr(),
            slots.data_ptr(),
            slots.shape[0],
            slot_offsets.data_ptr(),
            slot_rows.data_ptr(),
            slot_columns.data_ptr(),
            slot_offsets.shape[0],
            launch.fault,
            launch.stream,
        )
    return result


PRODUCT = Implementation(_product, _product_refuses)
WEIGHT_GRADIENT = Implementation(_weight_gradient, _weight_gradient_refuses)
