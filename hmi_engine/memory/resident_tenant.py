"""A tenant in memory, as a batch sees it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from hmi_engine.knowledge.heads import Head
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.knowledge.tenant_file import HeadLayout

__all__ = ["ResidentTenant"]


@dataclass(frozen=True)
class ResidentTenant:
    """A tenant whose parameters lie in the arena.

    Attributes:
        info: the catalog's record, of exactly the generation that is loaded.
        slot: number that the grouped kernels use.
        places: (layer, site) of its blocks.
        head: the head's settings.
        parameters: elements [n] of the arena: blocks and head, the head in float32 whatever the arena's are.
        arena_offset: first element in the arena.
    """

    info: TenantInfo
    slot: int
    places: frozenset[tuple[int, str]]
    head: HeadLayout
    parameters: torch.Tensor
    arena_offset: int

    @functools.cached_property
    def first_layer(self) -> int | None:
        """The first that its adapter changes; None if it changes none."""
        return min((layer for layer, _ in self.places), default=None)

    @functools.cached_property
    def output_head(self) -> Head:
        """The head, its tensors float32 views of ``parameters``."""
        return self.head.build(self.parameters.view(torch.float32))
