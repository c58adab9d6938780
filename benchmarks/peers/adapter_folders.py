"""Keeping tenants as people do without a store: a folder for each, with its weights and a configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hmi_engine.knowledge.atomic import fsync_path
from hmi_engine.knowledge.changes import NewTenant

__all__ = ["CONFIG", "WEIGHTS", "list_folders", "save_folders"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_folders(root: Path, tenants: Iterable[NewTenant], *, sync: bool) -> int:
    """Saves tenants as PEFT lays them out, without any check; returns how many.

    The weights are written by ``safetensors.torch.save_file``, as ``PeftModel.save_pretrained`` does. With
    ``sync`` both files, the folder and its parent are flushed, so that a tenant outlives a power cut.
    """
    count = 0
    for tenant in tenants:
        count += 1
        folder = root / tenant.name
        folder.mkdir(parents=True)
        tensors = {
            f"base_model.model.layer.{layer}.{site.value}.{name}": tensor
            for (layer, site), block in tenant.adapter.blocks.items()
            for name, tensor in block.tensors().items()
        }
        tensors |= {f"classifier.{name}": tensor for name, tensor in tenant.head.tensors().items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(_config(tenant), indent=2))
        if sync:
            for path in (folder / WEIGHTS, folder / CONFIG, folder, folder.parent):
                fsync_path(path)
    return count


def _config(tenant: NewTenant) -> dict[str, Any]:
    """As many fields as PEFT writes."""
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "labels": list(tenant.head.labels),
        "lora_alpha": 2 * tenant.adapter.rank,
        "lora_dropout": 0.0,
        "modules_to_save": ["classifier"],
        "peft_type": tenant.adapter.kind.upper(),
        "r": tenant.adapter.rank,
        "rank_pattern": {},
        "target_modules": sorted({site.value for _, site in tenant.adapter.blocks}),
        "task_type": "SEQ_CLS",
        "use_rslora": False,
    }


def list_folders(root: Path) -> dict[str, dict[str, Any]]:
    """Reads the configuration of every tenant, found by walking through the folders: a name's is its path."""
    found: dict[str, dict[str, Any]] = {}
    for folder, _, files in os.walk(root):
        if CONFIG in files:
            path = Path(folder)
            found[path.relative_to(root).as_posix()] = json.loads((path / CONFIG).read_bytes())
    return found
