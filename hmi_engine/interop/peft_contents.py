"""Which tensor of a PEFT folder is what, by its name, and whether they are those that its settings say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field

from hmi_engine.errors import InvalidAdapterError
from hmi_engine.interop.adapter_folder import TensorFile
from hmi_engine.interop.bert_modules import BIAS_SITES, SITE_OF_LINEAR, layer_module, parse_module
from hmi_engine.interop.peft_config import Ia3Settings, LoraSettings
from hmi_engine.knowledge.general import GeneralInfo

__all__ = [
    "EMBEDDINGS_BIAS",
    "POOLER",
    "PREFIX",
    "PeftContents",
    "check_biases",
    "check_modules",
    "part_names",
    "sort_tensors",
]

POOLER = "pooler.dense"
EMBEDDINGS_BIAS = "embeddings.LayerNorm.bias"

PREFIX = "base_model.model."
_CLASSIFIER = {"classifier.weight": "weight", "classifier.bias": "bias"}
_COPIES_OF_CLASSIFIER = ("classifier.original_module.bias", "classifier.modules_to_save.bias")
"""Written by PEFT beside ``classifier.bias`` where ``bias`` is ``"all"``."""


@dataclass
class PeftContents:
    """Names of tensors in the file, by what they are.

    Attributes:
        parts: of each adapted module (``bert.encoder.layer.0.attention.self.query``), by part such as
            ``lora_A.weight``.
        biases: trained biases of the base, by the base's own names without ``bert.``.
        pooler: a pooler that was trained whole: ``weight`` and ``bias``.
        classifier: ``weight`` and ``bias``.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    pooler: dict[str, str] = field(default_factory=dict)
    classifier: dict[str, str] = field(default_factory=dict)


def sort_tensors(
    file: TensorFile, settings: LoraSettings | Ia3Settings, general: GeneralInfo
) -> PeftContents:
    """Sorts the names of a file's tensors.

    Raises:
        InvalidAdapterError: a tensor has no place in HMI, or one is missing or too many by the settings.
    """
    contents = PeftContents()
    for name in sorted(file.names):
        if not _place(contents, name, settings):
            raise InvalidAdapterError(_no_place(file, name, settings))
    _check_modules(file, contents, settings, general)
    _check_biases(file, contents, settings, general)
    return contents


def _place(contents: PeftContents, name: str, settings: LoraSettings | Ia3Settings) -> bool:
    bare = name.removeprefix(PREFIX)
    short = bare.removeprefix("bert.")
    for part in part_names(settings):
        module = short.removesuffix(f".{part}")
        if module != short and (_is_linear(module) or module == POOLER):
            contents.parts.setdefault(bare.removesuffix(f".{part}"), {})[part] = name
            return True
    if short in _CLASSIFIER and settings.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        contents.classifier[_CLASSIFIER[short]] = name
        return True
    if isinstance(settings, LoraSettings) and settings.bias != "none" and short.endswith(".bias"):
        plain = short.removesuffix(".base_layer.bias") + ".bias" if ".base_layer." in short else short
        if plain in (EMBEDDINGS_BIAS, f"{POOLER}.bias") or _is_bias(plain):
            contents.biases[plain] = name
            return True
        return short in _COPIES_OF_CLASSIFIER
    if short in (f"{POOLER}.weight", f"{POOLER}.bias"):
        contents.pooler[short.rpartition(".")[2]] = name
        return True
    return False


def part_names(settings: LoraSettings | Ia3Settings) -> tuple[str, ...]:
    """What PEFT keeps of an adapted module, by the ends of the tensors' names."""
    if isinstance(settings, Ia3Settings):
        return ("ia3_l",)
    parts = ("lora_A.weight", "lora_B.weight")
    return (*parts, "lora_B.bias") if settings.lora_bias else parts


def _is_linear(module: str) -> bool:
    place = parse_module(module)
    return place is not None and place.rest in SITE_OF_LINEAR


def _is_bias(name: str) -> bool:
    place = parse_module(name)
    return place is not None and place.rest in BIAS_SITES


def _no_place(file: TensorFile, name: str, settings: LoraSettings | Ia3Settings) -> str:
    served = ", ".join(SITE_OF_LINEAR)
    return (
        f"{file.path}: tensor {name:.200} (peft_type {settings.peft_type}, task_type "
        f"{settings.task_type!r:.80}) has no place in HMI, which serves {settings.peft_type} on "
        f"encoder.layer.N.{{{served}}}, a pooler and a classifier; train again without it"
    )


def _check_modules(
    file: TensorFile, contents: PeftContents, settings: LoraSettings | Ia3Settings, general: GeneralInfo
) -> None:
    prefix = "bert." if any(module.startswith("bert.") for module in contents.parts) else ""
    encoder = {
        prefix + layer_module(layer, rest) for layer in range(general.num_layers) for rest in SITE_OF_LINEAR
    }
    places = {module: parse_module(module.removeprefix("bert.")) for module in contents.parts}
    within = {
        module: contents.parts[module]
        for module, place in places.items()
        if place is None or place.layer < general.num_layers
    }  # a layer beyond has an error of its own, which says how many layers there are
    check_modules(file, within, settings, encoder)


def check_modules(
    file: TensorFile,
    found: Mapping[str, Mapping[str, str]],
    settings: LoraSettings | Ia3Settings,
    linears: Collection[str],
) -> None:
    """What the settings name has its tensors; what has tensors is named, or PEFT would leave it out.

    Args:
        file: where they are.
        found: the parts of each adapted module.
        settings: what ``adapter_config.json`` says.
        linears: the modules of the base that PEFT adapts where the settings name them.

    Raises:
        InvalidAdapterError: neither.
    """
    for module in sorted({*linears, *found}):
        parts = found.get(module, {})
        if settings.targets(module) and module in linears:
            missing = [part for part in part_names(settings) if part not in parts]
        else:
            missing = [part for part in part_names(settings) if parts and part not in parts]
        if missing:
            raise InvalidAdapterError(
                f"{file.path}: {module} has no {missing[0]}, which adapter_config.json asks for; the file is "
                "not complete"
            )
        if parts and not settings.targets(module):
            raise InvalidAdapterError(
                f"{file.path}: {module} has a {', '.join(parts)}, but target_modules of adapter_config.json "
                "does not name it: PEFT would leave it out"
            )


def _check_biases(
    file: TensorFile, contents: PeftContents, settings: LoraSettings | Ia3Settings, general: GeneralInfo
) -> None:
    every = {layer_module(n, rest) for n in range(general.num_layers) for rest in BIAS_SITES}
    adapted = {f"{module.removeprefix('bert.')}.bias" for module in contents.parts}
    check_biases(file, contents.biases, settings, every=every, adapted=adapted)


def check_biases(
    file: TensorFile,
    found: Collection[str],
    settings: LoraSettings | Ia3Settings,
    *,
    every: Set[str],
    adapted: Set[str],
) -> None:
    """The trained biases are there: ``every`` one with ``bias="all"``, or those of ``adapted`` modules.

    Raises:
        InvalidAdapterError: one is missing.
    """
    if not isinstance(settings, LoraSettings) or settings.bias == "none":
        return
    missing = sorted((every if settings.bias == "all" else adapted) - set(found))
    if missing:
        raise InvalidAdapterError(
            f"{file.path}: bias is {settings.bias!r}, but {missing[0]} is not in the file (old versions of "
            "PEFT did not save all of them): save it with a newer PEFT, or train with bias='none'"
        )
