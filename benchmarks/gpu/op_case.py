"""A call of an op that can be repeated on other inputs, and the tensors for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OpCase", "int32", "random_tensor"]


@dataclass(frozen=True)
class OpCase:
    """One call.

    Attributes:
        name: op and hazard.
        run: does the call, in place on a copy of its start, and returns the tensor that it changed or made.
        refill: puts new random values into the tensors, from a seed.
    """

    name: str
    run: Callable[[], Tensor]
    refill: Callable[[int], None]


def random_tensor(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Standard normal, the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def int32(values: list[int], device: torch.device) -> Tensor:
    """int32 [n]."""
    return torch.tensor(values, dtype=torch.int32, device=device)
