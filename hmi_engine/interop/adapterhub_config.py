"""The settings in AdapterHub's ``adapter_config.json`` that decide what an adapter computes.

Defaults are those of the `adapters` library (https://github.com/adapter-hub/adapters), version 1.3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hmi_engine.errors import InvalidAdapterError
from hmi_engine.interop.adapter_folder import CONFIG_FILE, read_object
from hmi_engine.knowledge.adapters import MAX_RANK, Site
from hmi_engine.knowledge.general import GeneralInfo

__all__ = [
    "ACTIVATION_NAMES",
    "AdapterhubSettings",
    "BottleneckSettings",
    "LowRankSettings",
    "Place",
    "activation_of",
    "read_settings",
    "validated",
]

ACTIVATION_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""transformers' names of activations, and HMI's."""

_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What files without a version meant."""

_OTHER_ARCHITECTURES = {
    "prefix_tuning": "prefix tuning",
    "prompt_tuning": "prompt tuning",
    "reft": "ReFT",
    "mtl_lora": "MTL-LoRA",
}
_WAY_OUT = "train with seq_bn, double_seq_bn, par_bn, lora or ia3"
_TRAINING_ONLY = frozenset(
    {
        "adapter_residual_before_ln", "cross_adapter", "dropout", "dtype", "factorized_phm_W",
        "factorized_phm_rule", "hypercomplex_nonlinearity", "init_weights", "init_weights_seed",
        "inv_adapter_reduction_factor", "learn_phm", "phm_bias", "phm_c_init", "phm_dim", "phm_init_range",
        "phm_rank", "shared_W_phm", "shared_phm_rule", "stochastic_depth",
    }
)  # fmt: skip
"""Fields that change no answer of a BERT, or belong to a feature that another field refuses."""

Model = TypeVar("Model", bound=BaseModel)
ReductionFactor = Annotated[float, Field(gt=0)]


class Place(NamedTuple):
    """Where a block of a folder stands: its site, and its module below ``encoder.layer.N``."""

    layer: int
    site: Site
    module: str


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    leave_out: list[int] = []

    def layers(self, general: GeneralInfo) -> list[int]:
        """The layers that have blocks."""
        left_out = set(self.leave_out)
        return [layer for layer in range(general.num_layers) if layer not in left_out]


class BottleneckSettings(_Settings):
    """``BnConfig``: the fields that HMI reads. :meth:`refusal` names what it does not compute."""

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: ReductionFactor | dict[str, ReductionFactor]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | Literal["post_add"] = True
    ln_before: bool = False
    ln_after: bool = False
    is_parallel: bool = False
    scaling: float | Literal["learned", "channel"] = 1.0
    use_gating: bool = False
    inv_adapter: str | None = None
    phm_layer: bool = False

    def refusal(self) -> str | None:
        """What HMI does not compute, None if it computes all."""
        residual = f"residual_before_ln={self.residual_before_ln!r}"
        refused = {
            "phm_layer (Compacter)": self.phm_layer,
            "inv_adapter (an invertible adapter behind the embeddings)": bool(self.inv_adapter),
            "use_gating": self.use_gating,
            "a LayerNorm of the adapter's own (ln_before, ln_after)": self.ln_before or self.ln_after,
            "original_ln_after=false (AdapterPlus)": not self.original_ln_after,
            "is_parallel at the attention (mh_adapter)": self.is_parallel and self.mh_adapter,
        }
        if not self.is_parallel:
            before = self.original_ln_before
            refused |= {
                "original_ln_before=true at the attention (mh_adapter)": before and self.mh_adapter,
                f"original_ln_before=true with {residual}": before and self.residual_before_ln is not True,
                f"{residual} without original_ln_before": self.residual_before_ln == "post_add",
            }
        return next((feature for feature, is_used in refused.items() if is_used), None)

    def places(self, general: GeneralInfo) -> Iterator[Place]:
        """Where the blocks stand: HMI's site by the order of residual connections and LayerNorm."""
        after_ffn = Site.AFTER_FFN_NORMALIZED if self.original_ln_before else Site.AFTER_FFN
        for layer in self.layers(general):
            if self.mh_adapter:
                yield Place(layer, Site.AFTER_ATTENTION, "attention.output")
            if self.output_adapter:
                yield Place(layer, Site.PARALLEL_FFN if self.is_parallel else after_ffn, "output")

    def rank(self, layer: int, general: GeneralInfo) -> int:
        """Width of the bottleneck of a layer: hidden size over reduction factor, rounded down, at least 1.

        Raises:
            InvalidAdapterError: no factor for this layer, or a width that HMI does not compute.
        """
        factor = self.reduction_factor
        if isinstance(factor, dict):
            chosen = factor.get(str(layer), factor.get("default"))
            if chosen is None:
                raise InvalidAdapterError(
                    f"reduction_factor has nothing for layer {layer} and no 'default'; the library wants one"
                )
            factor = chosen
        width = general.hidden_size // factor
        if not math.isfinite(width) or width > MAX_RANK:
            raise InvalidAdapterError(
                f"reduction_factor {factor!r} makes a bottleneck wider than HMI's most, {MAX_RANK}"
            )
        return max(1, int(width))


class LowRankSettings(_Settings):
    """``LoRAConfig``, which is IA3 where ``composition_mode`` is ``"scale"``."""

    architecture: Literal["lora"]
    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    r: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    alpha: float = 8
    attn_matrices: list[Literal["q", "k", "v"]] = ["q", "v"]
    composition_mode: Literal["add", "scale"] = "add"
    use_gating: bool = False
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None

    @property
    def is_scale(self) -> bool:
        """Whether this is IA3."""
        return self.composition_mode == "scale"

    def refusal(self) -> str | None:
        """What HMI does not compute, None if it computes all."""
        if self.use_gating:
            return "use_gating"
        if self.use_dora:
            return "DoRA (use_dora)"
        if self.vera_d is not None or self.vera_b is not None:
            return "VeRA (vera_d, vera_b)"
        if self.is_scale and self.r > 1:
            return "composition_mode='scale' with r above 1 (the library computes it as little)"
        return None

    def places(self, general: GeneralInfo) -> Iterator[Place]:
        """Where the blocks stand."""
        names = {"q": ("query", Site.QUERY), "k": ("key", Site.KEY), "v": ("value", Site.VALUE)}
        for layer in self.layers(general):
            for letter in dict.fromkeys(self.attn_matrices) if self.selfattn_lora else ():
                name, site = names[letter]
                yield Place(layer, self._site(site), f"attention.self.{name}")
            if self.intermediate_lora:
                yield Place(layer, self._site(Site.FFN_UP), "intermediate.dense")
            if self.output_lora:
                yield Place(layer, self._site(Site.FFN_DOWN), "output.dense")

    def _site(self, linear: Site) -> Site:
        return Site(f"{linear}.scale") if self.is_scale else linear


class AdapterhubSettings(NamedTuple):
    """One folder: the name that its tensors have, and its method or, of a union, methods."""

    name: str
    methods: tuple[BottleneckSettings | LowRankSettings, ...]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: Annotated[str, Field(min_length=1)]
    config: dict[str, Any]
    model_type: str | None = None
    hidden_size: int | None = None
    version: str | None = None


def read_settings(directory: Path, general: GeneralInfo) -> tuple[AdapterhubSettings, tuple[str, ...]]:
    """Reads ``adapter_config.json`` and refuses what HMI would compute differently from the library.

    Returns:
        The settings, and warnings about fields that this version does not know.

    Raises:
        InvalidAdapterError: the file is missing or unreadable, of another base model, or says something that
            HMI does not compute.
    """
    path = directory / CONFIG_FILE
    fields = read_object(path)
    if "peft_type" in fields:
        raise InvalidAdapterError(f"{path}: PEFT wrote it: use import_peft")
    file = validated(path, "", _File, fields)
    _check_base(path, file, general)
    configs = _configs(path, file.config)
    methods = tuple(_method(path, place, config, file) for place, config in configs.items())
    warnings = [note for place, config in configs.items() for note in _warnings(place, config)]
    return AdapterhubSettings(file.name, methods), tuple(warnings)


def activation_of(where: str, name: str) -> str:
    """HMI's name of transformers' activation.

    Raises:
        InvalidAdapterError: HMI has no such activation.
    """
    found = ACTIVATION_NAMES.get(name.lower())
    if found is None:
        raise InvalidAdapterError(
            f"{where}: the activation {name!r:.80} is not supported; HMI has {', '.join(ACTIVATION_NAMES)}"
        )
    return found


def validated(path: Path, place: str, model: type[Model], fields: Mapping[str, Any]) -> Model:
    """Fields as a model; None means the default, as in the library.

    Raises:
        InvalidAdapterError: a field is missing or wrong; the message names it.
    """
    known = {name: value for name, value in fields.items() if value is not None}
    try:
        return model.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([place, *map(str, first["loc"])] if place else map(str, first["loc"]))
        raise InvalidAdapterError(
            f"{path}: {field:.80}: {first['msg']}, found {first['input']!r:.80}"
        ) from error


def _check_base(path: Path, file: _File, general: GeneralInfo) -> None:
    if file.model_type not in (None, general.family):
        raise InvalidAdapterError(
            f"{path}: model_type is {file.model_type!r:.80}, the store's base model is a {general.family}"
        )
    if file.hidden_size not in (None, general.hidden_size):
        raise InvalidAdapterError(
            f"{path}: hidden_size is {file.hidden_size}, the store's base model has {general.hidden_size}"
        )


def _configs(path: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if config.get("architecture") != "union":
        return {"config": config}
    configs = config.get("configs")
    if not isinstance(configs, list) or not configs or not all(isinstance(item, dict) for item in configs):
        raise InvalidAdapterError(f"{path}: config.configs of a union must be a list of objects")
    return {f"config.configs.{number}": item for number, item in enumerate(configs)}


def _method(
    path: Path, place: str, config: dict[str, Any], file: _File
) -> BottleneckSettings | LowRankSettings:
    architecture = config.get("architecture")
    if architecture not in (None, "lora"):
        names = _OTHER_ARCHITECTURES
        name = names.get(architecture) if isinstance(architecture, str) else None
        raise InvalidAdapterError(
            f"{path}: {place}.architecture is {architecture!r:.80}{f' ({name})' if name else ''}, "
            f"which HMI does not compute; {_WAY_OUT}"
        )
    settings: BottleneckSettings | LowRankSettings
    if architecture is None:
        settings = validated(path, place, BottleneckSettings, _with_old_names(config, file))
    else:
        settings = validated(path, place, LowRankSettings, _with_old_scale(config, file))
    refusal = settings.refusal()
    if refusal is not None:
        raise InvalidAdapterError(f"{path}: {place}: {refusal} is not supported; {_WAY_OUT} without it")
    return settings


def _with_old_names(config: dict[str, Any], file: _File) -> dict[str, Any]:
    name = config.get("non_linearity")
    if file.version is not None or not isinstance(name, str):
        return config
    return config | {"non_linearity": _OLD_ACTIVATIONS.get(name, name)}


def _with_old_scale(config: dict[str, Any], file: _File) -> dict[str, Any]:
    """The library before 1.1 ignored ``alpha``; the library since then loads such files so, too."""
    match = re.match(r"adapters\.(\d{1,6})\.(\d{1,6})", file.version or "", re.ASCII)
    if match and (int(match[1]), int(match[2])) < (1, 1):
        return config | {"alpha": config.get("r", 8)}
    return config


def _warnings(place: str, config: Mapping[str, Any]) -> list[str]:
    model = BottleneckSettings if config.get("architecture") is None else LowRankSettings
    handled = {"architecture", *model.model_fields, *_TRAINING_ONLY}
    return [
        f"{CONFIG_FILE}: the field {place}.{name!r:.80} is unknown to this version and was ignored"
        for name, value in sorted(config.items())
        if name not in handled and value
    ]
