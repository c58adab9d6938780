"""In which order tenants are looked at, those whose weights are not in memory apart."""

from __future__ import annotations

from typing import Generic, TypeVar

from hmi_engine.lazy_heap import LazyHeap
from hmi_engine.schedule.fairness import Turn, VirtualTokenCounters
from hmi_engine.schedule.tenant_queue import TenantQueue

__all__ = ["Turns"]

Payload = TypeVar("Payload")


class Turns(Generic[Payload]):
    """Tenants that have something queued, by their turns, in two heaps.

    One whose weights were on their way when it was looked at stands in the second heap, and only the first
    few of it are looked at again for a batch: else thousands of such tenants, all with small counters, would
    be looked at for each. Not thread-safe; calls take logarithmic time, amortized.
    """

    def __init__(self, counters: VirtualTokenCounters) -> None:
        """Nobody; turns are those of ``counters``."""
        self._counters = counters
        self._unknown = LazyHeap[TenantQueue[Payload], Turn]()
        self._cold = LazyHeap[TenantQueue[Payload], Turn]()

    def put(self, tenant: TenantQueue[Payload], *, cold: bool = False) -> None:
        """Places ``tenant``, which stands nowhere, by its turn; ``cold`` if its weights are on their way."""
        (self._cold if cold else self._unknown).put(tenant, self._counters.turn(tenant.name))

    def look_again(self, tenant: TenantQueue[Payload]) -> None:
        """Whether the weights that ``tenant`` needs are in memory is not known any more."""
        if tenant in self._cold:
            self._cold.remove(tenant)
            self.put(tenant)

    def remove(self, tenant: TenantQueue[Payload]) -> None:
        """``tenant`` has nothing queued; does nothing if it stands nowhere."""
        self._unknown.remove(tenant)
        self._cold.remove(tenant)

    def pop(self, *, with_cold: bool = True) -> TenantQueue[Payload] | None:
        """Takes the tenant whose turn it is, of both heaps or of the first; None if there is none."""
        first = self._unknown.first()
        cold = self._cold.first() if with_cold else None
        if first is None or (cold is not None and self._turn(cold) < self._turn(first)):
            return self._cold.pop() if cold is not None else None
        return self._unknown.pop()

    def pop_cold(self) -> TenantQueue[Payload] | None:
        """Takes the first tenant whose weights are on their way; None if there is none."""
        return self._cold.pop()

    def _turn(self, tenant: TenantQueue[Payload]) -> Turn:
        return self._counters.turn(tenant.name)
