"""Whether a tensor holds NaN or infinity."""

import math

import torch
from torch import Tensor

__all__ = ["is_finite"]


def is_finite(tensor: Tensor) -> bool:
    """Return whether a float tensor holds neither NaN nor infinity.

    Both pass into the sum, so that a finite sum answers at a third of the price; the sum of large numbers may
    overflow, and then each is looked at.
    """
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
