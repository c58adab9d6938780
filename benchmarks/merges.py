"""Other ways to merge rows than their sum: modules that a distillation's student takes instead of it.

All begin as the sum (what they add is zero, or the identity), so that they can go on from a model that was
distilled for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmi_engine.construct.distillation_student import Merge
from hmi_engine.construct.distillation_windows import MergePlan

__all__ = ["FORMS", "Form", "GatedMerge", "MatrixMerge", "NeighbourMerge", "NetworkMerge", "WeightMerge"]

ALONE = 2
"""A row's part in a bigram merge: 0 the window with the right neighbour, 1 that with the left one, 2 the
token alone."""
PARTS = 3


def part_of_rows(plan: MergePlan) -> Tensor:
    """Part of each row of a plan's order, int64 [R]."""
    count = len(plan.windows)
    sizes = torch.tensor([count, count, len(plan.tokens)])
    return torch.repeat_interleave(torch.arange(PARTS), sizes).to(plan.rows.device)


class _PartedMerge(Merge):
    """A merge that tells the parts of a bigram merge apart."""

    @property
    def size(self) -> int:
        """H."""
        return self.position_embeddings.shape[1]

    def parts(self, rows: Tensor, plan: MergePlan, positions: Tensor) -> list[Tensor]:
        """The sums of each token's rows of each part: right, left, alone, [T, H] each."""
        part_of_term = part_of_rows(plan)[plan.rows]
        masked = (plan.coefficients * (part_of_term == part) for part in range(PARTS))
        plans = (replace(plan, coefficients=each) for each in masked)
        return [Merge.combine(self, rows, each, positions) for each in plans]


class WeightMerge(_PartedMerge):
    """A learned weight for each part and element."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.weights = nn.Parameter(torch.ones(PARTS, self.size))

    def combine(self, rows: Tensor, plan: MergePlan, positions: Tensor) -> Tensor:
        """Each row times its part's weights, added up."""
        return super().combine(rows * self.weights[part_of_rows(plan)], plan, positions)


class MatrixMerge(_PartedMerge):
    """A learned matrix for each part. A table could hold the products, so that serving stays a sum."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.matrices = nn.Parameter(torch.eye(self.size).repeat(PARTS, 1, 1))

    def combine(self, rows: Tensor, plan: MergePlan, positions: Tensor) -> Tensor:
        """Each row times its part's matrix, added up."""
        count = len(plan.windows)
        members = rows.split([count, count, len(plan.tokens)])
        products = [part @ matrix for part, matrix in zip(members, self.matrices, strict=True)]
        return super().combine(torch.cat(products), plan, positions)


class GatedMerge(_PartedMerge):
    """Gates from all of a token's rows say how much of each neighbour's window counts, element by element."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.gate = nn.Linear(PARTS * self.size, ALONE * self.size)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def combine(self, rows: Tensor, plan: MergePlan, positions: Tensor) -> Tensor:
        """``2 sigmoid(W [right, left, alone] + b)`` times both windows' rows, and the token's own."""
        right, left, alone = self.parts(rows, plan, positions)
        gates = 2 * self.gate(torch.cat([right, left, alone], 1)).sigmoid()
        to_right, to_left = gates.chunk(2, dim=1)
        combined: Tensor = to_right * right + to_left * left + alone
        return combined


class NeighbourMerge(_PartedMerge):
    """The sum, and what a matrix for each side makes of the neighbouring tokens' sums: one token further."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.left, self.right = (nn.Linear(self.size, self.size, bias=False) for _ in range(2))
        for side in (self.left, self.right):
            nn.init.zeros_(side.weight)

    def combine(self, rows: Tensor, plan: MergePlan, positions: Tensor) -> Tensor:
        """``s[t] + A s[t-1] + B s[t+1]`` inside the sequence."""
        summed = super().combine(rows, plan, positions)
        begins = (positions == 0)[:, None]
        ends = begins.roll(-1, 0)
        before = summed.roll(1, 0).masked_fill(begins, 0)
        after = summed.roll(-1, 0).masked_fill(ends, 0)
        combined: Tensor = summed + self.left(before) + self.right(after)
        return combined


class NetworkMerge(_PartedMerge):
    """The sum, and what a layer of 4 H hidden units makes of a token's rows: what any merge might find."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.inner = nn.Linear(PARTS * self.size, 4 * self.size)
        self.outer = nn.Linear(4 * self.size, self.size)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def combine(self, rows: Tensor, plan: MergePlan, positions: Tensor) -> Tensor:
        """``sum + V gelu(W [right, left, alone] + b) + c``."""
        right, left, alone = self.parts(rows, plan, positions)
        inner = functional.gelu(self.inner(torch.cat([right, left, alone], 1)))
        combined: Tensor = right + left + alone + self.outer(inner)
        return combined


@dataclass(frozen=True)
class Form:
    """A way to merge.

    Attributes:
        name: in tables.
        build: makes it of ``merge.safetensors``.
        served_layers: multiplications for a token in service, over those of an upper layer, 12 H^2.
    """

    name: str
    build: Callable[[dict[str, Tensor]], Merge]
    served_layers: float


FORMS = (
    Form("sum (as it is)", Merge, 0.0),
    Form("a weight a part", WeightMerge, 0.0),
    Form("a matrix a part", MatrixMerge, 0.0),
    Form("gates", GatedMerge, 6 / 12),
    Form("neighbours' sums", NeighbourMerge, 2 / 12),
    Form("a network", NetworkMerge, 16 / 12),
)
