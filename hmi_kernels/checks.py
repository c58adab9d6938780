"""Checks of what a tensor is (type, shape, layout), which every op makes before an address is passed on.

What a tensor holds is checked by the kernels themselves, which read it anyway. All tensors of an op's call
are on one device: torch's dispatcher and ``library`` see to it.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16)
COMPUTE_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of hidden states and weights; each backend says which of them it takes."""
GROUPED_TYPES = (*COMPUTE_TYPES, torch.float64)
"""Of the grouped ops. float64 is for checking gradients, by the reference alone."""


def require_vector(name: str, tensor: Tensor, dtype: torch.dtype, size: int | None = None) -> None:
    """Raises TypeError on another dtype, ValueError unless this is a contiguous vector (of that size)."""
    # Once per argument of every call: the reasons are looked for only if there is one.
    if tensor.dtype is not dtype or tensor.dim() != 1 or not tensor.is_contiguous():
        _refuse(name, tensor, (dtype,), (size,))
    if size is not None and tensor.shape[0] != size:
        _refuse(name, tensor, (dtype,), (size,))


def require_on_cpu(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the tensor is in host memory: for what is no op, which is seen to."""
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the CPU, not on {tensor.device}")


def require_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> None:
    """Raises TypeError on another dtype, ValueError on another shape (None: any size) or gaps in memory."""
    is_type = tensor.dtype in dtype if isinstance(dtype, tuple) else tensor.dtype is dtype
    if not is_type or not tensor.is_contiguous() or not _has_shape(tensor, shape):
        _refuse(name, tensor, dtype if isinstance(dtype, tuple) else (dtype,), shape)


def require_rows(
    name: str,
    matrix: Tensor,
    shape: tuple[int | None, int | None],
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> None:
    """Raises TypeError or ValueError unless this is a matrix of that dtype and shape whose rows are dense.

    The rows themselves may lie apart, as in a column slice of a wider matrix.
    """
    if matrix.dtype not in dtypes or not _has_shape(matrix, shape):
        _refuse(name, matrix, dtypes, shape)
    (num_rows, num_columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    if (column_stride != 1 and num_columns > 1) or (row_stride < num_columns and num_rows > 1):
        raise ValueError(
            f"{name} must have dense rows (strides [at least {num_columns}, 1]), not {list(matrix.stride())}"
        )


def _has_shape(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    actual = tensor.shape
    if actual == shape:
        return True
    if len(actual) != len(shape):
        return False
    # Not all(...): for every tensor of every call its generator takes longer than the comparisons.
    for have, want in zip(actual, shape, strict=True):  # noqa: SIM110
        if want is not None and have != want:
            return False
    return True


def _refuse(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> NoReturn:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
    if not _has_shape(tensor, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have the shape [{wanted}], not {list(tensor.shape)}")
    raise ValueError(f"{name} must be contiguous: call .contiguous() on it")


def require_packed(input_ids: Tensor, sequence_offsets: Tensor) -> None:
    """Raises unless these are the ids of sequences laid end to end: int32 [tokens], int64 [sequences + 1]."""
    require_vector("input_ids", input_ids, torch.int32)
    require_vector("sequence_offsets", sequence_offsets, torch.int64)
    if sequence_offsets.shape[0] == 0:
        raise ValueError("sequence_offsets must hold at least the offset 0, not be empty")


def require_window(window: int) -> None:
    """Raises ValueError unless the window is 2 or 3 tokens wide."""
    if window not in (2, 3):
        raise ValueError(f"window must be 2 or 3, not {window}")


def require_order(order: int) -> None:
    """Raises ValueError unless the n-grams are of 1, 2 or 3 tokens."""
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, not {order}")


def require_no_overlap(output: Tensor, hidden_states: Tensor) -> None:
    """Raises ValueError if the address ranges of the two matrices meet."""
    first, second = output.data_ptr(), hidden_states.data_ptr()
    do_meet = first < second + _extent(hidden_states) and second < first + _extent(output)
    if do_meet and output.numel() and hidden_states.numel():
        raise ValueError("output and hidden_states share memory: the op reads one while it writes the other")


def _extent(matrix: Tensor) -> int:
    """Bytes from the first element to the last."""
    num_rows, num_columns = matrix.shape
    return ((num_rows - 1) * matrix.stride()[0] + num_columns) * matrix.element_size()
