"""The adapters of one batch, as the layers of the base model apply them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, islice

import torch

from hmi_engine.knowledge.adapter_kinds import KIND_OF_SITE
from hmi_engine.knowledge.adapter_kinds.kind import GroupedCall, SlotTable
from hmi_engine.knowledge.adapters import QUERY_KEY_VALUE, Site
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.slot_tables import PlaceTables

__all__ = ["AdapterBatch"]

NO_SLOT = -1
"""Of a segment without an adapter, as the kernels know it."""


class AdapterBatch:
    """Segments of tokens by slot over the arena; an ``hmi_engine.models.layer_parts.AdapterApplication``."""

    def __init__(
        self,
        arena: torch.Tensor,
        slots: PlaceTables,
        tenants: Sequence[ResidentTenant],
        token_counts: Sequence[int],
        readout_counts: Sequence[int],
    ) -> None:
        """Per sequence: its tenant, its number of packed tokens, and of rows that are read out.

        Sequences of one tenant that follow one another become one segment.
        """
        self._arena = arena
        self._slots = slots
        self._tenants = tenants
        self._token_counts, self._readout_counts = token_counts, readout_counts
        # Entries of held slots stay as they are, in whatever table they were found.
        self._tables: dict[tuple[int, Site | None], SlotTable] = {}
        self._used = frozenset[tuple[int, str]]().union(*(tenant.places for tenant in tenants))
        runs = [list(run) for _, run in groupby(range(len(tenants)), lambda index: tenants[index].slot)]
        self._segment_slots = torch.tensor([tenants[run[0]].slot for run in runs], dtype=torch.int32)
        self._token_offsets = _offsets([sum(token_counts[index] for index in run) for run in runs])
        self._readout_offsets = _offsets([sum(readout_counts[index] for index in run) for run in runs])
        self._num_empty = 0
        self._max_ranks: dict[tuple[int, Site], int] | None = None

    def between(self, first: int, last: int) -> AdapterBatch:
        """Those of the sequences ``first`` to ``last`` (exclusive)."""
        part = slice(first, last)
        return AdapterBatch(
            self._arena,
            self._slots,
            self._tenants[part],
            self._token_counts[part],
            self._readout_counts[part],
        )

    def padded(self, num_segments: int) -> AdapterBatch:
        """The same with empty segments behind, for all places where any tenant so far has had a block.

        So batches of other tenants have the same form, which a graph that was captured of one can take.
        """
        padded = copy.copy(self)
        padded._max_ranks = self._slots.max_ranks()
        padded._used = frozenset(
            (layer, site.value)
            for (layer, site), rank in padded._max_ranks.items()
            if rank or not KIND_OF_SITE[site].has_rank
        )
        padded._num_empty = num_segments - len(self._segment_slots)
        return padded

    @property
    def form(self) -> tuple[tuple[tuple[int, str], int], ...]:
        """Of a padded batch its places, and the largest rank at each: what kernels are launched by."""
        assert self._max_ranks is not None
        return tuple(((layer, site.value), rank) for (layer, site), rank in self._max_ranks.items())

    def is_used(self, layer: int, site: str) -> bool:
        """Whether any tenant of the batch has a block at this place."""
        return (layer, site) in self._used

    def apply(
        self, layer: int, site: str, output: torch.Tensor, hidden_states: torch.Tensor, *, readout: bool
    ) -> None:
        """Changes each token's ``output`` as its adapter says; see ``AdapterApplication.apply``."""
        place = Site(site)
        offsets = self._readout_offsets if readout else self._token_offsets
        KIND_OF_SITE[place].apply(
            GroupedCall(
                output, hidden_states, self._arena, offsets, self._segment_slots, self._table(layer, place)
            )
        )

    def apply_projections(self, layer: int, output: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds LoRA to queries, keys and values [T, 3H]; see ``AdapterApplication.apply_projections``."""
        size = output.shape[1] // len(QUERY_KEY_VALUE)
        KIND_OF_SITE[QUERY_KEY_VALUE[0]].apply(
            GroupedCall(
                output,
                hidden_states,
                self._arena,
                self._token_offsets,
                self._segment_slots,
                self._table(layer, None),
                [size] * len(QUERY_KEY_VALUE),
            )
        )

    def _table(self, layer: int, site: Site | None) -> SlotTable:
        """The entries at one place, or of a layer's projections together; looked up once for a batch."""
        table = self._tables.get((layer, site))
        if table is None:
            slots = self._slots
            table = slots.at_projections(layer) if site is None else slots.at(layer, site)
            self._tables[layer, site] = table
        return table

    def tensors(self) -> list[torch.Tensor]:
        """All that :meth:`with_tensors` wants on the device where the arena is.

        The tables hold the entries of the batch's own tenants alone, a slot for each segment, so that nothing
        of them changes while a device reads them.
        """
        columns, num_empty = self._segment_slots.long(), self._num_empty
        entries = [self._slots.at(layer, site)[:4] for layer, site in self._places()]
        parts = (_stacked([entry[part][columns] for entry in entries], columns) for part in range(4))
        return [
            _extended(self._token_offsets, num_empty, int(self._token_offsets[-1])),
            _extended(self._readout_offsets, num_empty, int(self._readout_offsets[-1])),
            _extended(torch.arange(len(columns), dtype=torch.int32), num_empty, NO_SLOT),
            *(_extended(part, num_empty, 0) for part in parts),
        ]

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> AdapterBatch:
        """The same batch for a device; takes its :meth:`tensors`, as they are there, from ``tensors``."""
        moved = copy.copy(self)
        moved._token_offsets, moved._readout_offsets, moved._segment_slots = islice(tensors, 3)
        offsets, ranks, activations, scales = islice(tensors, 4)
        moved._tables = {}
        columns, places = self._segment_slots.long(), self._places()
        known = self._max_ranks
        moved._slots = PlaceTables(
            (offsets, ranks, activations, scales),
            {place: row for row, place in enumerate(places)},
            [
                int(self._slots.at(*place).ranks[columns].max()) if known is None else known[place]
                for place in places
            ],
        )
        return moved

    def _places(self) -> list[tuple[int, Site]]:
        """The places that are used; all projections of a layer side by side if one of them is."""
        used = {(layer, Site(site)) for layer, site in self._used}
        layers = sorted({layer for layer, site in used if site in QUERY_KEY_VALUE})
        projections = [(layer, site) for layer in layers for site in QUERY_KEY_VALUE]
        return [*projections, *sorted(used.difference(projections))]


def _stacked(rows: list[torch.Tensor], columns: torch.Tensor) -> torch.Tensor:
    """[places, segments], with no places if there are none."""
    return torch.stack(rows) if rows else torch.empty(0, len(columns))


def _extended(rows: torch.Tensor, count: int, value: int) -> torch.Tensor:
    """[..., n] with ``count`` times ``value`` behind."""
    return rows if not count else torch.nn.functional.pad(rows, (0, count), value=value)


def _offsets(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int64)
