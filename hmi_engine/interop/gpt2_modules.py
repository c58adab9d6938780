"""How transformers names the modules of a GPT-2, and where HMI's blocks stand beside them."""

from __future__ import annotations

import re

from hmi_engine.interop.bert_modules import ModuleName
from hmi_engine.knowledge.adapters import Site

__all__ = ["BIAS_SITES", "LINEAR_SITES", "layer_module", "parse_module"]

LINEAR_SITES: dict[str, tuple[Site, ...]] = {
    "attn.c_attn": (Site.QUERY, Site.KEY, Site.VALUE),
    "attn.c_proj": (Site.ATTENTION_OUTPUT,),
    "mlp.c_fc": (Site.FFN_UP,),
    "mlp.c_proj": (Site.FFN_DOWN,),
}
"""The linear layers of a block, named below ``h.N``, each with the sites of its outputs, side by side."""

BIAS_SITES: dict[str, tuple[Site, ...]] = {
    **{f"{module}.bias": tuple(Site(f"{s}.bias") for s in sites) for module, sites in LINEAR_SITES.items()},
    "ln_1.bias": (Site.ATTENTION_NORM_BIAS,),
    "ln_2.bias": (Site.FFN_NORM_BIAS,),
}
"""The biases of a block, in the same way."""

_LAYER_MODULE = re.compile(r"h\.(?P<layer>\d{1,6})\.(?P<rest>[A-Za-z0-9_.]+)", re.ASCII)


def layer_module(layer: int, rest: str) -> str:
    """``h.3.attn.c_attn``."""
    return f"h.{layer}.{rest}"


def parse_module(name: str) -> ModuleName | None:
    """The reverse of :func:`layer_module`; None for anything else."""
    match = _LAYER_MODULE.fullmatch(name)
    return ModuleName(int(match["layer"]), match["rest"]) if match else None
