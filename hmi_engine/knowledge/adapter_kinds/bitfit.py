"""BitFit: Ben Zaken et al. 2021, arXiv 2106.10199."""

from dataclasses import dataclass

import torch

import hmi_kernels
from hmi_engine.knowledge.adapter_kinds.kind import BlockSizes, GroupedCall
from hmi_engine.knowledge.adapter_kinds.sites import Site
from hmi_engine.knowledge.adapter_kinds.vector import VectorBlock, VectorKind

__all__ = ["BiasBlock", "BitfitKind"]


@dataclass(frozen=True, eq=False)
class BiasBlock(VectorBlock):
    """A learned bias: ``vector`` [out] is what is added to the base's bias, so zero changes nothing.

    A model that was trained with biases of its own has ``vector = its bias - the base's bias``.
    """


class BitfitKind(VectorKind):
    """Biases of the linear layers and LayerNorms."""

    name = "bitfit"
    sites = (
        Site.QUERY_BIAS,
        Site.KEY_BIAS,
        Site.VALUE_BIAS,
        Site.ATTENTION_OUTPUT_BIAS,
        Site.FFN_UP_BIAS,
        Site.FFN_DOWN_BIAS,
        Site.ATTENTION_NORM_BIAS,
        Site.FFN_NORM_BIAS,
    )
    default_sites = sites
    block_type = BiasBlock

    def random_block(self, sizes: BlockSizes, generator: torch.Generator) -> BiasBlock:
        """Return small normal values."""
        return BiasBlock(torch.randn(sizes.outputs, generator=generator) * 0.02)

    def apply(self, call: GroupedCall) -> None:
        """Add the biases of all tenants that have one."""
        hmi_kernels.grouped_bias(
            call.output, call.arena, call.segment_offsets, call.segment_slots, call.slots.offsets
        )
