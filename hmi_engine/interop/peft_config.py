"""The settings in PEFT's ``adapter_config.json`` that decide what an adapter computes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hmi_engine.errors import InvalidAdapterError
from hmi_engine.interop import bert_modules, gpt2_modules
from hmi_engine.interop.adapter_folder import CONFIG_FILE, read_object
from hmi_engine.interop.module_patterns import compile_pattern, compile_patterns, matches_end, matches_whole
from hmi_engine.knowledge.adapters import MAX_RANK
from hmi_engine.knowledge.general import GeneralInfo

__all__ = ["Ia3Settings", "LoraSettings", "PeftSettings", "read_settings"]

MAX_ENTRIES = 1000
"""Of a list or table of modules: models have some 300 linear layers at most, and each asks all entries."""

Number = TypeVar("Number", int, float)
Modules = list[str] | str | None
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]

_CHANGES_THE_MATHEMATICS = {
    "use_dora": "DoRA (use_dora)",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "kasa_config": "KaSA (kasa_config)",
    "arrow_config": "Arrow routing (arrow_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "replicated layers (layer_replication)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
}
_NEUTRAL_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_NEUTRAL_FIELDS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "inference_mode",
        "init_ia3_weights", "init_lora_weights", "layers_pattern", "loftq_config", "lora_dropout",
        "lora_ga_config", "corda_config", "megatron_config", "megatron_core", "modules_to_save",
        "peft_version", "qalora_group_size", "revision", "runtime_config", "velora_config", "fan_in_fan_out",
    }
)  # fmt: skip

_ADDS_TOKENS = "it puts trained vectors in front of the text, which HMI's shared layers do not take"
_OTHER_METHODS = {
    "PREFIX_TUNING": ("prefix tuning", _ADDS_TOKENS),
    "PROMPT_TUNING": ("prompt tuning", _ADDS_TOKENS),
    "P_TUNING": ("p-tuning", _ADDS_TOKENS),
    "MULTITASK_PROMPT_TUNING": ("multitask prompt tuning", _ADDS_TOKENS),
    "CPT": ("context-aware prompt tuning", _ADDS_TOKENS),
    "ADAPTION_PROMPT": ("Llama-Adapter", _ADDS_TOKENS),
    "ADALORA": ("AdaLoRA", "its update has singular values of its own"),
    "VERA": ("VeRA", "its update shares random matrices over all layers"),
    "LOHA": ("LoHa", "its update is a Hadamard product of the size of the layer"),
    "LOKR": ("LoKr", "its update is a Kronecker product of the size of the layer"),
    "OFT": ("OFT", "it rotates the base's weights"),
    "BOFT": ("BOFT", "it rotates the base's weights"),
    "LN_TUNING": ("LayerNorm tuning", "it changes the weights of the base's LayerNorms"),
    "TRAINABLE_TOKENS": ("trained token embeddings", "HMI shares the embeddings"),
}

_ALL_LINEAR = "all-linear"
_TASK_OF_CLASS = {
    "BertForSequenceClassification": "SEQ_CLS",
    "BertForTokenClassification": "TOKEN_CLS",
    "BertModel": "FEATURE_EXTRACTION",
    "GPT2LMHeadModel": "CAUSAL_LM",
    "GPT2ForSequenceClassification": "SEQ_CLS",
    "GPT2Model": "FEATURE_EXTRACTION",
}


class PeftSettings(BaseModel):
    """The fields that all kinds have.

    Modules are named as in the model, with or without ``bert.`` or ``transformer.``. Those of a BERT and of a
    GPT-2 have no name in common, so what PEFT does by default needs not to know which of both it is.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    default_modules: ClassVar[tuple[str, ...]]
    """What PEFT adapts in a BERT or a GPT-2 where ``target_modules`` is null."""

    peft_type: str
    task_type: str | None = None
    target_modules: Modules = None
    exclude_modules: Modules = None
    layers_to_transform: list[int] | int | None = None

    def check_patterns(self) -> None:
        """Raises :class:`InvalidAdapterError` where a pattern could run for too long."""
        for modules in self.module_fields():
            if isinstance(modules, str) and modules.lower() != _ALL_LINEAR:
                compile_pattern(modules)

    def module_fields(self) -> tuple[Modules, ...]:
        """The fields that are a list of modules, or one pattern."""
        return self.target_modules, self.exclude_modules

    def targets(self, module: str) -> bool:
        """Whether PEFT adapts a linear layer of the encoder or decoder."""
        modules = self.target_modules if self.target_modules is not None else list(self.default_modules)
        if self.exclude_modules and _is_listed(self.exclude_modules, module):
            return False
        if isinstance(modules, str):
            return modules.lower() == _ALL_LINEAR or matches_whole(modules, module)
        return module in modules or (_is_listed(modules, module) and self._is_of_layers(module))

    def _is_of_layers(self, module: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        place = bert_modules.parse_module(module.removeprefix("bert.")) or gpt2_modules.parse_module(
            module.removeprefix("transformer.")
        )
        return place is not None and place.layer in ([layers] if isinstance(layers, int) else layers)


class LoraSettings(PeftSettings):
    """The fields of PEFT's ``LoraConfig`` that HMI reads; patterns are regular expressions."""

    default_modules = ("query", "value", "c_attn")

    r: Rank = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, float] = {}
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False

    @cached_property
    def compiled_ranks(self) -> list[tuple[re.Pattern[str], int]]:
        """``rank_pattern``, compiled once."""
        return _compiled(self.rank_pattern)

    @cached_property
    def compiled_alphas(self) -> list[tuple[re.Pattern[str], float]]:
        """``alpha_pattern``, compiled once."""
        return _compiled(self.alpha_pattern)

    def check_patterns(self) -> None:
        """Raises :class:`InvalidAdapterError` where a pattern, or all of a field, could run for too long."""
        super().check_patterns()
        _ = self.compiled_ranks, self.compiled_alphas

    def rank(self, module: str) -> int:
        """Rank of a module, named as in the model (``bert.encoder.layer.0.attention.self.query``)."""
        return _first_match(self.compiled_ranks, module, self.r)

    def scale(self, module: str) -> float:
        """Factor of a module's update: ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.

        The latter is the rank-stabilized LoRA of Kalajdzievski (2023).
        """
        alpha = _first_match(self.compiled_alphas, module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


class Ia3Settings(PeftSettings):
    """The fields of PEFT's ``IA3Config`` that HMI reads."""

    default_modules = ("key", "value", "output.dense", "c_attn", "mlp.c_proj")

    feedforward_modules: Modules = None

    def module_fields(self) -> tuple[Modules, ...]:
        """The fields that are a list of modules, or one pattern."""
        return *super().module_fields(), self.feedforward_modules

    def is_feedforward(self, module: str) -> bool:
        """Whether the scale stands before the layer: PEFT's rule, which compares ends of names."""
        modules = self.feedforward_modules
        if modules is None:
            modules = ["output.dense", "mlp.c_proj"] if self.target_modules is None else []
        if isinstance(modules, str):
            return matches_whole(modules, module)
        return any(module.endswith(name) for name in modules)


def _is_listed(modules: list[str] | str, module: str) -> bool:
    if isinstance(modules, str):
        return matches_whole(modules, module)
    return any(module == name or module.endswith(f".{name}") for name in modules)


def _compiled(numbers: Mapping[str, Number]) -> list[tuple[re.Pattern[str], Number]]:
    return list(zip(compile_patterns(numbers), numbers.values(), strict=True))


def _first_match(patterns: list[tuple[re.Pattern[str], Number]], module: str, default: Number) -> Number:
    return next((value for pattern, value in patterns if matches_end(pattern, module)), default)


def read_settings(
    directory: Path, general: GeneralInfo
) -> tuple[LoraSettings | Ia3Settings, tuple[str, ...]]:
    """Reads ``adapter_config.json`` and refuses what HMI would compute differently from PEFT.

    ``fan_in_fan_out`` is never needed: PEFT itself goes by the layers' class, and keeps the matrices of an
    adapter in the same way whatever it says.

    Returns:
        The settings, and warnings about fields that this version does not know.

    Raises:
        InvalidAdapterError: the file is missing or unreadable, or says something that HMI does not compute.
    """
    path = directory / CONFIG_FILE
    fields = read_object(path)
    kind = _check_method(path, fields)
    _check_features(path, fields)
    settings = _settings(path, kind, fields)
    return settings, _warnings(path, fields, kind, general)


def _check_method(path: Path, fields: Mapping[str, Any]) -> type[LoraSettings] | type[Ia3Settings]:
    kinds: dict[str, type[LoraSettings] | type[Ia3Settings]] = {"LORA": LoraSettings, "IA3": Ia3Settings}
    if "peft_type" not in fields and "config" in fields:
        raise InvalidAdapterError(f"{path}: AdapterHub's adapters library wrote it: use import_adapterhub")
    method = fields.get("peft_type")
    if isinstance(method, str) and method in kinds:
        return kinds[method]
    way_out = "train with PEFT's LORA or IA3, or import a bottleneck adapter from AdapterHub"
    if isinstance(method, str) and method in _OTHER_METHODS:
        name, reason = _OTHER_METHODS[method]
        raise InvalidAdapterError(
            f"{path}: {name} (peft_type {method}) is not supported: {reason}; {way_out}"
        )
    raise InvalidAdapterError(f"{path}: peft_type is {method!r:.80}, which HMI does not compute; {way_out}")


def _check_features(path: Path, fields: Mapping[str, Any]) -> None:
    for field, feature in _CHANGES_THE_MATHEMATICS.items():
        if fields.get(field):
            raise InvalidAdapterError(
                f"{path}: {feature} is not supported; train with a plain LoRA, or merge and retrain"
            )
    initialization = fields.get("init_lora_weights", True)
    if isinstance(initialization, str | bool | None) and initialization in _NEUTRAL_INITIALIZATIONS:
        return
    raise InvalidAdapterError(
        f"{path}: init_lora_weights is {initialization!r:.80}, which changes the base model's weights; "
        "save with path_initial_model_for_weight_conversion to get a LoRA of the unchanged base"
    )


def _settings(
    path: Path, kind: type[LoraSettings] | type[Ia3Settings], fields: Mapping[str, Any]
) -> LoraSettings | Ia3Settings:
    known = {name: value for name, value in fields.items() if value is not None}
    known.setdefault("task_type", _task_of_class(fields.get("auto_mapping")))
    try:
        settings = kind.model_validate(known)
        _check_entries(settings)
        settings.check_patterns()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InvalidAdapterError(
            f"{path}: {place:.80}: {first['msg']}, found {first['input']!r:.80}"
        ) from error
    except InvalidAdapterError as error:
        raise InvalidAdapterError(f"{path}: {error}") from error
    return settings


def _check_entries(settings: PeftSettings) -> None:
    for name, value in settings:
        if isinstance(value, list | dict) and len(value) > MAX_ENTRIES:
            raise InvalidAdapterError(
                f"{name} has {len(value)} entries, HMI takes at most {MAX_ENTRIES}; keep those that name "
                "modules of the model"
            )


def _task_of_class(auto_mapping: object) -> str | None:
    """PEFT writes the model's class where it was given no ``task_type``."""
    name = auto_mapping.get("base_model_class") if isinstance(auto_mapping, dict) else None
    return _TASK_OF_CLASS.get(name) if isinstance(name, str) else None


def _warnings(
    path: Path, fields: Mapping[str, Any], kind: type[PeftSettings], general: GeneralInfo
) -> tuple[str, ...]:
    handled = {*kind.model_fields, *_CHANGES_THE_MATHEMATICS, *_NEUTRAL_FIELDS}
    warnings = [
        f"{path.name}: the field {name!r:.80} is unknown to this version and was ignored"
        for name, value in sorted(fields.items())
        if name not in handled and value
    ]
    if fields.get("fan_in_fan_out") and not general.is_causal:
        warnings.append(f"{path.name}: fan_in_fan_out was ignored: BERT's layers are Linear, as in PEFT")
    return tuple(warnings)
