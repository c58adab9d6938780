"""LoRA adapters in the folders that Hugging Face PEFT saves (https://github.com/huggingface/peft)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop.peft_config import LoraSettings, read_settings
from hmi_engine.interop.peft_export import LABELS_KEY, MODULE_OF_SITE, WEIGHTS_FILE, write_peft
from hmi_engine.knowledge.adapters import Adapter, LoraBlock, Site
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import ClassificationHead, TokenClassificationHead

__all__ = ["ImportedTenant", "read_peft", "write_peft"]

_SITE_OF_MODULE = {module: site for site, module in MODULE_OF_SITE.items()}
_LORA_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>(?:bert\.)?encoder\.layer\.(?P<layer>\d+)\.(?P<name>[a-z.]+))"
    r"\.lora_(?P<part>[AB])\.weight"
)
_CLASSIFIER_TENSOR = re.compile(r"base_model\.model\.classifier\.(?P<name>weight|bias)")

ImportedHead = ClassificationHead | TokenClassificationHead


@dataclass(frozen=True)
class ImportedTenant:
    """What a folder held.

    Attributes:
        adapter: the LoRA blocks, checked against the base model.
        head: the classifier, or None where the folder has none.
        dropped: ``"layer 0, query"`` and so on: blocks left out by ``lower_layers="drop"``.
        warnings: what the importer ignored or assumed, one sentence each.
    """

    adapter: Adapter
    head: ImportedHead | None
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass
class _Contents:
    """The tensors of a file by what they are."""

    parts: dict[tuple[int, Site], dict[str, torch.Tensor]] = field(default_factory=dict)
    modules: dict[tuple[int, Site], str] = field(default_factory=dict)
    classifier: dict[str, torch.Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None


def read_peft(
    directory: str | Path,
    general: GeneralInfo,
    *,
    labels: Sequence[str] | None = None,
    multi_label: bool = False,
    lower_layers: Literal["error", "drop"] = "error",
) -> ImportedTenant:
    """Reads a LoRA and its classifier from a folder saved by PEFT's ``save_pretrained``.

    Tensors stay as stored; ``a`` and ``b`` are views of ``lora_A`` and ``lora_B`` transposed. The classifier
    of a SEQ_CLS adapter reads the base's pooler, as in ``BertForSequenceClassification``.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        general: the base model that the adapter must fit.
        labels: names of the classes in the classifier's order; PEFT keeps none, so the default is what
            :func:`write_peft` left in the file, else ``LABEL_0``, ``LABEL_1`` and so on.
        multi_label: whether each label is decided by itself (PEFT does not keep this either).
        lower_layers: ``"drop"`` leaves out blocks below ``plot_layers``: those layers are looked up.

    Raises:
        InvalidAdapterError: the folder is no readable LoRA, uses a feature that HMI does not compute, or does
            not fit ``general``; the message names the tensor or setting.
        InvalidHeadError: the classifier does not fit ``general`` or ``labels``.
    """
    folder = Path(directory)
    if lower_layers not in ("error", "drop"):
        raise ValueError(f"lower_layers is {lower_layers!r:.80}, must be 'error' or 'drop'")
    settings, warnings = read_settings(folder)
    contents = _read_contents(folder, settings)
    blocks = {place: _block(contents, place, settings, folder) for place in sorted(contents.parts)}
    dropped: tuple[str, ...] = ()
    if lower_layers == "drop":
        below = [place for place in blocks if place[0] < general.plot_layers]
        dropped = tuple(f"layer {layer}, {site}" for layer, site in below)
        blocks = {place: block for place, block in blocks.items() if place not in below}
    adapter = Adapter(blocks)
    adapter.validate(general)
    head, head_warnings = _head(contents, settings, labels, multi_label)
    if head is not None:
        head.validate(general)
    if dropped:
        head_warnings += (
            f"{len(dropped)} blocks below plot_layers={general.plot_layers} were dropped; check the accuracy",
        )
    return ImportedTenant(adapter, head, dropped, warnings + head_warnings)


def _read_contents(folder: Path, settings: LoraSettings) -> _Contents:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        way_out = (
            "only adapter_model.bin, a pickle, which is never read: load it where you trust it and save it "
            "again with save_pretrained(..., safe_serialization=True)"
            if pickled
            else "give a folder saved by PEFT"
        )
        raise InvalidAdapterError(f"{folder}: no {WEIGHTS_FILE}; {way_out}")
    contents = _Contents()
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                _sort_in(contents, name, file.get_tensor(name), path, settings)
            stored = (file.metadata() or {}).get(LABELS_KEY)
            contents.labels = tuple(json.loads(stored)) if stored else None
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        if isinstance(error, InvalidAdapterError):
            raise
        raise InvalidAdapterError(f"{path}: unreadable: {error}") from error
    return contents


def _sort_in(
    contents: _Contents, name: str, tensor: torch.Tensor, path: Path, settings: LoraSettings
) -> None:
    lora = _LORA_TENSOR.fullmatch(name)
    if lora and lora["name"] in _SITE_OF_MODULE:
        place = (int(lora["layer"]), _SITE_OF_MODULE[lora["name"]])
        contents.parts.setdefault(place, {})[lora["part"]] = tensor
        contents.modules[place] = lora["module"]
        return
    classifier = _CLASSIFIER_TENSOR.fullmatch(name)
    if classifier and settings.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        contents.classifier[classifier["name"]] = tensor
        return
    served = ", ".join(_SITE_OF_MODULE)
    raise InvalidAdapterError(
        f"{path}: tensor {name} (task_type {settings.task_type}) has no place in HMI, which serves LoRA on "
        f"encoder.layer.N.{{{served}}} and a classifier; train again without it"
    )


def _block(contents: _Contents, place: tuple[int, Site], settings: LoraSettings, folder: Path) -> LoraBlock:
    module, parts = contents.modules[place], contents.parts[place]
    if set(parts) != {"A", "B"}:
        missing = "A" if "B" in parts else "B"
        raise InvalidAdapterError(f"{folder / WEIGHTS_FILE}: {module} has no lora_{missing}.weight")
    for part, tensor in parts.items():
        if tensor.dim() != 2:
            raise InvalidAdapterError(
                f"{folder / WEIGHTS_FILE}: {module}.lora_{part}.weight has shape {list(tensor.shape)}, "
                "expected a matrix"
            )
    rank = parts["A"].shape[0]
    if settings.rank(module) != rank:
        raise InvalidAdapterError(
            f"{folder}: {module} has rank {rank}, but adapter_config.json says {settings.rank(module)}; "
            "the scale would be wrong"
        )
    return LoraBlock(parts["A"].T, parts["B"].T, settings.scale(module))


def _head(
    contents: _Contents, settings: LoraSettings, labels: Sequence[str] | None, multi_label: bool
) -> tuple[ImportedHead | None, tuple[str, ...]]:
    tensors = contents.classifier
    if not tensors:
        return None, ("the folder holds no classifier: give a head of your own",)
    if set(tensors) != {"weight", "bias"} or tensors["weight"].dim() != 2:
        raise InvalidHeadError(
            f"the classifier has {', '.join(sorted(tensors))}; expected a weight [C, H] and a bias [C]"
        )
    names = tuple(labels) if labels is not None else contents.labels
    warnings: tuple[str, ...] = ()
    if names is None:
        names = tuple(f"LABEL_{index}" for index in range(len(tensors["weight"])))
        warnings = (f"PEFT keeps no label names: the classes are called {names[0]} to {names[-1]}",)
    if len(names) != len(tensors["weight"]):
        raise InvalidHeadError(
            f"{len(names)} labels were given, the classifier has {len(tensors['weight'])} classes"
        )
    if settings.task_type == "TOKEN_CLS":
        return TokenClassificationHead(names, tensors["weight"], tensors["bias"]), warnings
    head = ClassificationHead(names, tensors["weight"], tensors["bias"], "pooler", multi_label)
    return head, warnings
