"""What becomes of tenants in memory that nobody holds: they stay, may be evicted, or are given up."""

from __future__ import annotations

from dataclasses import dataclass

from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.memory.eviction import DemandQueue
from hmi_engine.memory.placement import PlacedTenant, Placement
from hmi_engine.memory.residency_statistics import ResidencyStatistics
from hmi_engine.memory.tenant_reader import Digest, ParameterSource

__all__ = ["Departures"]


@dataclass
class Departures:
    """Lets tenants leave the arena, and those that the catalog has no more all tiers. Not thread-safe.

    Attributes:
        catalog: tells which tenants were replaced or removed, and who is pinned.
        placement: the arena.
        queue: decides who is evicted.
        source: the tier before the arena.
        statistics: counts of the arena.
    """

    catalog: Catalog
    placement: Placement
    queue: DemandQueue[Digest]
    source: ParameterSource
    statistics: ResidencyStatistics

    def __post_init__(self) -> None:
        """Nobody is pinned or retired yet."""
        self._catalog_version: tuple[int, int] | None = None
        self._pinned_ids: set[int] = set()  # as the catalog had them when it was last followed
        self._pinned: dict[Digest, int] = {}  # their bytes
        # Bytes of those that were unpinned, and the first ticket whose request came later.
        self._unpinned: dict[Digest, tuple[int, int]] = {}
        self._retired: set[Digest] = set()  # replaced or removed, but still in use or waited for

    @property
    def pinned_bytes(self) -> int:
        """What pinned tenants take of the arena."""
        return sum(self._pinned.values())

    @property
    def set_aside_bytes(self) -> int:
        """What batches leave free: for pinned tenants, and for those that waiting requests know as pinned.

        Who asked while a tenant was pinned may be put into a batch as one that needs no room there.
        """
        return self.pinned_bytes + sum(size for size, _ in self._unpinned.values())

    def is_counted_as_pinned(self, digest: Digest) -> bool:
        """Whether a tenant's bytes are part of :attr:`pinned_bytes`: it is pinned, and in the arena."""
        return digest in self._pinned

    def follow_catalog(self) -> None:
        """Lets go of tenants that were replaced or removed, once nobody waits for them or uses them.

        To be called while nothing is loaded: what is on its way would not be known here.
        """
        version = self.catalog.version
        if version == self._catalog_version:
            return
        self._catalog_version = version
        known = {*self.source.digests(), *(placed.digest for placed in self.placement.all())}
        existing = self.catalog.tenants.existing_ids(tenant_id for tenant_id, _, _ in known)
        self._pinned_ids = {info.id for info in self.catalog.tenants.pinned()}
        for digest in known:
            placed = self.placement.get(digest)
            if digest[0] not in existing:
                self._retired.add(digest)
                self.let_go(digest)
            elif placed is not None and placed.is_pinned != self.is_pinned(digest):
                placed.is_pinned = not placed.is_pinned
                self.settle(placed)

    def is_pinned(self, digest: Digest) -> bool:
        """Whether the catalog has a tenant pinned; a request's record may be older, and say otherwise."""
        return digest[0] in self._pinned_ids

    def settle(self, placed: PlacedTenant) -> None:
        """Decides what becomes of a tenant that one of its users or claimants does not hold any more."""
        if placed.slot is None:
            return
        self._count(placed)
        if placed.users or placed.claims or self.let_go(placed.digest):
            return
        if placed.is_pinned:
            self.queue.withdraw(placed.digest)
        else:
            self.queue.offer(placed.digest)

    def _count(self, placed: PlacedTenant) -> None:
        digest = placed.digest
        if placed.is_pinned:
            self._pinned[digest] = placed.size
            self._unpinned.pop(digest, None)
        elif self._pinned.pop(digest, None) is not None and self.queue.is_needed(digest):
            self._unpinned[digest] = placed.size, self.queue.next_number

    def request_left(self, digest: Digest) -> None:
        """Follows where a queued request does not wait for a tenant any more."""
        if digest in self._unpinned and not self.queue.is_needed(digest, before=self._unpinned[digest][1]):
            del self._unpinned[digest]
        self.let_go(digest)

    def let_go(self, digest: Digest) -> bool:
        """Gives up a replaced or removed tenant in all tiers, if nobody uses it or waits for it."""
        if digest not in self._retired:
            return False
        placed = self.placement.get(digest)
        in_use = placed is not None and placed.users + placed.claims > 0
        if in_use or self.queue.is_needed(digest):
            return False
        self._retired.remove(digest)
        if placed is not None:
            self.drop(placed)
            self.statistics.retired += 1
        self.queue.forget(digest)
        self.source.forget(digest)
        return True

    def drop_unused(self) -> None:
        """Has all leave whom nobody uses; for an exception in the midst of a change, such as Ctrl-C's."""
        for placed in self.placement.keep_only_used():
            self._pinned.pop(placed.digest, None)
            self.queue.withdraw(placed.digest)

    def drop(self, placed: PlacedTenant) -> None:
        """Has a tenant leave the arena."""
        self._pinned.pop(placed.digest, None)
        self.placement.drop(placed)
