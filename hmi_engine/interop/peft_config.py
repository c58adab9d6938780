"""The settings in PEFT's ``adapter_config.json`` that decide what a LoRA computes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hmi_engine.errors import InvalidAdapterError

__all__ = ["CONFIG_FILE", "LoraSettings", "read_settings"]

CONFIG_FILE = "adapter_config.json"

Number = TypeVar("Number", int, float)

_CHANGES_THE_MATHEMATICS = {
    "use_dora": "DoRA (use_dora)",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "lora_bias": "a bias inside the LoRA (lora_bias)",
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
        "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
        "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
        "lora_ga_config", "corda_config", "megatron_config", "megatron_core", "modules_to_save",
        "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "velora_config",
    }
)  # fmt: skip


class LoraSettings(BaseModel):
    """The fields of PEFT's ``LoraConfig`` that HMI reads; patterns are regular expressions."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str
    task_type: str | None = None
    r: int = Field(default=8, ge=1)
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    def rank(self, module: str) -> int:
        """Rank of a module, named as in the model (``bert.encoder.layer.0.attention.self.query``)."""
        return _first_match(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Factor of a module's update: ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.

        The latter is the rank-stabilized LoRA of Kalajdzievski (2023).
        """
        alpha = _first_match(self.alpha_pattern, module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _first_match(patterns: dict[str, Number], module: str, default: Number) -> Number:
    """PEFT's rule: the first pattern that matches the whole name, or its end after a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_settings(directory: Path) -> tuple[LoraSettings, tuple[str, ...]]:
    """Reads ``adapter_config.json`` and refuses what HMI would compute differently from PEFT.

    Returns:
        The settings, and warnings about fields that this version does not know.

    Raises:
        InvalidAdapterError: the file is missing or unreadable, is not LoRA, or uses an unsupported feature.
    """
    path = directory / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidAdapterError(f"{directory}: no {CONFIG_FILE}; give a folder saved by PEFT") from error
    except (OSError, ValueError) as error:
        raise InvalidAdapterError(f"{path}: unreadable: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidAdapterError(f"{path}: holds a {type(fields).__name__}, expected an object of settings")
    _check_features(path, fields)
    return _settings(path, fields), _warnings(path, fields)


def _check_features(path: Path, fields: dict[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise InvalidAdapterError(
            f"{path}: peft_type is {fields.get('peft_type')!r:.80}; this release imports LORA, "
            "other kinds come with a later release"
        )
    if fields.get("bias", "none") != "none":
        raise InvalidAdapterError(
            f"{path}: bias is {fields['bias']!r:.80}; trained biases of the base model are not imported, "
            "train with bias='none'"
        )
    for field, feature in _CHANGES_THE_MATHEMATICS.items():
        if fields.get(field):
            raise InvalidAdapterError(
                f"{path}: {feature} is not supported; train with a plain LoRA, or merge and retrain"
            )
    initialization = fields.get("init_lora_weights", True)
    if initialization not in _NEUTRAL_INITIALIZATIONS:
        raise InvalidAdapterError(
            f"{path}: init_lora_weights is {initialization!r:.80}, which changes the base model's weights; "
            "save with path_initial_model_for_weight_conversion to get a LoRA of the unchanged base"
        )


def _settings(path: Path, fields: dict[str, Any]) -> LoraSettings:
    known = {name: value for name, value in fields.items() if value is not None}
    try:
        settings = LoraSettings.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InvalidAdapterError(f"{path}: {place}: {first['msg']}, found {first['input']!r:.80}") from error
    for pattern in (*settings.rank_pattern, *settings.alpha_pattern):
        _check_pattern(path, pattern)
    if any(rank < 1 for rank in settings.rank_pattern.values()):
        raise InvalidAdapterError(f"{path}: rank_pattern has a rank below 1")
    return settings


def _check_pattern(path: Path, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InvalidAdapterError(f"{path}: {pattern!r:.80} is no regular expression: {error}") from error


def _warnings(path: Path, fields: dict[str, Any]) -> tuple[str, ...]:
    handled = {*LoraSettings.model_fields, *_CHANGES_THE_MATHEMATICS, *_NEUTRAL_FIELDS}
    handled |= {"bias", "init_lora_weights", "fan_in_fan_out"}
    unknown = [name for name, value in sorted(fields.items()) if name not in handled and value]
    warnings = [
        f"{path.name}: the field {name} is unknown to this version and was ignored" for name in unknown
    ]
    if fields.get("fan_in_fan_out"):
        warnings.append(f"{path.name}: fan_in_fan_out was ignored: BERT's layers are Linear, as in PEFT")
    return tuple(warnings)
