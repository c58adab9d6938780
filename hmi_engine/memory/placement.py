"""Where resident tenants lie: each in a range of the arena, its blocks in a slot of the kernels' tables."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.knowledge.tenant_file import TenantLayout
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.slot_tables import SlotTables
from hmi_engine.memory.streams import Arrival, DeviceStreams
from hmi_engine.memory.tenant_reader import Digest, digest_of

__all__ = ["MOST_MOVED", "Holding", "PlacedTenant", "Placement"]

MOST_MOVED = 0.25
"""Of a tenant's size, how much may be moved to make room for it while others can be evicted instead.

A move costs nearly as much as a load, whose tenant may not be asked for again: to move all that would serve
costs several times what it saves (``benchmarks/residency.py``).
"""


@dataclass(eq=False)
class PlacedTenant:
    """A tenant that has a range of the arena.

    Attributes:
        info: the catalog's record of the generation that lies there.
        layout: of its file.
        offset: first element in the arena; changes when it is moved.
        size: bytes that it takes of the arena.
        is_pinned: whether it stays though nobody uses it.
        slot: its number in the tables; None until its parameters are there.
        used_by: who uses it: as long as somebody does, it neither leaves nor moves.
        claimed_by: who will, or does: as long as there is somebody, it does not leave.
        arrival: when its parameters will have come to where it is; None if they have.
        resident: what :meth:`Placement.resident` made for the place that it had then.
    """

    info: TenantInfo
    layout: TenantLayout
    offset: int
    size: int
    is_pinned: bool = False
    slot: int | None = None
    used_by: set[Hashable] = field(default_factory=set)
    claimed_by: set[Hashable] = field(default_factory=set)
    arrival: Arrival | None = None
    resident: ResidentTenant | None = None

    @property
    def digest(self) -> Digest:
        """What it is known by."""
        return digest_of(self.info)

    @property
    def users(self) -> int:
        """How many use it."""
        return len(self.used_by)

    @property
    def claims(self) -> int:
        """How many do or will."""
        return len(self.claimed_by)


@dataclass(eq=False)
class Holding:
    """What one batch has of the arena, or one that is being put together.

    Sets of these, not counts of them: what an exception such as Ctrl-C's leaves half done can be done again.
    """

    placed: list[PlacedTenant] = field(default_factory=list)

    def claim(self, placed: PlacedTenant) -> None:
        """Keeps a tenant from leaving."""
        self.placed.append(placed)
        placed.claimed_by.add(self)

    def use(self) -> None:
        """Keeps all that were claimed from moving, too."""
        for placed in self.placed:
            placed.used_by.add(self)

    def let_go(self) -> None:
        """Undoes both."""
        for placed in self.placed:
            placed.used_by.discard(self)
            placed.claimed_by.discard(self)


class Placement:
    """The arena, the slots, and who has them. Decides nothing about who leaves; not thread-safe."""

    def __init__(self, arena_bytes: int, streams: DeviceStreams, dtype: torch.dtype) -> None:
        self._streams = streams
        self.arena = AdapterArena(arena_bytes, streams, dtype)
        self.slots = SlotTables()
        self.moves = 0
        self.bytes_moved = 0
        self._published: dict[Digest, PlacedTenant] = {}
        self._by_offset: dict[int, PlacedTenant] = {}  # also those whose parameters have not come yet

    def __len__(self) -> int:
        """How many tenants' parameters are in the arena."""
        return len(self._published)

    def get(self, digest: Digest) -> PlacedTenant | None:
        """The tenant whose parameters are these, if they are in the arena."""
        return self._published.get(digest)

    def all(self) -> list[PlacedTenant]:
        """Every tenant whose parameters are in the arena."""
        return list(self._published.values())

    def reserve(
        self, info: TenantInfo, layout: TenantLayout, *, at_any_cost: bool = False
    ) -> PlacedTenant | None:
        """Takes a range for a tenant; where what is free lies in pieces, tenants that nobody uses make way.

        They do where that costs less than to evict more, or ``at_any_cost``. Returns None where too little
        is free, or what is in use lies between the pieces.
        """
        size = layout.num_elements
        offset = self.arena.allocate(size)
        most = math.inf if at_any_cost else MOST_MOVED * size
        if offset is None and self._bring_together(size, most):
            offset = self.arena.allocate(size)
        if offset is None:
            return None
        placed = PlacedTenant(info, layout, offset, self.arena.bytes_of(size))
        self._by_offset[offset] = placed
        return placed

    def publish(self, placed: PlacedTenant) -> None:
        """Gives a tenant whose parameters have come its slot."""
        self.arena.clear_tail(placed.offset, placed.layout.num_elements)
        placed.slot = self.slots.assign(placed.layout.blocks, placed.offset)
        self._published[placed.digest] = placed

    def drop(self, placed: PlacedTenant) -> None:
        """Takes range and slot back, of one that was published or not."""
        if placed.slot is not None:
            del self._published[placed.digest]
            self.slots.clear(placed.slot)
            placed.slot = None
        del self._by_offset[placed.offset]
        self.arena.release(placed.offset)

    def keep_only_used(self) -> list[PlacedTenant]:
        """Has all leave whom nobody uses, whatever state an exception has left them in; returns them.

        They may lie in pieces, or where nobody looks for them, if they were on the move; who is used is not.
        """
        placed = {*self._published.values(), *self._by_offset.values()}
        left = [each for each in placed if not each.users]
        for each in left:
            each.slot = None
        used = placed.difference(left)
        self._published = {each.digest: each for each in used if each.slot is not None}
        self._by_offset = {each.offset: each for each in used}
        self.slots.keep_only({each.slot for each in used if each.slot is not None})
        self.arena.keep_only({each.offset: each.layout.num_elements for each in used})
        return left

    def parameters(self, placed: PlacedTenant) -> torch.Tensor:
        """The arena's elements [n] that it has: those of its layout."""
        return self.arena.memory[placed.offset : placed.offset + placed.layout.num_elements]

    def resident(self, placed: PlacedTenant) -> ResidentTenant:
        """What batches know of one that was published, made once for each place that it has."""
        resident = placed.resident
        if resident is None or (resident.slot, resident.arena_offset) != (placed.slot, placed.offset):
            assert placed.slot is not None
            resident = placed.resident = ResidentTenant(
                info=placed.info,
                slot=placed.slot,
                places=frozenset((block.layer, block.site.value) for block in placed.layout.blocks),
                head=placed.layout.head,
                parameters=self.parameters(placed),
                arena_offset=placed.offset,
            )
        return resident

    def close(self) -> None:
        """Gives all memory back."""
        self._published.clear()
        self._by_offset.clear()
        self.arena.close()

    def _bring_together(self, num_elements: int, most: float) -> bool:
        if self.arena.free_bytes < self.arena.bytes_of(num_elements):
            return False
        fixed = [offset for offset, placed in self._by_offset.items() if placed.users]
        offsets = self.arena.slide(num_elements, fixed, most=most)
        if offsets is None:
            return False
        moved = None
        if self._streams.is_asynchronous:
            moved = Arrival(None, self._streams.record("copy"))
        for placed in [self._by_offset.pop(offset) for offset in offsets]:
            placed.offset = offsets[placed.offset]
            placed.arrival = moved
            self._by_offset[placed.offset] = placed
            self.moves += 1
            self.bytes_moved += placed.size
            if placed.slot is not None:
                self.slots.clear(placed.slot)
                placed.slot = self.slots.assign(placed.layout.blocks, placed.offset)
        return True
