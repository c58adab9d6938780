"""What every kind of adapter block tells of itself: all that files, arenas and layers know of kinds."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hmi_engine.errors import InvalidAdapterError
from hmi_engine.knowledge.adapter_kinds.sites import Site
from hmi_engine.knowledge.general import GeneralInfo

__all__ = [
    "MAX_RANK",
    "Block",
    "BlockKind",
    "BlockSizes",
    "GroupedCall",
    "Settings",
    "Shapes",
    "SlotTable",
    "check_names",
    "check_rank",
    "check_scale",
]

MAX_RANK = 1024
_MAX_SCALE = torch.finfo(torch.float32).max

Settings = Mapping[str, str | float]
"""What of a block is no tensor, as a tenant's file records it."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a block's tensors by name, in the order in which kernels read them."""


class BlockSizes(NamedTuple):
    """Width of a block's input, its rank (0 for a kind without one), width of its output."""

    inputs: int
    rank: int
    outputs: int


@dataclass(frozen=True, eq=False)
class Block(ABC):
    """The tensors of one adapter at one site of one layer, and their settings."""

    @property
    def rank(self) -> int:
        """Inner width of the block, 0 for a kind that has none."""
        return 0

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name in the order in which kernels read them."""

    def settings(self) -> Settings:
        """Return what is no tensor."""
        return {}


class SlotTable(NamedTuple):
    """Where in the arena the block of each slot lies at one place of one layer, each [slots].

    ``offsets`` int64 are -1 and ``ranks`` int32 0 where a slot has nothing; ``activations`` int32 are numbers
    of ``hmi_kernels.ACTIVATIONS``; ``scales`` float32. No rank is above ``max_rank``.
    """

    offsets: Tensor
    ranks: Tensor
    activations: Tensor
    scales: Tensor
    max_rank: int


class GroupedCall(NamedTuple):
    """A batch at one place: ``output`` [T, out] is changed in place.

    ``hidden_states`` [T, in] are what blocks with matrices read. Segment g is the tokens
    ``segment_offsets[g]`` (int64) up to the next, of the tenant in slot ``segment_slots[g]`` (int32).
    ``output_sizes`` is for several projections of the same hidden states at once: their outputs lie side by
    side, and the tables are [projections, slots].
    """

    output: Tensor
    hidden_states: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slots: SlotTable
    output_sizes: Sequence[int] = ()


class BlockKind(ABC):
    """One kind of block: its sites, shapes, settings, and the kernel that computes it."""

    name: ClassVar[str]
    sites: ClassVar[tuple[Site, ...]]
    default_sites: ClassVar[tuple[Site, ...]]
    block_type: ClassVar[type[Block]]
    has_rank: ClassVar[bool]

    @abstractmethod
    def sizes(self, site: Site, general: GeneralInfo) -> tuple[int, int]:
        """Return the widths of a block's input and output at ``site``."""

    @abstractmethod
    def shapes(self, sizes: BlockSizes) -> Shapes:
        """Return the shapes of a block's tensors by name, in the order in which kernels read them."""

    @abstractmethod
    def sizes_of(self, shapes: Shapes) -> BlockSizes | None:
        """Return the sizes that tensors of these shapes have, None for wrong numbers of dimensions."""

    @abstractmethod
    def check_settings(self, where: str, settings: Mapping[str, object]) -> None:
        """Raise :class:`InvalidAdapterError`, saying ``where``, on missing, unknown or wrong settings."""

    @abstractmethod
    def block(self, tensors: Mapping[str, Tensor], settings: Settings) -> Block:
        """Return the block of checked tensors and settings."""

    @abstractmethod
    def random_block(self, sizes: BlockSizes, generator: torch.Generator) -> Block:
        """Return a block that changes the base's output a little."""

    @abstractmethod
    def apply(self, call: GroupedCall) -> None:
        """Change the output of all of a batch's tenants by one call of a kernel."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of a block's tensors in the order in which kernels read them."""
        return tuple(self.shapes(BlockSizes(1, 1, 1)))


def check_rank(where: str, rank: int) -> None:
    """Raise :class:`InvalidAdapterError` unless ``rank`` is 1 to :data:`MAX_RANK`."""
    if not 1 <= rank <= MAX_RANK:
        raise InvalidAdapterError(f"{where}: rank is {rank}, must be 1 to {MAX_RANK}")


def check_names(where: str, settings: Mapping[str, object], expected: tuple[str, ...]) -> None:
    """Raise :class:`InvalidAdapterError` unless exactly the ``expected`` settings are there."""
    if set(settings) != set(expected):
        raise InvalidAdapterError(
            f"{where}: settings are {', '.join(sorted(settings)) or 'none'}, "
            f"expected {', '.join(expected) or 'none'}"
        )


def check_scale(where: str, scale: object) -> None:
    """Raise :class:`InvalidAdapterError` unless ``scale`` is a number that is finite in float32."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= _MAX_SCALE:
        raise InvalidAdapterError(f"{where}: scale is {scale!r:.80}, must be a finite number in float32")
