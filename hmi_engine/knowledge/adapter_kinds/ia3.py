"""IA3: Liu et al. 2022, arXiv 2205.05638."""

from dataclasses import dataclass

import torch

import hmi_kernels
from hmi_engine.knowledge.adapter_kinds.kind import BlockSizes, GroupedCall
from hmi_engine.knowledge.adapter_kinds.sites import Site
from hmi_engine.knowledge.adapter_kinds.vector import VectorBlock, VectorKind

__all__ = ["Ia3Kind", "ScaleBlock"]


@dataclass(frozen=True, eq=False)
class ScaleBlock(VectorBlock):
    """A learned scale: multiplies rows by ``vector`` [in] or [out] (Liu et al. 2022).

    At ``<linear>.scale`` the whole output of the linear layer, bias included; at ``<linear>.input_scale`` its
    input. These are PEFT's ``ia3_l``, outside and inside of its ``feedforward_modules``.
    """


class Ia3Kind(VectorKind):
    """Scales of a linear layer's input or output."""

    name = "ia3"
    sites = (
        Site.QUERY_SCALE,
        Site.KEY_SCALE,
        Site.VALUE_SCALE,
        Site.ATTENTION_OUTPUT_SCALE,
        Site.FFN_UP_SCALE,
        Site.FFN_DOWN_SCALE,
        Site.ATTENTION_OUTPUT_INPUT_SCALE,
        Site.FFN_UP_INPUT_SCALE,
        Site.FFN_DOWN_INPUT_SCALE,
    )
    default_sites = (Site.KEY_SCALE, Site.VALUE_SCALE, Site.FFN_DOWN_INPUT_SCALE)
    block_type = ScaleBlock

    def random_block(self, sizes: BlockSizes, generator: torch.Generator) -> ScaleBlock:
        """Return scales near 1."""
        return ScaleBlock(1 + torch.randn(sizes.outputs, generator=generator) * 0.02)

    def apply(self, call: GroupedCall) -> None:
        """Multiply the rows of all tenants that have a scale."""
        hmi_kernels.grouped_scale(
            call.output, call.arena, call.segment_offsets, call.segment_slots, call.slots.offsets
        )
