"""Weights that make rare labels count as much as frequent ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["balanced_weights"]


def balanced_weights(counts: Iterable[int]) -> Tensor:
    """N / (C * count) of each of C labels, float32 [C]: scikit-learn's ``class_weight="balanced"``.

    A label without examples weighs nothing.
    """
    numbers = torch.tensor(list(counts), dtype=torch.float32)
    weights = numbers.sum() / (len(numbers) * numbers)
    return torch.where(numbers > 0, weights, 0.0)
