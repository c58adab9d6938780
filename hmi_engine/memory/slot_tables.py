"""Where in the arena the blocks of each slot lie: what the grouped kernels read beside the arena."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from hmi_engine.knowledge.adapter_kinds.kind import SlotTable
from hmi_engine.knowledge.adapters import QUERY_KEY_VALUE, Site
from hmi_engine.knowledge.tenant_file import BlockLayout
from hmi_kernels import ACTIVATIONS

__all__ = ["PlaceTables", "SlotTables"]

_Place = tuple[int, Site]
_NOTHING = -1
_INITIAL_ROWS = 8


class PlaceTables:
    """Rows of slots' entries by layer and site; those of a layer's projections lie side by side."""

    def __init__(
        self,
        tables: tuple[Tensor, Tensor, Tensor, Tensor],
        rows: dict[_Place, int],
        max_ranks: list[int],
    ) -> None:
        """Offsets, ranks, activations and scales, each [rows, slots]; the row and largest rank of a place."""
        self._tables = tables  # replaced together, so that a reader never sees unequal lengths
        self._rows, self._max_ranks = rows, max_ranks

    def at(self, layer: int, site: Site) -> SlotTable:
        """The entries of all slots at one place.

        Raises:
            KeyError: no tenant had a block there, or, if it is a projection, at one of the three.
        """
        row = self._rows[layer, site]
        offsets, ranks, activations, scales = self._tables
        return SlotTable(offsets[row], ranks[row], activations[row], scales[row], self._max_ranks[row])

    def max_ranks(self) -> dict[tuple[int, Site], int]:
        """All places where any slot so far had a block, and the largest rank there; as they are now."""
        return {place: self._max_ranks[row] for place, row in list(self._rows.items())}

    def at_projections(self, layer: int) -> SlotTable:
        """The same for query, key and value together, [3, slots] each; raises KeyError likewise."""
        first = self._rows[layer, QUERY_KEY_VALUE[0]]
        rows = slice(first, first + len(QUERY_KEY_VALUE))
        offsets, ranks, activations, scales = self._tables
        return SlotTable(
            offsets[rows], ranks[rows], activations[rows], scales[rows], max(self._max_ranks[rows])
        )


class SlotTables(PlaceTables):
    """For each layer and site that any tenant used so far, a row with an entry for each slot.

    A slot's entries are written whole at load and cleared whole at eviction, so that a block that the new
    tenant lacks is never the old tenant's. One thread at a time may change them, while others read what is
    there for the slots of their batches.
    """

    def __init__(self, num_slots: int = 64) -> None:
        """Room for ``num_slots`` tenants at first; it grows."""
        tables = (
            torch.full((_INITIAL_ROWS, num_slots), _NOTHING, dtype=torch.int64),
            torch.zeros((_INITIAL_ROWS, num_slots), dtype=torch.int32),
            torch.zeros((_INITIAL_ROWS, num_slots), dtype=torch.int32),
            torch.zeros((_INITIAL_ROWS, num_slots), dtype=torch.float32),
        )
        super().__init__(tables, {}, [])
        self._use(tables)
        self._free = list(reversed(range(num_slots)))

    @property
    def num_slots(self) -> int:
        """Slots that exist now, used or free."""
        return int(self._tables[0].shape[1])

    def assign(self, blocks: Sequence[BlockLayout], arena_offset: int) -> int:
        """Writes a tenant's blocks, whose file begins at ``arena_offset``, and returns its slot."""
        if not self._free:
            self._grow_slots()
        slot = self._free.pop()
        if not blocks:
            return slot
        rows = [self._row(block) for block in blocks]
        offsets, ranks, activations, scales = self._arrays
        offsets[rows, slot] = [arena_offset + block.offset_elements for block in blocks]
        ranks[rows, slot] = [block.rank for block in blocks]
        activations[rows, slot] = [_activation_number(block) for block in blocks]
        scales[rows, slot] = [float(block.settings.get("scale", 1.0)) for block in blocks]
        return slot

    def clear(self, slot: int) -> None:
        """Frees a slot; nothing of its tenant is left in the tables."""
        offsets, *others = self._arrays
        offsets[:, slot] = _NOTHING
        for table in others:
            table[:, slot] = 0
        self._free.append(slot)

    def keep_only(self, slots: Collection[int]) -> None:
        """Frees all other slots, whatever state an exception has left them in."""
        self._use(self._tables)
        others = [slot for slot in reversed(range(self.num_slots)) if slot not in slots]
        self._free = []
        for slot in others:
            self.clear(slot)

    def _row(self, block: BlockLayout) -> int:
        if (block.layer, block.site) not in self._rows:
            for site in QUERY_KEY_VALUE if block.site in QUERY_KEY_VALUE else (block.site,):
                self._add_row((block.layer, site))
        row = self._rows[block.layer, block.site]
        self._max_ranks[row] = max(self._max_ranks[row], block.rank)
        return row

    def _add_row(self, place: _Place) -> None:
        row = len(self._max_ranks)
        if row == len(self._tables[0]):
            self._extend(dim=0)
        self._max_ranks.append(0)
        self._rows[place] = row

    def _grow_slots(self) -> None:
        old = self.num_slots
        self._extend(dim=1)
        self._free.extend(reversed(range(old, 2 * old)))

    def _extend(self, dim: int) -> None:
        """Doubles all tables along ``dim``; what is new is empty."""
        offsets, ranks, activations, scales = self._tables
        self._use(
            (
                torch.cat([offsets, torch.full_like(offsets, _NOTHING)], dim),
                torch.cat([ranks, torch.zeros_like(ranks)], dim),
                torch.cat([activations, torch.zeros_like(activations)], dim),
                torch.cat([scales, torch.zeros_like(scales)], dim),
            )
        )

    def _use(self, tables: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        self._tables = tables
        # The same memory: a few entries are written to it five times as fast as to tensors.
        self._arrays = tuple(table.numpy() for table in tables)


def _activation_number(block: BlockLayout) -> int:
    activation = block.settings.get("activation")
    return 0 if activation is None else ACTIVATIONS.index(str(activation))
