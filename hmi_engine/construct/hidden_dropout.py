"""Dropout of hidden states while a tenant is trained."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HiddenDropout"]


class HiddenDropout:
    """Sets a random share of elements to zero and scales up the others (Srivastava et al., JMLR 2014).

    Only while gradients are followed. Draws from a generator of its own, so that a training with the same
    seed is the same whatever else draws.
    """

    def __init__(self, share: float = 0.0, seed: int = 0) -> None:
        """``share``: of the elements, 0 to below 1."""
        self.share = share
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        """A tensor like ``x``, or ``x`` itself where nothing is to be dropped."""
        if not self.share or not torch.is_grad_enabled():
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.share, generator=self._generator)
        return x * kept.div_(1 - self.share)
