"""Whether two systems computed the same, by a bound that follows from the dtype."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest_error", "relative_error"]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of ``expected``, in float32; infinite if any is not finite."""
    difference = result.float() - expected.float()
    if not bool(difference.isfinite().all()):
        return float("inf")
    return float(difference.norm() / expected.float().norm().clamp(min=1e-30))


def largest_error(dtype: torch.dtype) -> float:
    """The bound on :func:`relative_error` of a grouped adapter that rounds to ``dtype``.

    Rounding to nearest errs by at most eps / 2 of a value, so by at most that in the norm. Peers round up
    to four times (inner state, product, sum, layer norm); sums in float32 add nothing beside it.
    """
    return 4 * torch.finfo(dtype).eps / 2
