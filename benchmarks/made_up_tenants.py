"""Tenants that cost next to nothing to draw: windows into one block of random numbers, each another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.tenant_fleet import FLEET
from hmi_engine.knowledge.adapter_kinds import KINDS
from hmi_engine.knowledge.adapter_kinds.kind import Block
from hmi_engine.knowledge.adapters import Adapter, random_adapter
from hmi_engine.knowledge.changes import NewTenant
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import ClassificationHead

__all__ = ["SHAPES", "TenantDrawer", "made_up_name"]

_LABELS = ("first", "second", "third", "fourth")


def made_up_name(number: int) -> str:
    """Name of a tenant; a hundred owners share the names."""
    return f"owner{number % 100:02d}/tenant{number:06d}"


def _mixed(general: GeneralInfo) -> list[Adapter]:
    return [random_adapter(general, kind, max(rank, 1), seed) for seed, (kind, rank) in enumerate(FLEET)]


def _small(general: GeneralInfo) -> list[Adapter]:
    last = [general.num_layers - 1]
    return [random_adapter(general, "lora", 2, 0, layers=last)]


SHAPES: dict[str, Callable[[GeneralInfo], Sequence[Adapter]]] = {"mixed": _mixed, "small": _small}
"""``mixed``: kinds and ranks of the fleet in turn; ``small``: LoRA of rank 2 on the last layer."""


class TenantDrawer:
    """Draws tenants of one of :data:`SHAPES`: same number and seed, same weights."""

    def __init__(self, general: GeneralInfo, shape: str, seed: int = 0) -> None:
        self._hidden_size = general.hidden_size
        self._patterns = SHAPES[shape](general)
        most = max(pattern.num_parameters for pattern in self._patterns)
        self._num_values = most + (len(_LABELS) + 1) * general.hidden_size
        generator = torch.Generator().manual_seed(seed)
        # Windows begin anywhere in the first part: so many that no two tenants of a run have the same.
        self._values = torch.randn(self._num_values + (1 << 20), generator=generator) * 0.02

    def __call__(self, numbers: range) -> Iterator[NewTenant]:
        """The tenants of these numbers, each made when it is asked for."""
        return (self._tenant(number) for number in numbers)

    def _tenant(self, number: int) -> NewTenant:
        start = number * 7 % (1 << 20)  # 7 is odd: every number below 2**20 has a place of its own
        window = self._values[start : start + self._num_values]
        used = 0

        def draw(*shape: int) -> torch.Tensor:
            nonlocal used
            size = torch.Size(shape).numel()
            used += size
            return window[used - size : used].view(shape)

        pattern = self._patterns[number % len(self._patterns)]
        blocks = {place: _like(block, draw) for place, block in pattern.blocks.items()}
        head = ClassificationHead(_LABELS, draw(len(_LABELS), self._hidden_size), draw(len(_LABELS)), "mean")
        return NewTenant(made_up_name(number), "general", Adapter(blocks), head, {"random_weights": True})


def _like(block: Block, draw: Callable[..., torch.Tensor]) -> Block:
    kind = next(kind for kind in KINDS.values() if kind.block_type is type(block))
    tensors = {name: draw(*tensor.shape) for name, tensor in block.tensors().items()}
    return kind.block(tensors, block.settings())
