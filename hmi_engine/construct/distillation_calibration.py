"""Where the merge starts: the LayerNorm that fits the teacher best, by least squares.

An undistilled merge gives every element variance 1, the teacher's hidden states have their own. An optimizer
that moves a weight by the learning rate at most would spend hundreds of steps on what two sums tell.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["fit_layer_norm", "is_untrained"]


def is_untrained(layer_norm: nn.LayerNorm) -> bool:
    """Whether weight and bias are what an undistilled merge has."""
    return bool((layer_norm.weight == 1).all() and (layer_norm.bias == 0).all())


@torch.no_grad()
def fit_layer_norm(layer_norm: nn.LayerNorm, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Sets weight and bias to the least squares fit of each element over all tokens.

    Args:
        layer_norm: with weight 1 and bias 0.
        pairs: its outputs [T, H] as it is, and the wanted outputs [T, H]; consumed once.
    """
    size = layer_norm.weight.shape
    device = layer_norm.weight.device
    count = 0
    sums = [torch.zeros(size, dtype=torch.float64, device=device) for _ in range(4)]
    for output, wanted in pairs:
        x, y = output.double(), wanted.double()
        count += len(x)
        products = (x, y, x * x, x * y)
        sums = [total + product.sum(0) for total, product in zip(sums, products, strict=True)]
    x, y, xx, xy = (total / count for total in sums)
    variance = xx - x * x
    weight = torch.where(variance > 0, (xy - x * y) / variance.clamp(min=1e-12), 1.0)
    layer_norm.weight.copy_(weight)
    layer_norm.bias.copy_(y - weight * x)
