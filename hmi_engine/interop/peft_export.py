"""Writes LoRA adapters as folders that PEFT loads."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop.peft_config import CONFIG_FILE
from hmi_engine.knowledge.adapters import Adapter, LoraBlock, Site
from hmi_engine.knowledge.atomic import atomic_write
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import ClassificationHead, EmbeddingHead, Head

__all__ = ["LABELS_KEY", "MODULE_OF_SITE", "WEIGHTS_FILE", "write_peft"]

WEIGHTS_FILE = "adapter_model.safetensors"
LABELS_KEY = "labels"
"""Names the header entry with the labels (a JSON list), for which PEFT has no place and which it ignores."""

MODULE_OF_SITE = {
    Site.QUERY: "attention.self.query",
    Site.KEY: "attention.self.key",
    Site.VALUE: "attention.self.value",
    Site.ATTENTION_OUTPUT: "attention.output.dense",
    Site.FFN_UP: "intermediate.dense",
    Site.FFN_DOWN: "output.dense",
}


def write_peft(
    directory: str | Path,
    adapter: Adapter,
    head: Head | None,
    general: GeneralInfo,
    *,
    base_model: str,
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` (float32), each atomically.

    ``PeftModel.from_pretrained`` loads the folder onto ``BertForSequenceClassification``,
    ``BertForTokenClassification``, or, without head, ``BertModel``.

    Args:
        directory: made if missing; files of these names are replaced.
        adapter: LoRA blocks only; mixed ranks and scales become PEFT's patterns.
        head: a token classification head, a classification head that reads the pooler, or None.
        general: the base model, against which both are checked.
        base_model: what PEFT shall record as ``base_model_name_or_path``.

    Raises:
        InvalidAdapterError: no block at all, or a block that is not a LoRA.
        InvalidHeadError: a head that transformers' BERT classes cannot express.
        StoreError: a file cannot be written.
    """
    adapter.validate(general)
    if adapter.kind != "lora":
        raise InvalidAdapterError(
            f"a PEFT folder holds LoRA blocks only, this adapter is of kind {adapter.kind!r}; "
            "train it with kind='lora'"
        )
    task_type = _task_type(head)
    if head is not None:
        head.validate(general)
    blocks = {
        f"encoder.layer.{layer}.{MODULE_OF_SITE[site]}": block
        for (layer, site), block in adapter.ordered_blocks()
        if isinstance(block, LoraBlock)
    }
    tensors = _tensors(blocks, head, prefix="base_model.model." + ("" if head is None else "bert."))
    metadata = {"format": "pt"}
    if head is not None:
        metadata[LABELS_KEY] = json.dumps(head.labels)
    config = json.dumps(_config(blocks, task_type, base_model), indent=2, sort_keys=True)
    folder = Path(directory)
    atomic_write(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata))
    atomic_write(folder / CONFIG_FILE, lambda path: _write_text(path, config))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _task_type(head: Head | None) -> str:
    if head is None:
        return "FEATURE_EXTRACTION"
    if isinstance(head, EmbeddingHead):
        raise InvalidHeadError("an embedding head has no tensors for a PEFT folder: write with head=None")
    if isinstance(head, ClassificationHead):
        if head.pooling != "pooler":
            raise InvalidHeadError(
                f"the classification head reads {head.pooling!r}, BertForSequenceClassification always the "
                "pooler: write with head=None and keep the head yourself"
            )
        return "SEQ_CLS"
    return "TOKEN_CLS"


def _tensors(blocks: dict[str, LoraBlock], head: Head | None, prefix: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, block in blocks.items():
        tensors[f"{prefix}{module}.lora_A.weight"] = block.a.T
        tensors[f"{prefix}{module}.lora_B.weight"] = block.b.T
    for name, tensor in head.tensors().items() if head is not None else ():
        tensors[f"base_model.model.classifier.{name}"] = tensor
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}


def _config(blocks: dict[str, LoraBlock], task_type: str, base_model: str) -> dict[str, Any]:
    ranks = {module: block.rank for module, block in blocks.items()}
    alphas = {module: block.scale * block.rank for module, block in blocks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "modules_to_save": None if task_type == "FEATURE_EXTRACTION" else ["classifier", "score"],
        "target_modules": sorted(blocks),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
    }
