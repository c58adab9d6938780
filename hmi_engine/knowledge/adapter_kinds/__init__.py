"""The kinds of adapters, each in one file that says all of it: blocks, sites, shapes, settings, kernel.

A new kind is a file here, an entry of :data:`KINDS`, and an op of ``hmi_kernels``; where it acts at places
that no kind uses yet, these are new members of ``Site`` and hooks of the layer.
"""

from hmi_engine.knowledge.adapter_kinds.bitfit import BitfitKind
from hmi_engine.knowledge.adapter_kinds.bottleneck import BottleneckKind
from hmi_engine.knowledge.adapter_kinds.ia3 import Ia3Kind
from hmi_engine.knowledge.adapter_kinds.kind import BlockKind
from hmi_engine.knowledge.adapter_kinds.lora import LoraKind
from hmi_engine.knowledge.adapter_kinds.sites import Site

__all__ = ["KINDS", "KIND_OF_SITE"]

KINDS: dict[str, BlockKind] = {
    kind.name: kind for kind in (BottleneckKind(), LoraKind(), Ia3Kind(), BitfitKind())
}
"""Every kind by its name."""

KIND_OF_SITE: dict[Site, BlockKind] = {site: kind for kind in KINDS.values() for site in kind.sites}
"""A site determines the kind of the blocks that stand there."""
