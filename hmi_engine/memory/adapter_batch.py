"""The adapters of one batch, as the layers of the base model apply them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch

from hmi_engine.knowledge.adapter_kinds import KIND_OF_SITE
from hmi_engine.knowledge.adapter_kinds.kind import GroupedCall
from hmi_engine.knowledge.adapters import Site
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.slot_tables import SlotTables

__all__ = ["AdapterBatch"]


class AdapterBatch:
    """Segments of tokens by slot over the arena; an ``hmi_engine.models.bert_layer.AdapterApplication``."""

    def __init__(
        self,
        arena: torch.Tensor,
        slots: SlotTables,
        tenants: Sequence[ResidentTenant],
        token_counts: Sequence[int],
        readout_counts: Sequence[int],
    ) -> None:
        """Per sequence: its tenant, its number of packed tokens, and of rows that are read out.

        Sequences of one tenant that follow one another become one segment.
        """
        self._arena = arena
        self._slots = slots
        self._used = frozenset[tuple[int, str]]().union(*(tenant.places for tenant in tenants))
        runs = [list(run) for _, run in groupby(range(len(tenants)), lambda index: tenants[index].slot)]
        self._segment_slots = torch.tensor([tenants[run[0]].slot for run in runs], dtype=torch.int32)
        self._token_offsets = _offsets([sum(token_counts[index] for index in run) for run in runs])
        self._readout_offsets = _offsets([sum(readout_counts[index] for index in run) for run in runs])

    def is_used(self, layer: int, site: str) -> bool:
        """Whether any tenant of the batch has a block at this place."""
        return (layer, site) in self._used

    def apply(
        self, layer: int, site: str, output: torch.Tensor, hidden_states: torch.Tensor, *, readout: bool
    ) -> None:
        """Changes each token's ``output`` as its adapter says; see ``AdapterApplication.apply``."""
        place = Site(site)
        KIND_OF_SITE[place].apply(
            GroupedCall(
                output,
                hidden_states,
                self._arena,
                self._readout_offsets if readout else self._token_offsets,
                self._segment_slots,
                self._slots.at(layer, place),
            )
        )


def _offsets(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int64)
