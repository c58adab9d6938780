"""AdamW over stacked tenants: one step for all, each with its own learning rate and its own clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hmi_engine.construct.stacked_tenants import ParameterTable

__all__ = ["StackedOptimizer"]


class StackedOptimizer:
    """AdamW (Loshchilov and Hutter 2019), whose step is linear in the learning rate.

    So torch takes one step at a learning rate of 1 for all rows, of which each row goes its own share. Rows
    have all taken the same number of steps, which is all that AdamW's moments need to know of time.
    """

    def __init__(self, tables: Sequence[ParameterTable], max_norm: float) -> None:
        """``max_norm``: of each row's gradient over all tables, which is scaled down to it."""
        self._tables, self._max_norm = list(tables), max_norm
        self._adamw = torch.optim.AdamW([table.rows for table in tables], lr=1.0, weight_decay=0.0)

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self._adamw.zero_grad()

    @torch.no_grad()
    def step(self, rates: Tensor, weight_decays: Tensor) -> Tensor:
        """Follows the gradients.

        Args:
            rates: learning rate of each row, float32 [N]; 0 for rows that stay as they are.
            weight_decays: of each row, float32 [N].

        Returns:
            Whether each row's gradient was finite, bool [N]; a row whose was not stays as it is.
        """
        norms = self._norms()
        is_finite = norms.isfinite()
        factors = (self._max_norm / (norms + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_
        before = []
        for table in self._tables:
            gradient = _gradient(table)
            gradient.mul_(factors[:, None])
            gradient[~is_finite] = 0
            table.rows.grad = gradient
            before.append(table.rows.clone())
        self._adamw.step()
        rates = torch.where(is_finite, rates, 0)[:, None]
        for table, rows in zip(self._tables, before, strict=True):
            steps = table.rows - rows - weight_decays[:, None] * table.decays * rows
            table.rows.copy_(torch.addcmul(rows, steps, rates))
        return is_finite

    def _norms(self) -> Tensor:
        squares = [_gradient(table).square().sum(1) for table in self._tables]
        return torch.stack(squares).sum(0).sqrt()


def _gradient(table: ParameterTable) -> Tensor:
    gradient = table.rows.grad
    return torch.zeros_like(table.rows) if gradient is None else gradient
