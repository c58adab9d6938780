"""Adapters in the folders that Hugging Face PEFT saves (https://github.com/huggingface/peft)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop.adapter_folder import TensorFile, read_tensors
from hmi_engine.interop.bert_modules import BIAS_SITES, SITE_OF_LINEAR, parse_module
from hmi_engine.interop.imported_tenant import (
    BaseTensors,
    ImportedTenant,
    LowerLayers,
    ProblemType,
    base_tensor,
    check_lower_layers,
    finish_import,
    sequence_head,
    with_trained_pooler,
)
from hmi_engine.interop.peft_blocks import lora_block, saved_like, scale_blocks
from hmi_engine.interop.peft_config import Ia3Settings, LoraSettings, read_settings
from hmi_engine.interop.peft_contents import EMBEDDINGS_BIAS, POOLER, PeftContents, sort_tensors
from hmi_engine.interop.peft_decoder import PeftFolder, read_decoder
from hmi_engine.interop.peft_metadata import PeftMetadata
from hmi_engine.knowledge.adapters import BiasBlock, Block, Site
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import DenseLayer, Head, TokenClassificationHead

__all__ = ["WEIGHTS_FILE", "read_peft"]

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"
_WAY_OUT = "load it where you trust it and save it again with save_pretrained(..., safe_serialization=True)"

Blocks = dict[tuple[int, Site], Block]


def read_peft(
    directory: str | Path,
    general: GeneralInfo,
    *,
    base: BaseTensors | None = None,
    head: Head | None = None,
    labels: Sequence[str] | None = None,
    problem_type: ProblemType | None = None,
    lower_layers: LowerLayers = "error",
) -> ImportedTenant:
    """Reads a LoRA or IA3, trained biases, and the classifier from a folder saved by ``save_pretrained``.

    Matrices of a LoRA stay as stored, transposed. A classifier of a SEQ_CLS adapter reads the pooler, as in
    ``BertForSequenceClassification``; a pooler that was trained too becomes a layer of the head. Trained
    biases (``bias``, ``lora_bias``) become BitFit blocks. For a decoder see
    :func:`~hmi_engine.interop.peft_decoder.read_decoder`.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        general: the base model that the adapter must fit.
        base: its weights, needed for trained biases and poolers.
        head: a head to use in place of the folder's.
        labels: names of the classes in the classifier's order; PEFT keeps none, so the default is what
            :func:`~hmi_engine.interop.write_peft` left in the file, else ``LABEL_0``, ``LABEL_1`` and so on.
        problem_type: what a SEQ_CLS head's numbers mean; PEFT keeps this as little. By default one number is
            regression, several are classes of which one holds.
        lower_layers: ``"drop"`` leaves out blocks below ``plot_layers``: those layers are looked up.

    Raises:
        InvalidAdapterError: the folder is not readable, uses a feature that HMI does not compute, or does
            not fit ``general``; the message names the file and the tensor or setting.
        InvalidHeadError: the classifier does not fit ``general`` or ``labels``.
    """
    folder = Path(directory)
    check_lower_layers(lower_layers)
    settings, warnings = read_settings(folder, general)
    file = read_tensors(folder / WEIGHTS_FILE, pickled_name=_PICKLED_FILE, way_out=_WAY_OUT)
    metadata = PeftMetadata.read(file)
    try:
        if general.is_causal:
            found = PeftFolder(file, settings, metadata, general, base, warnings)
            return read_decoder(found, head, labels, problem_type, lower_layers)
        contents = sort_tensors(file, settings, general)
        blocks = _blocks(file, contents, settings, general, metadata)
        dropped = _add_biases(blocks, file, contents, general, base, lower_layers)
        notes = list(warnings)
        if head is None:
            head = _classifier(file, contents, settings, labels, problem_type, metadata, notes)
        head = _with_pooler(head, file, contents, settings, base, notes)
        return finish_import("peft", blocks, head, general, lower_layers, dropped=dropped, warnings=notes)
    except InvalidAdapterError as error:
        raise _naming(error, folder) from error
    except InvalidHeadError as error:
        raise InvalidHeadError(f"{folder}: {error}") from error


def _naming(error: InvalidAdapterError, folder: Path) -> InvalidAdapterError:
    return error if str(error).startswith(str(folder)) else InvalidAdapterError(f"{folder}: {error}")


def _blocks(
    file: TensorFile,
    contents: PeftContents,
    settings: LoraSettings | Ia3Settings,
    general: GeneralInfo,
    metadata: PeftMetadata,
) -> Blocks:
    blocks: Blocks = {}
    for module, parts in contents.parts.items():
        place = parse_module(module.removeprefix("bert."))
        if place is None:
            continue  # the pooler
        site = SITE_OF_LINEAR[place.rest]
        if isinstance(settings, Ia3Settings):
            scales = scale_blocks(file, parts, module, [site], settings, general)
            blocks |= {(place.layer, scaled): block for scaled, block in scales.items()}
            continue
        lora = lora_block(file, parts, module, settings)
        if "lora_B.bias" in parts:
            vector = file.take(parts["lora_B.bias"]).float() * lora.scale
            blocks[place.layer, Site(f"{site}.bias")] = BiasBlock(vector)
        if module not in metadata.carriers or bool(lora.b.any()):
            blocks[place.layer, site] = lora
    return blocks


def _add_biases(
    blocks: Blocks,
    file: TensorFile,
    contents: PeftContents,
    general: GeneralInfo,
    base: BaseTensors | None,
    lower_layers: LowerLayers,
) -> list[str]:
    """Adds blocks for the biases that differ from the base's; returns what was left out."""
    dropped: list[str] = []
    for name, tensor_name in contents.biases.items():
        place = parse_module(name)
        if name == f"{POOLER}.bias" or (place is not None and place.layer >= general.num_layers):
            continue
        original = base_tensor(base, name, "a trained bias")
        vector = saved_like(original, tensor_name, file) - original
        if not bool(vector.ne(0).any()):
            continue
        if place is not None:
            before = blocks.get((place.layer, BIAS_SITES[place.rest]))  # of lora_bias=True
            if isinstance(before, BiasBlock):
                vector = vector + before.vector
            blocks[place.layer, BIAS_SITES[place.rest]] = BiasBlock(vector)
        elif lower_layers == "drop":
            dropped.append(name)
        else:
            raise InvalidAdapterError(
                f"{file.path}: {EMBEDDINGS_BIAS} was trained (bias='all'), but tenants share the embeddings: "
                "pass lower_layers='drop' to leave it out, or train with bias='lora_only'"
            )
    return dropped


def _classifier(
    file: TensorFile,
    contents: PeftContents,
    settings: LoraSettings | Ia3Settings,
    labels: Sequence[str] | None,
    problem_type: ProblemType | None,
    metadata: PeftMetadata,
    notes: list[str],
) -> Head | None:
    if not contents.classifier:
        notes.append("the folder holds no classifier: give a head of your own")
        return None
    tensors = {part: file.take(name) for part, name in contents.classifier.items()}
    if set(tensors) != {"weight", "bias"} or tensors["weight"].dim() != 2:
        found = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sorted(tensors.items()))
        raise InvalidHeadError(f"the classifier has {found}; expected a weight [C, H] and a bias [C]")
    weight, bias = tensors["weight"], tensors["bias"]
    names = metadata.class_names(labels, len(weight), notes)
    if settings.task_type == "TOKEN_CLS":
        return TokenClassificationHead(names, weight, bias)
    problem_type = problem_type or metadata.problem_type
    return sequence_head(names, weight, bias, pooling="pooler", problem_type=problem_type)


def _with_pooler(
    head: Head | None,
    file: TensorFile,
    contents: PeftContents,
    settings: LoraSettings | Ia3Settings,
    base: BaseTensors | None,
    notes: list[str],
) -> Head | None:
    pooler = _trained_pooler(file, contents, settings, base)
    if pooler is None:
        return head
    if head is None:
        raise InvalidAdapterError(
            f"{file.path}: the pooler was trained, but there is no head that reads it: give a head with "
            "pooling='pooler'"
        )
    if isinstance(head, TokenClassificationHead) or head.pooling != "pooler":
        notes.append("the folder's trained pooler was left out: the head does not read it")
    return with_trained_pooler(head, pooler)


def _trained_pooler(
    file: TensorFile,
    contents: PeftContents,
    settings: LoraSettings | Ia3Settings,
    base: BaseTensors | None,
) -> DenseLayer | None:
    """The pooler as one layer: trained whole, with a bias of its own, or with an adapter merged into it."""
    parts = contents.parts.get(f"bert.{POOLER}") or contents.parts.get(POOLER)
    saved_bias = contents.pooler.get("bias") or contents.biases.get(f"{POOLER}.bias")
    if not (parts or saved_bias or contents.pooler):
        return None
    weight, bias = (base_tensor(base, f"{POOLER}.{part}", "a trained pooler") for part in ("weight", "bias"))
    own_bias = saved_like(bias, saved_bias, file)
    if not parts and "weight" not in contents.pooler and torch.equal(own_bias, bias):
        return None
    weight, bias = saved_like(weight, contents.pooler.get("weight"), file), own_bias
    if parts:
        weight, bias = _merged(file, parts, settings, weight, bias)
    return DenseLayer(weight, bias, "tanh")


def _merged(
    file: TensorFile,
    parts: dict[str, str],
    settings: LoraSettings | Ia3Settings,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    size = len(bias)
    if isinstance(settings, Ia3Settings):
        is_input = settings.is_feedforward(f"bert.{POOLER}")
        scale = file.take(parts["ia3_l"]).float()
        if tuple(scale.shape) != ((1, size) if is_input else (size, 1)):
            raise InvalidAdapterError(f"{file.path}: {POOLER}.ia3_l has shape {list(scale.shape)}")
        return weight * scale, bias if is_input else bias * scale[:, 0]
    lora = lora_block(file, parts, f"bert.{POOLER}", settings)
    if lora.a.shape[0] != size or tuple(lora.b.shape) != (lora.rank, size):
        raise InvalidAdapterError(
            f"{file.path}: {POOLER} has lora_A {list(lora.a.T.shape)} and lora_B {list(lora.b.T.shape)}, "
            f"expected [{lora.rank}, {size}] and [{size}, {lora.rank}]"
        )
    if "lora_B.bias" in parts:
        bias = bias + lora.scale * saved_like(bias, parts["lora_B.bias"], file)
    return weight + lora.scale * (lora.a.float() @ lora.b.float()).T, bias
