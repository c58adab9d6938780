"""Task adapters: small blocks of tensors at named sites of the upper layers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from hmi_engine.errors import InvalidAdapterError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_kernels import ACTIVATIONS

__all__ = [
    "BOTTLENECK_SITES",
    "LORA_SITES",
    "MAX_RANK",
    "Adapter",
    "AdapterKind",
    "Block",
    "BottleneckBlock",
    "LoraBlock",
    "Site",
    "random_adapter",
    "site_sizes",
]

MAX_RANK = 1024
_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)

AdapterKind = Literal["none", "bottleneck", "lora", "mixed"]


class Site(str, Enum):
    """A place inside a transformer layer where an adapter's block acts."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUTPUT = "attention_output"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    AFTER_ATTENTION = "after_attention"
    """Houlsby: on the attention's output projection, before its residual and LayerNorm."""
    AFTER_FFN = "after_ffn"
    """Houlsby: on the raw output of the feed-forward network."""
    AFTER_FFN_NORMALIZED = "after_ffn_normalized"
    """Pfeiffer (``seq_bn``): on LayerNorm(feed-forward output + residual input)."""

    def __str__(self) -> str:
        """Return the value: the word used in files and messages."""
        return self.value


LORA_SITES = (Site.QUERY, Site.KEY, Site.VALUE, Site.ATTENTION_OUTPUT, Site.FFN_UP, Site.FFN_DOWN)
BOTTLENECK_SITES = (Site.AFTER_ATTENTION, Site.AFTER_FFN, Site.AFTER_FFN_NORMALIZED)


@dataclass(frozen=True, eq=False)
class BottleneckBlock:
    """A bottleneck: adds ``scale * (activation(x @ down + down_bias) @ up + up_bias)``.

    ``down`` [H, R], ``down_bias`` [R], ``up`` [R, H], ``up_bias`` [H], of a float type (Houlsby et al. 2019,
    Pfeiffer et al. 2020). ``activation`` is one of ``hmi_kernels.ACTIVATIONS``.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: str
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Width R of the bottleneck."""
        return int(self.down.shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name in the order in which kernels read them."""
        return {"down": self.down, "down_bias": self.down_bias, "up": self.up, "up_bias": self.up_bias}


@dataclass(frozen=True, eq=False)
class LoraBlock:
    """A low-rank update: adds ``scale * (x @ a) @ b`` to a linear layer's output (Hu et al. 2021).

    ``a`` [in, R] is PEFT's ``lora_A`` transposed, ``b`` [R, out] its ``lora_B`` transposed.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rank R of the update."""
        return int(self.a.shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name in the order in which kernels read them."""
        return {"a": self.a, "b": self.b}


Block = BottleneckBlock | LoraBlock


@dataclass(frozen=True, eq=False)
class Adapter:
    """A tenant's blocks by (layer, site); empty for a tenant that has only a head."""

    blocks: Mapping[tuple[int, Site], Block]

    @property
    def kind(self) -> AdapterKind:
        """The type of the blocks."""
        types = {type(block) for block in self.blocks.values()}
        if len(types) > 1:
            return "mixed"
        if not types:
            return "none"
        return "lora" if LoraBlock in types else "bottleneck"

    @property
    def rank(self) -> int:
        """The largest rank of all blocks, 0 if there is none."""
        return max((block.rank for block in self.blocks.values()), default=0)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that are touched, ascending."""
        return tuple(sorted({layer for layer, _ in self.blocks}))

    @property
    def num_parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.numel() for block in self.blocks.values() for tensor in block.tensors().values())

    def ordered_blocks(self) -> list[tuple[tuple[int, Site], Block]]:
        """Return the blocks by layer, then by the site's name: the order of a tenant's file."""
        return sorted(self.blocks.items(), key=lambda item: (item[0][0], item[0][1].value))

    def validate(self, general: GeneralInfo) -> None:
        """Check every block against the base model.

        Raises :class:`InvalidAdapterError` naming layer, site and tensor, what was found and expected.
        """
        for (layer, site), block in self.blocks.items():
            _check_layer(layer, general)
            _check_block(f"layer {layer}, {site}", site, block, general)


def site_sizes(site: Site, general: GeneralInfo) -> tuple[int, int]:
    """Return the sizes of a block's input and output at ``site``."""
    inputs = general.intermediate_size if site is Site.FFN_DOWN else general.hidden_size
    outputs = general.intermediate_size if site is Site.FFN_UP else general.hidden_size
    return inputs, outputs


def _check_layer(layer: object, general: GeneralInfo) -> None:
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise InvalidAdapterError(f"a layer is an int, not {type(layer).__name__}: {layer!r:.80}")
    if not 0 <= layer < general.num_layers:
        raise InvalidAdapterError(
            f"adapter touches layer {layer}, but {general.source} has layers 0 to {general.num_layers - 1}"
        )
    if layer < general.plot_layers:
        raise InvalidAdapterError(
            f"adapter touches layer {layer}, below plot_layers={general.plot_layers}: those layers are "
            "looked up, not computed. Pass lower_layers='drop' when importing, or create the store with "
            "a smaller plot_layers"
        )


def _check_block(where: str, site: object, block: object, general: GeneralInfo) -> None:
    if not isinstance(site, Site):
        raise InvalidAdapterError(f"{where}: unknown site; known are {', '.join(Site)}")
    expected_type = LoraBlock if site in LORA_SITES else BottleneckBlock
    if not isinstance(block, BottleneckBlock | LoraBlock) or type(block) is not expected_type:
        raise InvalidAdapterError(
            f"{where}: expected a {expected_type.__name__}, found a {type(block).__name__}"
        )
    for name, tensor in block.tensors().items():
        _check_tensor(f"{where}, {name}", tensor)
    rank = block.rank if next(iter(block.tensors().values())).dim() else 0
    if not 1 <= rank <= MAX_RANK:
        raise InvalidAdapterError(f"{where}: rank is {rank}, must be 1 to {MAX_RANK}")
    for name, shape in _expected_shapes(site, rank, general).items():
        found = tuple(block.tensors()[name].shape)
        if found != shape:
            raise InvalidAdapterError(f"{where}, {name}: shape is {list(found)}, expected {list(shape)}")
    _check_settings(where, block)


def _check_tensor(where: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise InvalidAdapterError(f"{where}: expected a tensor, found a {type(tensor).__name__}")
    if tensor.dtype not in _FLOAT_TYPES:
        raise InvalidAdapterError(f"{where}: dtype is {tensor.dtype}, expected float32, float16 or bfloat16")
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidAdapterError(f"{where}: holds NaN or infinity; was the training diverging?")


def _expected_shapes(site: Site, rank: int, general: GeneralInfo) -> dict[str, tuple[int, ...]]:
    inputs, outputs = site_sizes(site, general)
    if site in LORA_SITES:
        return {"a": (inputs, rank), "b": (rank, outputs)}
    return {"down": (inputs, rank), "down_bias": (rank,), "up": (rank, outputs), "up_bias": (outputs,)}


def _check_settings(where: str, block: Block) -> None:
    if (
        isinstance(block.scale, bool)
        or not isinstance(block.scale, int | float)
        or not math.isfinite(block.scale)
    ):
        raise InvalidAdapterError(f"{where}: scale is {block.scale!r:.80}, must be a finite number")
    if isinstance(block, BottleneckBlock) and block.activation not in ACTIVATIONS:
        raise InvalidAdapterError(
            f"{where}: activation {block.activation!r:.80} is unknown; known are {', '.join(ACTIVATIONS)}"
        )


def random_adapter(
    general: GeneralInfo,
    kind: Literal["bottleneck", "lora"],
    rank: int,
    seed: int,
    *,
    layers: Iterable[int] | None = None,
    sites: Iterable[Site] | None = None,
) -> Adapter:
    """Return an adapter with small normal weights, the same for the same ``seed``.

    By default on every upper layer, at the Pfeiffer site (``bottleneck``) or on query and value (``lora``).
    Raises :class:`InvalidAdapterError` if the result does not fit ``general``.
    """
    generator = torch.Generator().manual_seed(seed)
    default_sites = (Site.QUERY, Site.VALUE) if kind == "lora" else (Site.AFTER_FFN_NORMALIZED,)
    chosen_sites = tuple(default_sites if sites is None else sites)
    blocks = {
        (layer, site): _random_block(site, rank, general, generator)
        for layer in (general.upper_layers if layers is None else layers)
        for site in chosen_sites
    }
    adapter = Adapter(blocks)
    adapter.validate(general)
    return adapter


def _random_block(site: Site, rank: int, general: GeneralInfo, generator: torch.Generator) -> Block:
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.02
        for name, shape in _expected_shapes(site, rank, general).items()
    }
    if site in LORA_SITES:
        return LoraBlock(tensors["a"], tensors["b"], scale=1.0)
    return BottleneckBlock(
        tensors["down"], tensors["down_bias"], tensors["up"], tensors["up_bias"], activation="gelu"
    )
