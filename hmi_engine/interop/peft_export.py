"""Writes adapters as folders that PEFT loads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop.adapter_folder import CONFIG_FILE
from hmi_engine.interop.bert_modules import BIAS_SITES, LINEAR_SITES, layer_module
from hmi_engine.interop.export_folder import export_error, hold_export_folder
from hmi_engine.interop.imported_tenant import BaseTensors, ProblemType, base_tensor
from hmi_engine.interop.peft import WEIGHTS_FILE
from hmi_engine.interop.peft_contents import EMBEDDINGS_BIAS, POOLER
from hmi_engine.interop.peft_metadata import PeftMetadata
from hmi_engine.knowledge.adapters import Adapter, BiasBlock, LoraBlock, ScaleBlock, Site
from hmi_engine.knowledge.atomic import atomic_write
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import (
    ClassificationHead,
    DenseLayer,
    EmbeddingHead,
    GenerationHead,
    Head,
    RegressionHead,
    TokenClassificationHead,
)
from hmi_engine.knowledge.tensor_file import write_tensors

__all__ = ["write_peft"]

_PREFIX = "base_model.model."
_MODULE_OF_BIAS = {site: name for name, site in BIAS_SITES.items()}


@dataclass
class _Written:
    """What goes into a folder; modules are named without a prefix."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    carriers: frozenset[str] = frozenset()


def write_peft(
    directory: str | Path,
    adapter: Adapter,
    head: Head | None,
    general: GeneralInfo,
    *,
    base_model: str,
    base: BaseTensors | None = None,
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` (float32), each atomically.

    ``PeftModel.from_pretrained`` loads the folder onto ``BertForSequenceClassification``,
    ``BertForTokenClassification``, or, without head, ``BertModel``. Matrices and scales are written as they
    are; a bias as the base's bias plus the tenant's, rounded once.

    Args:
        directory: made if missing; files of these names are replaced.
        adapter: LoRA blocks and biases (PEFT's LORA), or scales (its IA3).
        head: a token classification head, a classification or regression head that reads the pooler or has
            one of its own, or None.
        general: the base model, against which both are checked.
        base_model: what PEFT shall record as ``base_model_name_or_path``.
        base: its weights, needed for biases.

    Raises:
        InvalidAdapterError: no block at all, or blocks that one PEFT folder cannot hold.
        InvalidHeadError: a head that transformers' BERT classes cannot express.
        StoreBusyError: another export writes into the folder.
        StoreError: a file cannot be written.
    """
    adapter.validate(general)
    if head is not None:
        head.validate(general)
    task_type, pooler = _task_type(head), _own_pooler(head)
    written = _written(adapter, general, base)
    prefix = _PREFIX + ("" if head is None else "bert.")
    tensors = {f"{prefix}{name}": tensor for name, tensor in written.tensors.items()}
    if head is not None:
        tensors |= {f"{_PREFIX}classifier.{part}": head.tensors()[part] for part in ("weight", "bias")}
    if pooler is not None:
        tensors |= {f"{prefix}{POOLER}.weight": pooler.weight, f"{prefix}{POOLER}.bias": pooler.bias}
    floats = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    config = written.config | {
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": _modules_to_save(head, pooler),
    }
    carriers = frozenset(("" if head is None else "bert.") + module for module in written.carriers)
    labels = None if head is None else head.labels
    metadata = PeftMetadata(labels, _problem_type(head), carriers).entries()
    folder, text = Path(directory), json.dumps(config, indent=2, sort_keys=True)
    with hold_export_folder(folder):
        write_tensors(folder / WEIGHTS_FILE, floats, metadata, explain=export_error)
        atomic_write(folder / CONFIG_FILE, lambda path: _write_text(path, text), explain=export_error)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _task_type(head: Head | None) -> str:
    if head is None:
        return "FEATURE_EXTRACTION"
    if isinstance(head, EmbeddingHead | GenerationHead):
        raise InvalidHeadError(f"the {head.kind} head has no place in a PEFT folder: write without the head")
    if isinstance(head, TokenClassificationHead):
        if head.hidden:
            raise InvalidHeadError(
                "the token classification head has hidden layers, BertForTokenClassification has none: write "
                "without the head, or in AdapterHub's format"
            )
        return "TOKEN_CLS"
    if (head.pooling != "pooler" or head.hidden) and _own_pooler(head) is None:
        raise InvalidHeadError(
            f"the {head.kind} head reads {head.pooling!r} through {len(head.hidden)} hidden layers, "
            "BertForSequenceClassification always the pooler: write without the head, or "
            "write in AdapterHub's format"
        )
    return "SEQ_CLS"


def _own_pooler(head: Head | None) -> DenseLayer | None:
    """A hidden layer that is what transformers' pooler is: tanh on the first token."""
    if not isinstance(head, ClassificationHead | RegressionHead) or head.pooling != "cls":
        return None
    return head.hidden[0] if len(head.hidden) == 1 and head.hidden[0].activation == "tanh" else None


def _modules_to_save(head: Head | None, pooler: DenseLayer | None) -> list[str] | None:
    if head is None:
        return None
    return ["classifier", "score"] if pooler is None else ["classifier", "score", "pooler"]


def _problem_type(head: Head | None) -> ProblemType | None:
    if isinstance(head, RegressionHead):
        return "regression"
    if isinstance(head, ClassificationHead):
        return "multi_label_classification" if head.multi_label else "single_label_classification"
    return None


def _written(adapter: Adapter, general: GeneralInfo, base: BaseTensors | None) -> _Written:
    kinds = {type(block) for block in adapter.blocks.values()}
    if kinds == {ScaleBlock}:
        return _ia3(adapter)
    if kinds and kinds <= {LoraBlock, BiasBlock}:
        return _lora(adapter, general, base)
    raise InvalidAdapterError(
        f"a PEFT folder holds LoRA blocks and biases, or scales (IA3), and nothing else; this adapter is of "
        f"kind {adapter.kind!r}: export it in AdapterHub's format, or train it with kind='lora'"
    )


def _lora(adapter: Adapter, general: GeneralInfo, base: BaseTensors | None) -> _Written:
    blocks = {
        layer_module(layer, LINEAR_SITES[site]): block
        for (layer, site), block in adapter.ordered_blocks()
        if isinstance(block, LoraBlock)
    }
    vectors = {
        layer_module(layer, _MODULE_OF_BIAS[site]): block.vector
        for (layer, site), block in adapter.ordered_blocks()
        if isinstance(block, BiasBlock)
    }
    carriers: frozenset[str] = frozenset()
    if not blocks:
        carrier = layer_module(adapter.layers[0], LINEAR_SITES[Site.QUERY])
        size = general.hidden_size
        blocks = {carrier: LoraBlock(torch.zeros(size, 1), torch.zeros(1, size), 1.0)}
        carriers = frozenset((carrier,))
    tensors: dict[str, torch.Tensor] = {}
    for module, block in blocks.items():
        tensors |= {f"{module}.lora_A.weight": block.a.T, f"{module}.lora_B.weight": block.b.T}
    if vectors:
        tensors |= _biases(vectors, blocks, general, base)
    return _Written(_lora_config(blocks, "all" if vectors else "none"), tensors, carriers)


def _biases(
    vectors: Mapping[str, torch.Tensor],
    blocks: Mapping[str, LoraBlock],
    general: GeneralInfo,
    base: BaseTensors | None,
) -> dict[str, torch.Tensor]:
    """All biases of the base model, as PEFT's ``bias="all"`` keeps them, with the tenant's added."""
    names = [layer_module(layer, rest) for layer in range(general.num_layers) for rest in BIAS_SITES]
    tensors = {}
    for name in [EMBEDDINGS_BIAS, *names]:
        bias = base_tensor(base, name, "a PEFT folder with biases")
        module = name.removesuffix(".bias")
        written = f"{module}.base_layer.bias" if module in blocks else name
        tensors[written] = bias + vectors[name].float() if name in vectors else bias
    return tensors


def _lora_config(blocks: Mapping[str, LoraBlock], bias: str) -> dict[str, Any]:
    ranks = {module: block.rank for module, block in blocks.items()}
    alphas = {module: block.scale * block.rank for module, block in blocks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "bias": bias,
        "lora_dropout": 0.0,
        "target_modules": sorted(blocks),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
    }


def _ia3(adapter: Adapter) -> _Written:
    tensors: dict[str, torch.Tensor] = {}
    feedforward = []
    for (layer, site), block in adapter.ordered_blocks():
        assert isinstance(block, ScaleBlock)
        linear, _, action = site.value.partition(".")
        module = layer_module(layer, LINEAR_SITES[Site(linear)])
        if f"{module}.ia3_l" in tensors:
            raise InvalidAdapterError(
                f"layer {layer}, {linear}: PEFT's IA3 scales a layer's input or its output, not both"
            )
        is_input = action == "input_scale"
        feedforward += [module] if is_input else []
        tensors[f"{module}.ia3_l"] = block.vector.reshape((1, -1) if is_input else (-1, 1))
    config = {
        "peft_type": "IA3",
        "target_modules": sorted(name.removesuffix(".ia3_l") for name in tensors),
        "feedforward_modules": sorted(feedforward),
    }
    return _Written(config, tensors)
