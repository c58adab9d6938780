"""One flat block of memory that holds the parameters of all resident tenants."""

from __future__ import annotations

import bisect

import torch

from hmi_engine.knowledge.adapters import Site
from hmi_engine.knowledge.tenant_file import BlockLayout
from hmi_kernels import ACTIVATIONS

__all__ = ["AdapterArena", "SlotTables"]

_GRANULE = 1024  # elements; whole pages, so that a load never shares a page with another tenant's slot
_SITES = tuple(Site)
_SITE_INDEX = {site: index for index, site in enumerate(_SITES)}


class AdapterArena:
    """A float32 block with first-fit allocation; freed neighbours grow together again.

    The operating system gives pages as tenants arrive, so an unused capacity costs nothing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        granules = max(1, capacity_bytes // (_GRANULE * 4))
        self.memory = torch.empty(granules * _GRANULE, dtype=torch.float32)
        self._free: list[tuple[int, int]] = [(0, granules)]  # (start, length) in granules, by start
        self.used_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        """Size of the block."""
        return self.memory.numel() * 4

    @staticmethod
    def allocated_bytes(num_elements: int) -> int:
        """Bytes that an allocation of ``num_elements`` takes."""
        return -(-num_elements // _GRANULE) * _GRANULE * 4

    def allocate(self, num_elements: int) -> int | None:
        """Element offset of a free range, or None where no range is long enough."""
        needed = -(-num_elements // _GRANULE)
        for number, (start, length) in enumerate(self._free):
            if length >= needed:
                if length == needed:
                    del self._free[number]
                else:
                    self._free[number] = (start + needed, length - needed)
                self.used_bytes += needed * _GRANULE * 4
                return start * _GRANULE
        return None

    def release(self, offset: int, num_elements: int) -> None:
        """Gives back a range that ``allocate`` returned."""
        start, length = offset // _GRANULE, -(-num_elements // _GRANULE)
        self.used_bytes -= length * _GRANULE * 4
        place = bisect.bisect(self._free, (start, 0))
        if place < len(self._free) and self._free[place][0] == start + length:
            length += self._free.pop(place)[1]
        if place > 0 and sum(self._free[place - 1]) == start:
            start, before = self._free[place - 1][0], self._free.pop(place - 1)[1]
            length += before
            place -= 1
        self._free.insert(place, (start, length))


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
