"""Task adapters: small blocks of tensors at named sites of the upper layers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hmi_engine.errors import InvalidAdapterError
from hmi_engine.knowledge.adapter_kinds import KIND_OF_SITE, KINDS
from hmi_engine.knowledge.adapter_kinds.bitfit import BiasBlock
from hmi_engine.knowledge.adapter_kinds.bottleneck import BottleneckBlock, BottleneckKind
from hmi_engine.knowledge.adapter_kinds.ia3 import ScaleBlock
from hmi_engine.knowledge.adapter_kinds.kind import MAX_RANK, Block, BlockKind, BlockSizes, check_rank
from hmi_engine.knowledge.adapter_kinds.lora import LoraBlock, LoraKind
from hmi_engine.knowledge.adapter_kinds.sites import QUERY_KEY_VALUE, Site
from hmi_engine.knowledge.finite import is_finite
from hmi_engine.knowledge.general import GeneralInfo

__all__ = [
    "BOTTLENECK_SITES",
    "KINDS",
    "KIND_OF_SITE",
    "LORA_SITES",
    "MAX_RANK",
    "QUERY_KEY_VALUE",
    "Adapter",
    "BiasBlock",
    "Block",
    "BottleneckBlock",
    "LoraBlock",
    "ScaleBlock",
    "Site",
    "random_adapter",
    "site_sizes",
]

BOTTLENECK_SITES = BottleneckKind.sites
LORA_SITES = LoraKind.sites

_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_KIND_OF_BLOCK = {kind.block_type: kind.name for kind in KINDS.values()}


@dataclass(frozen=True, eq=False)
class Adapter:
    """A tenant's blocks by (layer, site); empty for a tenant that has only a head."""

    blocks: Mapping[tuple[int, Site], Block]

    @property
    def kind(self) -> str:
        """The kind of the blocks (a key of :data:`KINDS`), ``"mixed"`` of several, ``"none"`` of no block."""
        kinds = {_KIND_OF_BLOCK[type(block)] for block in self.blocks.values()}
        if len(kinds) > 1:
            return "mixed"
        return kinds.pop() if kinds else "none"

    @property
    def rank(self) -> int:
        """The largest rank of all blocks, 0 if none has one."""
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
    return KIND_OF_SITE[site].sizes(site, general)


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
    kind = KIND_OF_SITE[site]
    if not isinstance(block, Block) or type(block) is not kind.block_type:
        raise InvalidAdapterError(
            f"{where}: expected a {kind.block_type.__name__}, found a {type(block).__name__}"
        )
    for name, tensor in block.tensors().items():
        _check_tensor(f"{where}, {name}", tensor)
    _check_shapes(where, site, kind, block, general)
    kind.check_settings(where, block.settings())


def _check_shapes(where: str, site: Site, kind: BlockKind, block: Block, general: GeneralInfo) -> None:
    tensors = block.tensors()
    rank = 0
    if kind.has_rank:
        rank = block.rank if next(iter(tensors.values())).dim() else 0
        check_rank(where, rank)
    inputs, outputs = kind.sizes(site, general)
    for name, shape in kind.shapes(BlockSizes(inputs, rank, outputs)).items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise InvalidAdapterError(f"{where}, {name}: shape is {list(found)}, expected {list(shape)}")


def _check_tensor(where: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise InvalidAdapterError(f"{where}: expected a tensor, found a {type(tensor).__name__}")
    if tensor.dtype not in _FLOAT_TYPES:
        raise InvalidAdapterError(f"{where}: dtype is {tensor.dtype}, expected float32, float16 or bfloat16")
    if not is_finite(tensor):
        raise InvalidAdapterError(f"{where}: holds NaN or infinity; was the training diverging?")


def random_adapter(
    general: GeneralInfo,
    kind: str,
    rank: int,
    seed: int,
    *,
    layers: Iterable[int] | None = None,
    sites: Iterable[Site] | None = None,
) -> Adapter:
    """Return an adapter that changes the base a little, the same for the same ``seed``.

    ``kind`` is a key of :data:`KINDS`; kinds without a rank don't look at ``rank``. By default on every upper
    layer at the kind's usual sites. Raises :class:`InvalidAdapterError` if there is no such kind or the
    result does not fit ``general``.
    """
    if kind not in KINDS:
        raise InvalidAdapterError(f"kind {kind!r:.80} is unknown; known are {', '.join(KINDS)}")
    generator = torch.Generator().manual_seed(seed)
    chosen_sites = KINDS[kind].default_sites if sites is None else tuple(sites)
    blocks = {
        (layer, site): _random_block(site, rank, general, generator)
        for layer in (general.upper_layers if layers is None else layers)
        for site in chosen_sites
    }
    adapter = Adapter(blocks)
    adapter.validate(general)
    return adapter


def _random_block(site: Site, rank: int, general: GeneralInfo, generator: torch.Generator) -> Block:
    inputs, outputs = site_sizes(site, general)
    return KIND_OF_SITE[site].random_block(BlockSizes(inputs, rank, outputs), generator)
