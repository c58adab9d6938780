"""How much service each tenant has had: virtual token counters."""

from __future__ import annotations

from hmi_engine.lazy_heap import LazyHeap

__all__ = ["Turn", "VirtualTokenCounters"]

Turn = tuple[float, int]
"""Who is before whom: the counter, and among equal counters when it was set."""


class VirtualTokenCounters:
    """A counter of weighted tokens for each tenant; whoever has the smallest is served next.

    Service is charged when a batch is formed: a request's tokens divided by its tenant's weight. A tenant
    that comes back after having had nothing queued has its counter lifted to the floor, so that nobody saves
    up service by staying away; one that left with more than the floor keeps what it has.

    Method: Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024,
    algorithm 2), with the whole cost known at selection. Not thread-safe; calls take logarithmic time,
    amortized.

    **What may be forgotten.** The floor is the smallest counter of those that have something queued, or,
    while nothing is, that of the tenant that left last. It never falls: a charge raises a counter; a tenant
    enters at the floor or above; one that leaves removes a value from a minimum; the last to leave was alone,
    so its counter was the floor when it left, and whoever enters then starts there or above. A tenant
    enters with max(its counter, the floor of that moment). If its counter was at most the floor at any
    earlier moment, this is the floor, whatever the counter is: 0 gives the same. So the counters of absent
    tenants are dropped as soon as the floor reaches them. Those that are left were served lately: by less
    virtual time ago than one request and the scheduler's lead are worth.
    """

    def __init__(self) -> None:
        """Nobody has had anything."""
        self._turns: dict[str, Turn] = {}
        self._queued = LazyHeap[str, Turn]()
        self._absent = LazyHeap[str, float]()
        self._last_left = 0.0
        self._last_turn = 0

    def __len__(self) -> int:
        """How many counters are remembered."""
        return len(self._turns)

    @property
    def floor(self) -> float:
        """The smallest counter of those that have something queued; it never falls."""
        first = self._queued.first()
        return self._last_left if first is None else self._turns[first][0]

    def turn(self, tenant: str) -> Turn:
        """Where ``tenant``, which has something queued, stands."""
        return self._turns[tenant]

    def first(self, limit: int) -> list[str]:
        """The ``limit`` tenants with something queued that have the first turns, in order."""
        return self._queued.smallest(limit)

    def enter(self, tenant: str) -> None:
        """``tenant``, which had nothing queued, has something now."""
        counter, _ = self._turns.get(tenant, (0.0, 0))
        self._absent.remove(tenant)
        self._set(tenant, max(counter, self.floor))
        self._forget()  # the floor has risen if nobody was queued, and this one is ahead

    def charge(self, tenant: str, num_tokens: int, weight: float) -> None:
        """``tenant``, which has something queued, is served."""
        self._set(tenant, self._turns[tenant][0] + num_tokens / weight)
        self._forget()

    def leave(self, tenant: str) -> None:
        """``tenant`` has nothing queued any more: all was served, cancelled or too late."""
        counter, _ = self._turns[tenant]
        self._queued.remove(tenant)
        if not len(self._queued):
            self._last_left = counter
        self._absent.put(tenant, counter)
        self._forget()

    def _set(self, tenant: str, counter: float) -> None:
        self._last_turn += 1
        self._turns[tenant] = (counter, self._last_turn)
        self._queued.put(tenant, self._turns[tenant])

    def _forget(self) -> None:
        """Drops the counters of absent tenants that the floor has reached; see the class."""
        floor = self.floor
        while (tenant := self._absent.first()) is not None and self._turns[tenant][0] <= floor:
            self._absent.pop()
            del self._turns[tenant]
