"""How transformers names the modules of a BERT, and where HMI's blocks stand beside them."""

from __future__ import annotations

import re
from typing import NamedTuple

from hmi_engine.knowledge.adapters import Site

__all__ = ["BIAS_SITES", "LINEAR_SITES", "SITE_OF_LINEAR", "ModuleName", "layer_module", "parse_module"]

LINEAR_SITES = {
    Site.QUERY: "attention.self.query",
    Site.KEY: "attention.self.key",
    Site.VALUE: "attention.self.value",
    Site.ATTENTION_OUTPUT: "attention.output.dense",
    Site.FFN_UP: "intermediate.dense",
    Site.FFN_DOWN: "output.dense",
}
"""The linear layers of a transformer layer, named below ``encoder.layer.N``."""

SITE_OF_LINEAR = {module: site for site, module in LINEAR_SITES.items()}

BIAS_SITES = {
    **{f"{module}.bias": Site(f"{site}.bias") for site, module in LINEAR_SITES.items()},
    "attention.output.LayerNorm.bias": Site.ATTENTION_NORM_BIAS,
    "output.LayerNorm.bias": Site.FFN_NORM_BIAS,
}
"""The biases of a transformer layer."""

_LAYER_MODULE = re.compile(r"encoder\.layer\.(?P<layer>\d{1,6})\.(?P<rest>[A-Za-z_.]+)", re.ASCII)


class ModuleName(NamedTuple):
    """Something inside of transformer layer ``layer``, named ``rest`` there."""

    layer: int
    rest: str


def layer_module(layer: int, rest: str) -> str:
    """``encoder.layer.3.attention.self.query``."""
    return f"encoder.layer.{layer}.{rest}"


def parse_module(name: str) -> ModuleName | None:
    """The reverse of :func:`layer_module`; None for anything else."""
    match = _LAYER_MODULE.fullmatch(name)
    return ModuleName(int(match["layer"]), match["rest"]) if match else None
