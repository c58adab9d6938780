"""Adapters of a GPT-2-architecture decoder in the folders that Hugging Face PEFT saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop.adapter_folder import TensorFile
from hmi_engine.interop.gpt2_modules import BIAS_SITES, LINEAR_SITES, parse_module
from hmi_engine.interop.imported_tenant import (
    BaseTensors,
    ImportedTenant,
    LowerLayers,
    ProblemType,
    base_tensor,
    finish_import,
    sequence_head,
)
from hmi_engine.interop.peft_blocks import lora_block, saved_like, scale_blocks
from hmi_engine.interop.peft_config import Ia3Settings, LoraSettings
from hmi_engine.interop.peft_decoder_contents import (
    FINAL_NORM_BIAS,
    TRANSFORMER,
    DecoderContents,
    sort_decoder_tensors,
)
from hmi_engine.interop.peft_metadata import PeftMetadata
from hmi_engine.knowledge.adapter_kinds.sites import linear_sizes
from hmi_engine.knowledge.adapters import BiasBlock, Block, LoraBlock, Site
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import GenerationHead, Head

__all__ = ["PeftFolder", "read_decoder"]

Blocks = dict[tuple[int, Site], Block]


@dataclass(frozen=True)
class PeftFolder:
    """A folder's files as they were read, and the base model that they must fit.

    Attributes:
        file: the tensors.
        settings: of ``adapter_config.json``.
        metadata: of the tensors' file.
        general: the base model.
        base: its weights, needed for trained biases and for copies of its embeddings.
        warnings: what was noticed so far.
    """

    file: TensorFile
    settings: LoraSettings | Ia3Settings
    metadata: PeftMetadata
    general: GeneralInfo
    base: BaseTensors | None
    warnings: tuple[str, ...] = ()


def read_decoder(
    folder: PeftFolder,
    head: Head | None,
    labels: Sequence[str] | None,
    problem_type: ProblemType | None,
    lower_layers: LowerLayers,
) -> ImportedTenant:
    """Reads a LoRA or IA3 and trained biases of ``GPT2LMHeadModel`` or ``GPT2ForSequenceClassification``.

    What stands at ``c_attn`` becomes blocks of query, key and value: a LoRA's ``B`` is cut into three, its
    ``A`` is shared. Without a ``head``, CAUSAL_LM has the base's language head; SEQ_CLS its ``score`` on the
    last token, into whose bias a trained ``ln_f.bias`` is folded.

    Raises:
        InvalidAdapterError: something that HMI does not compute, or that does not fit the base model.
        InvalidHeadError: the head does not fit the base model or ``labels``.
    """
    contents = sort_decoder_tensors(folder.file, folder.settings, folder.general)
    notes = list(folder.warnings)
    _check_shared(folder, contents, notes)
    blocks: Blocks = {}
    for module, parts in contents.parts.items():
        _add_module(blocks, folder, module, parts)
    shift = _add_biases(blocks, folder, contents)
    if head is None:
        head = _head(folder, contents, labels, problem_type, shift, notes)
    elif shift is not None:
        raise _final_norm_error(folder)
    return finish_import("peft", blocks, head, folder.general, lower_layers, warnings=notes)


def _check_shared(folder: PeftFolder, contents: DecoderContents, notes: list[str]) -> None:
    """Copies of the embeddings and the language head must be the base's own."""
    for name, base_name in contents.shared.items():
        original = base_tensor(folder.base, base_name, f"to look whether {name} was trained")
        saved = folder.file.take(name)
        if saved.shape != original.shape or not torch.equal(saved, original.to(saved.dtype)):
            raise InvalidAdapterError(
                f"{folder.file.path}: {name} {list(saved.shape)} is not the base model's {base_name} "
                f"{list(original.shape)}: it was trained or resized, but tenants share the embeddings and "
                "the language head; train again without it in modules_to_save"
            )
        notes.append(f"{name} equals the base model's {base_name} and was left out")


def _add_module(blocks: Blocks, folder: PeftFolder, module: str, parts: dict[str, str]) -> None:
    place = parse_module(module.removeprefix(TRANSFORMER))
    assert place is not None
    file, settings, sites = folder.file, folder.settings, LINEAR_SITES[place.rest]
    if isinstance(settings, Ia3Settings):
        scales = scale_blocks(file, parts, module, sites, settings, folder.general)
        blocks.update({(place.layer, site): block for site, block in scales.items()})
        return
    lora = lora_block(file, parts, module, settings)
    cut = _cut(folder, lora.b, sites, f"{module}.lora_B.weight")
    blocks.update(
        {(place.layer, site): LoraBlock(lora.a, b, lora.scale) for site, b in zip(sites, cut, strict=True)}
    )
    if "lora_B.bias" in parts:
        vector = file.take(parts["lora_B.bias"]).float() * lora.scale
        _add_bias(blocks, folder, place.layer, f"{place.rest}.bias", vector, f"{module}.lora_B.bias")


def _cut(
    folder: PeftFolder, tensor: torch.Tensor, sites: Sequence[Site], name: str
) -> tuple[torch.Tensor, ...]:
    """Cuts the last dimension [..., out] into what belongs to the linear layers of ``sites``."""
    widths = [linear_sizes(site.value.partition(".")[0], folder.general)[1] for site in sites]
    if tensor.shape[-1:] != (sum(widths),):
        raise InvalidAdapterError(
            f"{folder.file.path}: {name} is for {tensor.shape[-1] if tensor.dim() else 0} outputs, expected "
            f"{sum(widths)} ({', '.join(sites)})"
        )
    parts: tuple[torch.Tensor, ...] = tensor.split(widths, dim=-1)
    return parts


def _add_bias(
    blocks: Blocks, folder: PeftFolder, layer: int, rest: str, vector: torch.Tensor, name: str
) -> None:
    """Adds a vector [out] to the biases of one module, which may have one already."""
    sites = BIAS_SITES[rest]
    for site, part in zip(sites, _cut(folder, vector, sites, name), strict=True):
        before = blocks.get((layer, site))
        blocks[layer, site] = BiasBlock(before.vector + part if isinstance(before, BiasBlock) else part)


def _add_biases(blocks: Blocks, folder: PeftFolder, contents: DecoderContents) -> torch.Tensor | None:
    """Adds the biases that differ from the base's; returns by what the last LayerNorm's differs."""
    shift = None
    for name, tensor_name in contents.biases.items():
        place = parse_module(name)
        if place is not None and place.layer >= folder.general.num_layers:
            continue
        original = base_tensor(folder.base, name, "a trained bias")
        vector = saved_like(original, tensor_name, folder.file) - original
        if not bool(vector.ne(0).any()):
            continue
        if place is None:
            shift = vector
        else:
            _add_bias(blocks, folder, place.layer, place.rest, vector, tensor_name)
    return shift


def _final_norm_error(folder: PeftFolder) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"{folder.file.path}: {FINAL_NORM_BIAS} was trained (bias='all'), but tenants share the last "
        "LayerNorm: train with bias='lora_only'"
    )


def _head(
    folder: PeftFolder,
    contents: DecoderContents,
    labels: Sequence[str] | None,
    problem_type: ProblemType | None,
    shift: torch.Tensor | None,
    notes: list[str],
) -> Head | None:
    if contents.score is not None:
        weight = folder.file.take(contents.score)
        if weight.dim() != 2:
            raise InvalidHeadError(f"{contents.score} has shape {list(weight.shape)}, expected [C, H]")
        names = folder.metadata.class_names(labels, len(weight), notes)
        if shift is None or weight.shape[1] != len(shift):
            bias = torch.zeros(len(weight))
        else:
            bias = weight.float() @ shift
        problem_type = problem_type or folder.metadata.problem_type
        return sequence_head(names, weight, bias, pooling="last", problem_type=problem_type)
    if shift is not None:
        raise _final_norm_error(folder)
    if folder.settings.task_type == "CAUSAL_LM":
        if labels is not None:
            raise InvalidHeadError(f"{len(labels)} labels were given, but the language head has no classes")
        return GenerationHead()
    notes.append("the folder holds no score: give a head of your own")
    return None
