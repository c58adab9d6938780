"""LoRA: Hu et al. 2021, arXiv 2106.09685."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import hmi_kernels
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
from hmi_engine.knowledge.adapter_kinds.sites import Site, linear_sizes
from hmi_engine.knowledge.general import GeneralInfo

__all__ = ["LoraBlock", "LoraKind"]


@dataclass(frozen=True, eq=False)
class LoraBlock(Block):
    """A low-rank update: adds ``scale * (x @ a) @ b`` to a linear layer's output (Hu et al. 2021).

    ``a`` [in, R] is PEFT's ``lora_A`` transposed, ``b`` [R, out] its ``lora_B`` transposed.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rank R of the update."""
        return int(self.a.shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name in the order in which kernels read them."""
        return {"a": self.a, "b": self.b}

    def settings(self) -> Settings:
        """Return ``scale``."""
        return {"scale": self.scale}


class LoraKind(BlockKind):
    """Two small matrices beside a linear layer."""

    name = "lora"
    sites = (Site.QUERY, Site.KEY, Site.VALUE, Site.ATTENTION_OUTPUT, Site.FFN_UP, Site.FFN_DOWN)
    default_sites = (Site.QUERY, Site.VALUE)
    block_type = LoraBlock
    has_rank = True

    def sizes(self, site: Site, general: GeneralInfo) -> tuple[int, int]:
        """Return the sizes of the linear layer."""
        return linear_sizes(site.value, general)

    def shapes(self, sizes: BlockSizes) -> Shapes:
        """Return the shapes of ``a`` and ``b``."""
        inputs, rank, outputs = sizes
        return {"a": (inputs, rank), "b": (rank, outputs)}

    def sizes_of(self, shapes: Shapes) -> BlockSizes | None:
        """Return the sizes that two matrices have."""
        a, b = shapes["a"], shapes["b"]
        return BlockSizes(*a, b[1]) if len(a) == len(b) == 2 else None

    def check_settings(self, where: str, settings: Mapping[str, object]) -> None:
        """Raise :class:`InvalidAdapterError` unless there is a finite scale and nothing else."""
        check_names(where, settings, ("scale",))
        check_scale(where, settings["scale"])

    def block(self, tensors: Mapping[str, Tensor], settings: Settings) -> LoraBlock:
        """Return the block of checked tensors and settings."""
        return LoraBlock(**tensors, scale=float(settings["scale"]))

    def random_block(self, sizes: BlockSizes, generator: torch.Generator) -> LoraBlock:
        """Return a block of small normal values, both matrices."""
        shapes = self.shapes(sizes)
        tensors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        return LoraBlock(**tensors, scale=1.0)

    def apply(self, call: GroupedCall) -> None:
        """Add the low-rank updates of all tenants."""
        output, hidden_states, arena, segment_offsets, segment_slots, slots, output_sizes = call
        hmi_kernels.grouped_lora(
            output,
            hidden_states,
            arena,
            segment_offsets,
            segment_slots,
            slots.offsets,
            slots.ranks,
            slots.scales,
            output_sizes=output_sizes,
            max_rank=slots.max_rank,
        )
