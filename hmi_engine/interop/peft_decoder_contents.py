"""Which tensor of a decoder's PEFT folder is what, and whether they are those that its settings say."""

from __future__ import annotations

from dataclasses import dataclass, field

from hmi_engine.errors import InvalidAdapterError
from hmi_engine.interop.adapter_folder import TensorFile
from hmi_engine.interop.gpt2_modules import BIAS_SITES, LINEAR_SITES, layer_module, parse_module
from hmi_engine.interop.peft_config import Ia3Settings, LoraSettings
from hmi_engine.interop.peft_contents import PREFIX, check_biases, check_modules, part_names
from hmi_engine.knowledge.general import GeneralInfo

__all__ = ["FINAL_NORM_BIAS", "TRANSFORMER", "DecoderContents", "sort_decoder_tensors"]

TRANSFORMER = "transformer."
"""What transformers puts before the names of ``GPT2Model`` in the models that have a head."""

FINAL_NORM_BIAS = "ln_f.bias"
_SCORE = "score.weight"
_BASE_OF_SHARED = {"wte.weight": "wte.weight", "wpe.weight": "wpe.weight", "lm_head.weight": "wte.weight"}
"""Weights that tenants share, and the base's own that each must equal; a GPT-2's language head is tied."""


@dataclass
class DecoderContents:
    """Names of tensors in the file, by what they are.

    Attributes:
        parts: of each adapted module (``transformer.h.0.attn.c_attn``), by part such as ``lora_A.weight``.
        biases: trained biases of the base, by the base's own names without ``transformer.``.
        shared: copies of weights that tenants share, with the base's name of each.
        score: the weight of a sequence classifier.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    score: str | None = None


def sort_decoder_tensors(
    file: TensorFile, settings: LoraSettings | Ia3Settings, general: GeneralInfo
) -> DecoderContents:
    """Sorts the names of a file's tensors.

    Raises:
        InvalidAdapterError: a tensor has no place in HMI, or one is missing or too many by the settings.
    """
    contents = DecoderContents()
    for name in sorted(file.names):
        if not _place(contents, name, settings):
            raise InvalidAdapterError(_no_place(file, name, settings))
    layers = range(general.num_layers)
    prefix = TRANSFORMER if any(module.startswith(TRANSFORMER) for module in contents.parts) else ""
    linears = {prefix + layer_module(layer, rest) for layer in layers for rest in LINEAR_SITES}
    within = {module: parts for module, parts in contents.parts.items() if _layer(module) in layers}
    check_modules(file, within, settings, linears)
    every = {layer_module(layer, rest) for layer in layers for rest in BIAS_SITES} | {FINAL_NORM_BIAS}
    adapted = {f"{module.removeprefix(TRANSFORMER)}.bias" for module in contents.parts}
    check_biases(file, contents.biases, settings, every=every, adapted=adapted)
    return contents


def _layer(module: str) -> int:
    place = parse_module(module.removeprefix(TRANSFORMER))
    assert place is not None
    return place.layer


def _place(contents: DecoderContents, name: str, settings: LoraSettings | Ia3Settings) -> bool:
    bare = name.removeprefix(PREFIX)
    short = bare.removeprefix(TRANSFORMER)
    for part in part_names(settings):
        place = parse_module(short.removesuffix(f".{part}"))
        if short.endswith(f".{part}") and place is not None and place.rest in LINEAR_SITES:
            contents.parts.setdefault(bare.removesuffix(f".{part}"), {})[part] = name
            return True
    if short == _SCORE and settings.task_type == "SEQ_CLS":
        contents.score = name
        return True
    if short in _BASE_OF_SHARED:
        contents.shared[name] = _BASE_OF_SHARED[short]
        return True
    if isinstance(settings, LoraSettings) and settings.bias != "none" and short.endswith(".bias"):
        plain = short.removesuffix(".base_layer.bias") + ".bias" if ".base_layer." in short else short
        place = parse_module(plain)
        if plain == FINAL_NORM_BIAS or (place is not None and place.rest in BIAS_SITES):
            contents.biases[plain] = name
            return True
    return False


def _no_place(file: TensorFile, name: str, settings: LoraSettings | Ia3Settings) -> str:
    return (
        f"{file.path}: tensor {name:.200} (peft_type {settings.peft_type}, task_type "
        f"{settings.task_type!r:.80}) has no place in HMI, which serves {settings.peft_type} on "
        f"h.N.{{{', '.join(LINEAR_SITES)}}} of a GPT-2 (CAUSAL_LM, SEQ_CLS) and a score; train again "
        "without it"
    )
