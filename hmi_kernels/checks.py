"""Checks of what a tensor is (type, shape, layout), which every op makes before an address is passed on.

What a tensor holds is checked by the kernels themselves, which read it anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Dtypes = torch.dtype | tuple[torch.dtype, ...]
Shape = tuple[int | None, ...]
FLOATS = (torch.float32, torch.float16)


def require_tensor(
    name: str, tensor: Tensor, dtype: Dtypes, shape: Shape, *, strided_rows: bool = False
) -> None:
    """Raises TypeError on another dtype, ValueError on another shape (None: any size) or a layout that is not dense.

    With ``strided_rows`` rows may lie apart, as in a column slice of a wider matrix; each row must be dense.
    """
    expected = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in expected:
        raise TypeError(f"{name} must be {' or '.join(map(str, expected))}, not {tensor.dtype}")
    actual = tensor.shape
    if len(actual) != len(shape) or any(
        want is not None and have != want for have, want in zip(actual, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have the shape [{wanted}], not {list(actual)}")
    if strided_rows:
        if not has_dense_rows(tensor):
            raise ValueError(
                f"{name} must have dense rows (strides [>= {actual[1]}, 1]), not {tensor.stride()}"
            )
    elif not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous: call .contiguous() on it")


def has_dense_rows(matrix: Tensor) -> bool:
    """Whether the rows of a matrix do not overlap and hold their elements next to each other."""
    num_rows, num_columns = matrix.shape
    row_stride, column_stride = matrix.stride()
    return (column_stride == 1 or num_columns <= 1) and (row_stride >= num_columns or num_rows <= 1)


def require_packed(input_ids: Tensor, sequence_offsets: Tensor) -> None:
    """Raises unless these are token ids of sequences laid end to end: int32 [tokens], int64 [sequences + 1]."""
    require_tensor("input_ids", input_ids, torch.int32, (None,))
    require_tensor("sequence_offsets", sequence_offsets, torch.int64, (None,))
    if sequence_offsets.shape[0] == 0:
        raise ValueError("sequence_offsets must hold at least the offset 0, not be empty")


def require_one_device(**tensors: Tensor | Sequence[Tensor]) -> None:
    """Raises ValueError unless all tensors lie on the device of the first."""
    device: torch.device | None = None
    for name, value in tensors.items():
        for tensor in (value,) if isinstance(value, Tensor) else value:
            device = device or tensor.device
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, but the tensors before it are on {device}")


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
    if output.numel() == 0 or hidden_states.numel() == 0:
        return
    first, second = _address_range(output), _address_range(hidden_states)
    if first[0] < second[1] and second[0] < first[1]:
        raise ValueError("output and hidden_states share memory: the op reads one while it writes the other")


def _address_range(matrix: Tensor) -> tuple[int, int]:
    start = matrix.data_ptr()
    num_rows, num_columns = matrix.shape
    return start, start + ((num_rows - 1) * matrix.stride(0) + num_columns) * matrix.element_size()
