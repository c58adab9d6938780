"""PLOT on the backend ``cuda``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hmi_kernels.cuda import driver
from hmi_kernels.cuda.segments import SIZE_MULTIPLE, misaligned_start
from hmi_kernels.library import Implementation
from hmi_kernels.row_tables import MAY_BE_ON_HOST, pageable_tables

if TYPE_CHECKING:
    from hmi_kernels.plot import LookupArguments, MergeArguments

__all__ = ["LOOKUP", "MAX_INDEXES", "MAX_TABLES", "MERGE"]

MAX_INDEXES = 128
"""csrc/cuda/plot_lookup.h."""
MAX_TABLES = 48
"""Of each kind (csrc/cuda/plot_merge.h)."""
_MAX_HIDDEN_SIZE = 4096
_MAX_TOKENS = 2**31 - 1


def _lookup_refuses(arguments: LookupArguments) -> str:
    if len(arguments.indexes) > MAX_INDEXES:
        return f"indexes must be at most {MAX_INDEXES}, not {len(arguments.indexes)}"
    if arguments.input_ids.shape[0] > _MAX_TOKENS:
        return f"input_ids must be fewer than 2^31, not {arguments.input_ids.shape[0]}"
    return _misaligned("indexes", arguments.indexes)


def _lookup(arguments: LookupArguments) -> Tensor:
    input_ids, num_tokens = arguments.input_ids, arguments.input_ids.shape[0]
    references = arguments.new_references()
    with driver.launch_on(input_ids) as launch:
        driver.module().plot_lookup(
            input_ids.data_ptr(),
            num_tokens,
            arguments.sequence_offsets.data_ptr(),
            arguments.sequence_offsets.shape[0] - 1,
            [(index.data_ptr(), index.shape[0]) for index in arguments.indexes],
            arguments.chains.data_ptr(),
            arguments.chains.shape[1],
            arguments.window,
            references.data_ptr(),
            launch.fault,
            launch.stream,
        )
    return references


def _merge_refuses(arguments: MergeArguments) -> str:
    hidden_size = arguments.position_embeddings.shape[1]
    if hidden_size % SIZE_MULTIPLE or hidden_size > _MAX_HIDDEN_SIZE:
        return (
            f"hidden_size must be a multiple of {SIZE_MULTIPLE} up to {_MAX_HIDDEN_SIZE}, not {hidden_size}"
        )
    if arguments.input_ids.shape[0] > _MAX_TOKENS:
        return f"input_ids must be fewer than 2^31, not {arguments.input_ids.shape[0]}"
    if reason := arguments.refused_pieces():
        return reason
    for name, tables in (
        ("row_tables", arguments.row_tables),
        ("unigram_tables", arguments.unigram_tables),
    ):
        if len(tables) > MAX_TABLES:
            return f"{name} must be at most {MAX_TABLES}, not {len(tables)}"
    return (
        ("" if driver.is_emulated() else pageable_tables(arguments))
        or next(filter(None, (_misaligned(name, getattr(arguments, name)) for name in MAY_BE_ON_HOST)), "")
        or misaligned_start("position_embeddings", arguments.position_embeddings)
        or misaligned_start("layer_norm_weight", arguments.layer_norm_weight)
        or misaligned_start("layer_norm_bias", arguments.layer_norm_bias)
    )


def _merge(arguments: MergeArguments) -> Tensor:
    positions, num_tokens = arguments.position_embeddings, arguments.input_ids.shape[0]
    num_positions, hidden_size = positions.shape
    output = arguments.new_hidden_states()
    with driver.launch_on(positions) as launch:
        driver.module().plot_merge(
            arguments.input_ids.data_ptr(),
            num_tokens,
            arguments.sequence_offsets.data_ptr(),
            arguments.sequence_offsets.shape[0] - 1,
            arguments.references.data_ptr(),
            [_device_table(*table) for table in arguments.row_tables_with_decoding()],
            [_device_table(table, None) for table in arguments.unigram_tables],
            arguments.sequence_unigram_tables.data_ptr(),
            driver.DATA_TYPES[positions.dtype],
            positions.data_ptr(),
            num_positions,
            arguments.layer_norm_weight.data_ptr(),
            arguments.layer_norm_bias.data_ptr(),
            arguments.layer_norm_eps,
            arguments.window,
            hidden_size,
            output.data_ptr(),
            launch.fault,
            launch.stream,
        )
    return output


def _device_table(table: Tensor, decoding: Tensor | None) -> tuple[int, int, int, int, int]:
    number = driver.DATA_TYPES[table.dtype]
    if decoding is None:
        return _device_address(table), table.shape[0], number, 0, 0
    piece_size = decoding.shape[3] if table.dtype is torch.uint8 else 0
    return _device_address(table), table.shape[0], number, _device_address(decoding), piece_size


def _device_address(tensor: Tensor) -> int:
    """Where a kernel reads the tensor: on the device, or in pinned host memory in place."""
    if tensor.is_cuda or driver.is_emulated() or tensor.numel() == 0:
        return tensor.data_ptr()
    return int(driver.module().device_pointer(tensor.data_ptr()))


def _misaligned(name: str, tensors: Sequence[Tensor]) -> str:
    for i, tensor in enumerate(tensors):
        if tensor.data_ptr() % 16:
            return misaligned_start(f"{name}[{i}]", tensor)
    return ""


LOOKUP = Implementation(_lookup, _lookup_refuses)
MERGE = Implementation(_merge, _merge_refuses)
