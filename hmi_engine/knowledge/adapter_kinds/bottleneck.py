"""Bottleneck adapters: Houlsby et al. 2019, Pfeiffer et al. 2020, and parallel, He et al. 2021."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.errors import InvalidAdapterError
from hmi_engine.knowledge.adapter_kinds.kind import (
    Block,
    BlockKind,
    BlockSizes,
    GroupedCall,
    Settings,
    Shapes,
    check_names,
    check_scale,
)
from hmi_engine.knowledge.adapter_kinds.sites import Site
from hmi_engine.knowledge.general import GeneralInfo

__all__ = ["BottleneckBlock", "BottleneckKind"]


@dataclass(frozen=True, eq=False)
class BottleneckBlock(Block):
    """A bottleneck: adds ``scale * (activation(x @ down + down_bias) @ up + up_bias)``.

    ``down`` [H, R], ``down_bias`` [R], ``up`` [R, H], ``up_bias`` [H], of a float type (Houlsby et al. 2019,
    Pfeiffer et al. 2020). ``activation`` is one of ``hmi_kernels.ACTIVATIONS``.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: str
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Width R of the bottleneck."""
        return int(self.down.shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name in the order in which kernels read them."""
        return {"down": self.down, "down_bias": self.down_bias, "up": self.up, "up_bias": self.up_bias}

    def settings(self) -> Settings:
        """Return ``activation`` and ``scale``."""
        return {"activation": self.activation, "scale": self.scale}


class BottleneckKind(BlockKind):
    """Two small matrices with an activation between them."""

    name = "bottleneck"
    sites = (Site.AFTER_ATTENTION, Site.AFTER_FFN, Site.AFTER_FFN_NORMALIZED, Site.PARALLEL_FFN)
    default_sites = (Site.AFTER_FFN_NORMALIZED,)
    block_type = BottleneckBlock
    has_rank = True

    def sizes(self, site: Site, general: GeneralInfo) -> tuple[int, int]:
        """Return the hidden size twice."""
        return general.hidden_size, general.hidden_size

    def shapes(self, sizes: BlockSizes) -> Shapes:
        """Return the shapes of ``down, down_bias, up, up_bias``."""
        inputs, rank, outputs = sizes
        return {"down": (inputs, rank), "down_bias": (rank,), "up": (rank, outputs), "up_bias": (outputs,)}

    def sizes_of(self, shapes: Shapes) -> BlockSizes | None:
        """Return the sizes that two matrices have."""
        down, up = shapes["down"], shapes["up"]
        return BlockSizes(*down, up[1]) if len(down) == len(up) == 2 else None

    def check_settings(self, where: str, settings: Mapping[str, object]) -> None:
        """Raise :class:`InvalidAdapterError` unless there is a known activation and a finite scale."""
        check_names(where, settings, ("activation", "scale"))
        check_scale(where, settings["scale"])
        if settings["activation"] not in hmi_kernels.ACTIVATIONS:
            raise InvalidAdapterError(
                f"{where}: activation {settings['activation']!r:.80} is unknown; known are "
                f"{', '.join(hmi_kernels.ACTIVATIONS)}"
            )

    def block(self, tensors: Mapping[str, Tensor], settings: Settings) -> BottleneckBlock:
        """Return the block of checked tensors and settings."""
        return BottleneckBlock(
            **tensors, activation=str(settings["activation"]), scale=float(settings["scale"])
        )

    def random_block(self, sizes: BlockSizes, generator: torch.Generator) -> BottleneckBlock:
        """Return a block of small normal values with GELU."""
        shapes = self.shapes(sizes)
        tensors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        return self.block(tensors, {"activation": "gelu", "scale": 1.0})

    def apply(self, call: GroupedCall) -> None:
        """Add the bottlenecks of all tenants."""
        output, hidden_states, arena, segment_offsets, segment_slots, slots, _ = call
        hmi_kernels.grouped_bottleneck(
            output,
            hidden_states,
            arena,
            segment_offsets,
            segment_slots,
            slots.offsets,
            slots.ranks,
            slots.activations,
            slots.scales,
            max_rank=slots.max_rank,
        )
