"""One flat block of memory that holds the parameters of all resident tenants."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hmi_engine.knowledge.adapters import Site
from hmi_engine.knowledge.tenant_file import BlockLayout
from hmi_engine.memory.ranges import RangeAllocator
from hmi_kernels import ACTIVATIONS

__all__ = ["AdapterArena", "SlotTables"]

_GRANULE = 1024  # elements; whole pages, so that a load never shares a page with another tenant's slot
_SITES = tuple(Site)
_SITE_INDEX = {site: index for index, site in enumerate(_SITES)}


class AdapterArena:
    """A float32 block with best-fit allocation; what lies in pieces can be slid together.

    The operating system gives pages as tenants arrive, so an unused capacity costs nothing. Not thread-safe.
    """

    def __init__(self, capacity_bytes: int, device: str | torch.device = "cpu") -> None:
        granules = capacity_bytes // (_GRANULE * 4)
        self.memory = torch.empty(granules * _GRANULE, dtype=torch.float32, device=device)
        self._ranges = RangeAllocator(granules)

    @property
    def capacity_bytes(self) -> int:
        """Size of the block."""
        return self.memory.numel() * 4

    @property
    def used_bytes(self) -> int:
        """Bytes in allocated ranges."""
        return self._ranges.used * _GRANULE * 4

    @property
    def free_bytes(self) -> int:
        """Bytes in free ranges, which may lie apart."""
        return self._ranges.free * _GRANULE * 4

    @staticmethod
    def allocated_bytes(num_elements: int) -> int:
        """Bytes that an allocation of ``num_elements`` takes."""
        return _granules(num_elements) * _GRANULE * 4

    def allocate(self, num_elements: int) -> int | None:
        """Element offset of a free range, or None where no range is long enough."""
        start = self._ranges.allocate(_granules(num_elements))
        return None if start is None else start * _GRANULE

    def release(self, offset: int) -> None:
        """Gives back a range that ``allocate`` returned or ``slide`` moved."""
        self._ranges.release(offset // _GRANULE)

    def slide(self, num_elements: int, fixed: Iterable[int] = ()) -> dict[int, int] | None:
        """Makes a free range of ``num_elements`` by moving others, contents and all, but none of ``fixed``.

        Returns the new offsets of what was moved, by the old ones; None, and nothing has moved, where this
        cannot be.
        """
        moves = self._ranges.slide(_granules(num_elements), (offset // _GRANULE for offset in fixed))
        if moves is None:
            return None
        for move in moves:
            source, target, length = (number * _GRANULE for number in move)
            # By way of a copy, as the two may overlap.
            self.memory[target : target + length] = self.memory[source : source + length].clone()
        return {move.start * _GRANULE: move.target * _GRANULE for move in moves}

    def clear_tail(self, offset: int, num_elements: int) -> None:
        """Sets to zero what an allocation has beyond its ``num_elements``."""
        self.memory[offset + num_elements : offset + _granules(num_elements) * _GRANULE] = 0.0

    def close(self) -> None:
        """Gives the memory back; nothing can be allocated any more."""
        self.memory = torch.empty(0, dtype=torch.float32, device=self.memory.device)
        self._ranges = RangeAllocator(0)


def _granules(num_elements: int) -> int:
    return max(1, -(-num_elements // _GRANULE))


class SlotTables:
    """For each layer and site, where in the arena each slot's block lies; what the grouped kernels read.

    A slot's entries are written whole at load and cleared whole at eviction, so that a block that the new
    tenant lacks is never the old tenant's.
    """

    def __init__(self, num_layers: int, num_slots: int = 64) -> None:
        shape = (num_layers, len(_SITES), num_slots)
        self.offsets = torch.zeros(shape, dtype=torch.int64)
        self.ranks = torch.zeros(shape, dtype=torch.int32)
        self.activations = torch.zeros(shape, dtype=torch.int32)
        self.scales = torch.zeros(shape, dtype=torch.float32)
        self._free = list(reversed(range(num_slots)))

    @property
    def num_slots(self) -> int:
        """Slots that exist now, used or free."""
        return int(self.ranks.shape[-1])

    def assign(self, blocks: tuple[BlockLayout, ...], arena_offset: int) -> int:
        """Writes a tenant's blocks, whose file begins at ``arena_offset``, and returns its slot."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        for block in blocks:
            place = (block.layer, _SITE_INDEX[block.site], slot)
            self.offsets[place] = arena_offset + block.offset_elements
            self.ranks[place] = block.rank
            self.scales[place] = block.scale
            if block.activation is not None:
                self.activations[place] = ACTIVATIONS.index(block.activation)
        return slot

    def clear(self, slot: int) -> None:
        """Frees a slot; nothing of its tenant is left in the tables."""
        for table in (self.offsets, self.ranks, self.activations, self.scales):
            table[:, :, slot] = 0
        self._free.append(slot)

    def at(self, layer: int, site: Site) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Offsets, ranks, activations and scales of all slots at one place, each [num_slots]."""
        index = _SITE_INDEX[site]
        return (
            self.offsets[layer, index],
            self.ranks[layer, index],
            self.activations[layer, index],
            self.scales[layer, index],
        )

    def _grow(self) -> None:
        old = self.num_slots
        self.offsets, self.ranks, self.activations, self.scales = (
            torch.cat([table, torch.zeros_like(table)], dim=-1)
            for table in (self.offsets, self.ranks, self.activations, self.scales)
        )
        self._free.extend(reversed(range(old, 2 * old)))
