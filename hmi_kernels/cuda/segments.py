"""What the CUDA kernels ask of the tensors that they read 16 bytes at a time."""

from __future__ import annotations

from torch import Tensor

__all__ = ["MAX_RANK", "SIZE_MULTIPLE", "misaligned", "misaligned_start", "too_many"]

SIZE_MULTIPLE = 8
"""Elements in 16 bytes: what sizes, ranks and offsets are multiples of (csrc/cuda/adapter_plan.h)."""
MAX_RANK = 256


def too_many(num_tokens: int, num_segments: int) -> str:
    """Why a grid of their tiles would not have a 32-bit size, "" if it has."""
    if num_tokens + num_segments < 2**31 - 1:
        return ""
    return f"tokens and segments must be fewer than 2^31 together, not {num_tokens} and {num_segments}"


def misaligned_start(name: str, tensor: Tensor) -> str:
    """Why 16 bytes cannot be read from the tensor's start on, "" if they can."""
    return f"{name} must start at a multiple of 16 bytes" if tensor.data_ptr() % 16 else ""


def misaligned(name: str, tensor: Tensor) -> str:
    """Why the tensor's rows cannot be read 16 bytes at a time, "" if they can."""
    if (reason := misaligned_start(name, tensor)) or tensor.dim() == 1:
        return reason
    num_rows, num_columns = tensor.shape
    if num_columns % SIZE_MULTIPLE:
        return f"{name} must have a multiple of {SIZE_MULTIPLE} columns, not {num_columns}"
    if num_rows > 1 and (stride := tensor.stride()[0]) % SIZE_MULTIPLE:
        return f"rows of {name} must be a multiple of {SIZE_MULTIPLE} elements apart, not {stride}"
    return ""
