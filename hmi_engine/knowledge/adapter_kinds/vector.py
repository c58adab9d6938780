"""What kinds have in common whose blocks are one vector for one row of hidden states."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hmi_engine.knowledge.adapter_kinds.kind import (
    Block,
    BlockKind,
    BlockSizes,
    Settings,
    Shapes,
    check_names,
)
from hmi_engine.knowledge.adapter_kinds.sites import Site, linear_sizes
from hmi_engine.knowledge.general import GeneralInfo

__all__ = ["VectorBlock", "VectorKind"]


@dataclass(frozen=True, eq=False)
class VectorBlock(Block):
    """One vector as wide as the rows that it changes."""

    vector: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the vector by its name."""
        return {"vector": self.vector}


class VectorKind(BlockKind):
    """One vector for each place; no rank and no settings."""

    has_rank = False
    block_type: ClassVar[type[VectorBlock]]

    def sizes(self, site: Site, general: GeneralInfo) -> tuple[int, int]:
        """Return the width of the rows twice: a linear layer's input, or its or a LayerNorm's output."""
        linear, _, action = site.value.partition(".")
        size = linear_sizes(linear, general)[0 if action.startswith("input") else 1]
        return size, size

    def shapes(self, sizes: BlockSizes) -> Shapes:
        """Return the shape of ``vector``."""
        return {"vector": (sizes.outputs,)}

    def sizes_of(self, shapes: Shapes) -> BlockSizes | None:
        """Return the sizes that the vector has."""
        shape = shapes["vector"]
        return BlockSizes(shape[0], 0, shape[0]) if len(shape) == 1 else None

    def check_settings(self, where: str, settings: Mapping[str, object]) -> None:
        """Raise :class:`InvalidAdapterError` if there are any."""
        check_names(where, settings, ())

    def block(self, tensors: Mapping[str, Tensor], settings: Settings) -> VectorBlock:
        """Return the block of a checked vector."""
        return self.block_type(tensors["vector"])
