"""What a step needs of memory, kept from one step to the next while nothing changes."""

from __future__ import annotations

from collections.abc import Sequence

from hmi_engine.errors import HmiError
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.memory.adapter_batch import AdapterBatch
from hmi_engine.memory.causal_view import CausalPlotView
from hmi_engine.memory.held_tenants import HeldTenants
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.memory.residency import AdapterResidency
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.streams import Arrival
from hmi_engine.models.gpt2 import HierarchicalGpt2

__all__ = ["StepLeases"]


class StepLeases:
    """Holds the tenants of a step, their adapters' segments and their tables for the steps after it.

    Texts under way ask for the same in each step: to ask for it anew took a fifth of a small model's step.
    What a step does not need is given back before it. For one thread.
    """

    def __init__(
        self,
        residency: AdapterResidency,
        plots: PlotLibrary | None,
        model: HierarchicalGpt2,
        *,
        keep_tables: bool,
    ) -> None:
        """Holds nothing yet.

        ``keep_tables`` is for steps that compute no missing windows: a view of tables does not find what
        another one computed.
        """
        self._residency = residency
        self._plots = plots
        self._model = model
        self._keep_tables = keep_tables
        self._tenants: list[TenantInfo] = []
        self._held: HeldTenants | None = None
        self._segments: tuple[list[int], AdapterBatch] | None = None
        self._view: tuple[tuple[list[str], tuple[int, int]], CausalPlotView] | None = None

    def residents(self, tenants: Sequence[TenantInfo]) -> list[ResidentTenant | HmiError]:
        """The tenants in memory, or why they are not; see :meth:`AdapterResidency.holding`."""
        if self._held is not None and self._tenants == tenants:
            return self._held.outcomes
        self._release_tenants()
        held = self._residency.holding(tenants, wait=True)
        self._held = held
        # What could not be had is asked for again.
        is_whole = not any(isinstance(outcome, HmiError) for outcome in held.outcomes)
        self._tenants = list(tenants) if is_whole else []
        return held.outcomes

    @property
    def arrivals(self) -> list[Arrival]:
        """What brings tenants of :meth:`residents` that are still on their way to the device."""
        return [] if self._held is None else self._held.arrivals

    def adapters(self, tenants: Sequence[ResidentTenant], token_counts: list[int]) -> AdapterBatch:
        """Segments of the tenants that are held, ``token_counts`` tokens each."""
        if self._segments is None or self._segments[0] != token_counts or len(tenants) != len(self._tenants):
            self._segments = token_counts, self.new_adapters(tenants, token_counts)
        return self._segments[1]

    def new_adapters(self, tenants: Sequence[ResidentTenant], token_counts: list[int]) -> AdapterBatch:
        """The same for some of a step's layers, which the next step will not ask for."""
        arena, slots = self._residency.arena, self._residency.slots
        return AdapterBatch(arena.memory, slots, tenants, token_counts, token_counts)

    def tables(self, domains: Sequence[str]) -> tuple[CausalPlotView | None, dict[str, HmiError]]:
        """The tables of the domains, as the store has them now; None where nothing is looked up.

        A domain that was removed since the step before stays as it was there. Domains whose tables cannot be
        had are left out, and come back with the reason.
        """
        if self._plots is None:
            return None, {}
        names, version = list(dict.fromkeys(domains)), self._plots.version
        if self._keep_tables and self._view is not None and self._view[0] == (names, version):
            return self._view[1], {}
        before = None if self._view is None else self._view[1].plot_view
        found, failed = self._plots.reading_each(names, before=before)
        self._release_tables()
        # Without those that failed: they are asked for again.
        names = [name for name in names if name not in failed]
        self._view = (names, version), CausalPlotView(found, self._model)
        return self._view[1], failed

    def release(self) -> None:
        """Gives everything back."""
        self._release_tenants()
        self._release_tables()

    def _release_tenants(self) -> None:
        held, self._held = self._held, None
        self._tenants, self._segments = [], None
        if held is not None:
            held.release()

    def _release_tables(self) -> None:
        view, self._view = self._view, None
        if view is not None:
            view[1].release()
