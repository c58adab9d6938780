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
    """A float32 block with best-fit allocation; freed neighbours grow together again.

    The smallest range that is long enough is taken: with sizes mixed as tenants' are, 3 % to 7 % more of the
    block is in use than where the first one is (``benchmarks/residency.py``). The operating system gives
    pages as tenants arrive, so an unused capacity costs nothing. Not thread-safe.
    """

    def __init__(self, capacity_bytes: int) -> None:
        granules = max(1, capacity_bytes // (_GRANULE * 4))
        self.memory = torch.empty(granules * _GRANULE, dtype=torch.float32)
        self.used_bytes = 0
        # Free ranges in granules, by start and by length.
        self._starts: list[int] = []
        self._lengths: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []
        self._add_free(0, granules)

    @property
    def capacity_bytes(self) -> int:
        """Size of the block."""
        return self.memory.numel() * 4

    @property
    def largest_free_bytes(self) -> int:
        """The most that one allocation can get now."""
        return self._by_length[-1][0] * _GRANULE * 4 if self._by_length else 0

    @staticmethod
    def allocated_bytes(num_elements: int) -> int:
        """Bytes that an allocation of ``num_elements`` takes."""
        return -(-num_elements // _GRANULE) * _GRANULE * 4

    def allocate(self, num_elements: int) -> int | None:
        """Element offset of a free range, or None where no range is long enough."""
        needed = -(-num_elements // _GRANULE)
        place = bisect.bisect_left(self._by_length, (needed, -1))
        if place == len(self._by_length):
            return None
        length, start = self._by_length[place]
        self._remove_free(start)
        if length > needed:
            self._add_free(start + needed, length - needed)
        self.used_bytes += needed * _GRANULE * 4
        return start * _GRANULE

    def release(self, offset: int, num_elements: int) -> None:
        """Gives back a range that ``allocate`` returned."""
        start, length = offset // _GRANULE, -(-num_elements // _GRANULE)
        self.used_bytes -= length * _GRANULE * 4
        if start + length in self._lengths:
            length += self._remove_free(start + length)
        place = bisect.bisect_left(self._starts, start) - 1
        if place >= 0 and self._starts[place] + self._lengths[self._starts[place]] == start:
            start = self._starts[place]
            length += self._remove_free(start)
        self._add_free(start, length)

    def _add_free(self, start: int, length: int) -> None:
        self._lengths[start] = length
        bisect.insort(self._starts, start)
        bisect.insort(self._by_length, (length, start))

    def _remove_free(self, start: int) -> int:
        length = self._lengths.pop(start)
        del self._starts[bisect.bisect_left(self._starts, start)]
        del self._by_length[bisect.bisect_left(self._by_length, (length, start))]
        return length


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
