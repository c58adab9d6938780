"""How tenants' parameters lie in an arena of 16 bits, and how they come there from their files' float32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hmi_engine.knowledge.adapter_kinds import KIND_OF_SITE
from hmi_engine.knowledge.finite import is_finite
from hmi_engine.knowledge.head_layout import HeadLayout
from hmi_engine.knowledge.tenant_file import BlockLayout, TenantLayout

__all__ = ["RANK_MULTIPLE", "ConvertedLayout", "converted", "padded_rank"]

RANK_MULTIPLE = 8
"""Of ranks and of blocks' first elements: kernels on a GPU read 16 bytes at a time."""
_HALF_BYTES = 2
_PER_FLOAT = 2
"""16-bit elements that a float32 takes."""


class _Copy(NamedTuple):
    """``rows`` of ``columns``, dense from ``source`` on, to rows that are ``target_columns`` long."""

    source: int
    target: int
    rows: int
    columns: int
    target_columns: int

    def run(self, data: Tensor, destination: Tensor) -> None:
        target = destination[self.target :][: self.rows * self.target_columns]
        target = target.view(self.rows, self.target_columns)[:, : self.columns]
        target.copy_(data[self.source :][: self.rows * self.columns].view(self.rows, self.columns))


@dataclass(frozen=True)
class ConvertedLayout(TenantLayout):
    """A tenant in an arena of 16 bits: ``data_bytes`` there, offsets of blocks in its elements.

    Ranks are padded with zeros, which change no result: the kernels for a GPU then take all of them. Of the
    head, which is small, every float32 stays as it is, in two elements: its offsets are those of a float32
    view.

    Attributes:
        file_elements: float32 in the file's data section, where ``data_start`` is.
        copies: of the blocks.
        head_source: the head's first element in the file.
        head_target: its first element in the arena.
    """

    file_elements: int
    copies: tuple[_Copy, ...]
    head_source: int
    head_target: int

    @property
    def num_elements(self) -> int:
        """Elements in the arena."""
        return self.data_bytes // _HALF_BYTES

    def convert(self, data: Tensor, destination: Tensor) -> bool:
        """Writes the file's float32 ``data`` to 16-bit elements; False if some number is too large there."""
        if len(self.copies) > 1:
            destination[: self.head_target] = 0.0
        for each in self.copies:
            each.run(data, destination)
        destination[self.head_target :].view(torch.float32).copy_(data[self.head_source :])
        return is_finite(destination[: self.head_target])


def padded_rank(rank: int) -> int:
    """The rank that a block has in an arena of 16 bits."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def converted(layout: TenantLayout) -> ConvertedLayout:
    """Where the parameters of a file lie in an arena of 16 bits."""
    blocks: list[BlockLayout] = []
    copies: list[_Copy] = []
    end = 0
    for block in layout.blocks:
        start = padded_rank(end)
        sizes = block.sizes._replace(rank=padded_rank(block.rank))
        of_block = _copies(block, sizes.rank, start)
        end = start + sum(map(math.prod, KIND_OF_SITE[block.site].shapes(sizes).values()))
        blocks.append(replace(block, rank=sizes.rank, offset_elements=start, num_elements=end - start))
        copies.extend(of_block)
    head_target = padded_rank(end)
    places = layout.head.tensors
    head_source = min((place.offset_elements for place in places.values()), default=layout.num_elements)
    num_elements = head_target + _PER_FLOAT * (layout.num_elements - head_source)
    return ConvertedLayout(
        data_start=layout.data_start,
        data_bytes=_HALF_BYTES * num_elements,
        blocks=tuple(blocks),
        head=_moved(layout.head, head_target // _PER_FLOAT - head_source),
        file_elements=layout.num_elements,
        copies=tuple(_joined(copies)),
        head_source=head_source,
        head_target=head_target,
    )


def _moved(head: HeadLayout, distance: int) -> HeadLayout:
    places = {
        name: replace(place, offset_elements=place.offset_elements + distance)
        for name, place in head.tensors.items()
    }
    return replace(head, tensors=places)


def _copies(block: BlockLayout, rank: int, target: int) -> Sequence[_Copy]:
    """One for each of the block's tensors, to where they lie with another rank."""
    shapes = KIND_OF_SITE[block.site].shapes
    source = block.offset_elements
    copies: list[_Copy] = []
    padded = shapes(block.sizes._replace(rank=rank)).values()
    for shape, padded_shape in zip(shapes(block.sizes).values(), padded, strict=True):
        if shape[-1] == padded_shape[-1]:  # the rows that are missing come behind
            size = math.prod(shape)
            copies.append(_Copy(source, target, 1, size, size))
        else:
            copies.append(_Copy(source, target, math.prod(shape[:-1]), shape[-1], padded_shape[-1]))
        source += math.prod(shape)
        target += math.prod(padded_shape)
    return copies


def _joined(copies: Iterable[_Copy]) -> list[_Copy]:
    """Neighbors here and there as one copy: of a tenant that needs no padding one is left."""
    joined: list[_Copy] = []
    for each in copies:
        last = joined[-1] if joined else None
        if (
            last is not None
            and each.rows == last.rows == 1
            and each.source - last.source == each.target - last.target == last.columns
            and each.columns == each.target_columns
        ):
            size = last.columns + each.columns
            joined[-1] = last._replace(columns=size, target_columns=size)
        else:
            joined.append(each)
    return joined
