"""Which tenants are in memory: loaded on demand, those worth most kept, none evicted while in use."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from hmi_engine.errors import (
    EngineClosedError,
    HmiError,
    OverloadedError,
    StoreCorruptError,
    UnknownTenantError,
)
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.knowledge.tenant_file import TenantLayout
from hmi_engine.memory.eviction import DemandQueue, FrequencyPerByte, Tickets
from hmi_engine.memory.host_tier import HostTier
from hmi_engine.memory.placement import PlacedTenant, Placement
from hmi_engine.memory.residency_statistics import HostStatistics, ResidencyStatistics
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.tenant_reader import (
    Digest,
    ParameterSource,
    TenantReader,
    WantedParameters,
    digest_of,
)

__all__ = ["AdapterResidency", "BatchTickets"]

BatchTickets = tuple[Tickets[Digest], Tickets[Digest]]
"""What one batch of a queue waits for, in the arena and in the tier before it."""


class _NoRoomError(OverloadedError):
    """There is memory enough for the tenant, but others that must stay have it."""


class AdapterResidency:
    """Tenants in one arena under a byte budget, and those before it in host memory where the arena is not.

    Thread-safe. The lock is held while files are read, not while a batch uses its tenants.
    """

    def __init__(
        self,
        layout: StoreLayout,
        catalog: Catalog,
        general: GeneralInfo,
        arena_bytes: int,
        *,
        host_bytes: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Loads nothing yet.

        Args:
            layout: the store's files.
            catalog: tells which tenants were replaced or removed.
            general: the base that tenants must fit.
            arena_bytes: the arena's budget.
            host_bytes: budget of a tier in host memory before the arena; None: files are read into the arena.
            device: where the arena lies; one that is not the CPU needs ``host_bytes``.
        """
        self._catalog = catalog
        self._reader = TenantReader(layout, general)
        self._host = None if host_bytes is None else HostTier(self._reader, host_bytes)
        self._source: ParameterSource = self._host or self._reader
        self._placement = Placement(arena_bytes, device)
        self.arena = self._placement.arena
        self.slots = self._placement.slots
        self._residents: dict[Digest, ResidentTenant] = {}
        self._pinned: dict[Digest, int] = {}  # their bytes
        self._retired: set[Digest] = set()  # replaced or removed, but still in use or waited for
        self._statistics = ResidencyStatistics()
        self._queue = DemandQueue[Digest](FrequencyPerByte())
        self._catalog_version = catalog.version
        self._lock = threading.RLock()
        self._closed = False

    @property
    def num_resident(self) -> int:
        """Tenants in the arena now."""
        return len(self._placement)

    @property
    def statistics(self) -> ResidencyStatistics:
        """Counts of the arena."""
        with self._lock:
            return replace(
                self._statistics,
                moves=self._placement.moves,
                bytes_moved=self._placement.bytes_moved,
                files_read=self._reader.files_read,
                bytes_read=self._reader.bytes_read,
            )

    @property
    def host_statistics(self) -> HostStatistics | None:
        """Counts of the host tier, None where there is none."""
        with self._lock:
            return None if self._host is None else replace(self._host.statistics)

    @property
    def batch_bytes(self) -> int:
        """What one batch's tenants should take together, so that another batch can be loaded meanwhile."""
        with self._lock:
            return min(self.arena.capacity_bytes // 2, self.arena.capacity_bytes - self._pinned_bytes())

    @contextmanager
    def holding(self, tenants: Sequence[TenantInfo]) -> Iterator[list[ResidentTenant | HmiError]]:
        """Makes tenants resident and holds them until the block ends: none leaves, none moves.

        Yields, in the order of ``tenants``, the resident tenant or the error that kept it from loading, so
        that one damaged file fails nobody else: :class:`StoreCorruptError`; :class:`OverloadedError` if it
        does not fit beside the others; :class:`UnknownTenantError` if it was removed before it was loaded.
        A tenant that was replaced before it was loaded is the new one.

        Raises:
            EngineClosedError: after :meth:`close`.
        """
        with self._lock:
            self._follow_catalog()
            with self._acquiring() as held:
                acquired = self._acquire(tenants, held)
                outcomes = [self._outcome(acquired[digest_of(info)]) for info in tenants]
            for placed in held:
                placed.users += 1
        try:
            yield outcomes
        finally:
            with self._lock:
                for placed in held:
                    placed.users -= 1
                    self._settle(placed)

    def prefetch(self, tenants: Sequence[TenantInfo]) -> int:
        """Loads tenants ahead of their requests, as far as there is room beside what queued requests need.

        Returns:
            How many of them are in memory now.

        Raises:
            StoreCorruptError, UnknownTenantError: of the first that cannot be loaded; the others are.
            OverloadedError: one is larger than the arena, or is pinned and finds no room.
            EngineClosedError: after :meth:`close`.
        """
        with self._lock:
            self._follow_catalog()
            with self._acquiring() as held:
                acquired = self._acquire(tenants, held, spare_needed=True)
            for placed in held:
                self._settle(placed)
        for info in tenants:
            result = acquired[digest_of(info)]
            if isinstance(result, HmiError) and (info.pinned or not isinstance(result, _NoRoomError)):
                raise result
        return sum(isinstance(result, PlacedTenant) for result in acquired.values())

    def load_pinned(self, tenants: Sequence[TenantInfo]) -> None:
        """Loads pinned tenants, which then stay; damaged ones are left to the request that asks for them.

        Raises:
            OverloadedError: they take more than the arena.
        """
        with self._lock:
            layouts = [each for each in self._reader.layouts(tenants) if not isinstance(each, HmiError)]
            needed = sum(self.arena.allocated_bytes(layout.num_elements) for layout in layouts)
            if needed > self.arena.capacity_bytes:
                raise OverloadedError(
                    f"the {len(tenants)} pinned tenants need {needed} bytes, more than all adapter memory, "
                    f"{self.arena.capacity_bytes} bytes; unpin some, or give the engine more "
                    f"{self._budget_name}"
                )
            with self._acquiring() as held:
                self._acquire(tenants, held)
            for placed in held:
                self._settle(placed)

    def expect(self, batches: Sequence[Sequence[TenantInfo]]) -> list[BatchTickets]:
        """Notes a queue of batches, in the order in which they will run; each is to be released once.

        What a queued batch needs is evicted only when nothing else can go, the last needed first.
        """
        with self._lock:
            queued = [[digest_of(info) for info in batch] for batch in batches]
            queued = [list(dict.fromkeys(digests)) for digests in queued]
            return [(self._queue.expect(digests), self._source.expect(digests)) for digests in queued]

    def release(self, *batches: BatchTickets) -> None:
        """Forgets batches of a queue that have run or will not."""
        with self._lock:
            for tickets, source_tickets in batches:
                self._queue.release(tickets)
                self._source.release(source_tickets)
                for _, digest in tickets:
                    self._let_go(digest)

    def close(self) -> None:
        """Gives all memory back; tenants must not be in use."""
        with self._lock:
            self._closed = True
            self._residents.clear()
            self._placement.close()
            self._source.close()

    @property
    def _budget_name(self) -> str:
        return "host_memory" if self._host is None else "device_memory"

    def _pinned_bytes(self) -> int:
        return sum(self._pinned.values())

    def _follow_catalog(self) -> None:
        """Lets go of tenants that were replaced or removed, once nobody waits for them or uses them."""
        if self._closed:
            raise EngineClosedError("the engine is closed; open another one on the store")
        version = self._catalog.version
        if version == self._catalog_version:
            return
        self._catalog_version = version
        known = {*self._source.digests(), *(placed.digest for placed in self._placement.all())}
        existing = self._catalog.tenants.existing_ids(tenant_id for tenant_id, _, _ in known)
        pinned = {info.id for info in self._catalog.tenants.pinned()}
        for digest in known:
            placed = self._placement.get(digest)
            is_pinned = digest[0] in pinned
            if digest[0] not in existing:
                self._retired.add(digest)
                self._let_go(digest)
            elif placed is not None and placed.is_pinned != is_pinned:
                placed.is_pinned = is_pinned
                self._settle(placed)

    @contextmanager
    def _acquiring(self) -> Iterator[list[PlacedTenant]]:
        """A list for tenants that may not be evicted now; after an error they may again."""
        held: list[PlacedTenant] = []
        try:
            yield held
        except BaseException:
            for placed in held:
                self._settle(placed)
            raise

    def _settle(self, placed: PlacedTenant) -> None:
        """Decides what becomes of a tenant that this thread does not hold any more."""
        if placed.users or placed.slot is None or self._let_go(placed.digest):
            return
        if placed.is_pinned:
            self._pinned[placed.digest] = placed.size
            self._queue.withdraw(placed.digest)
        else:
            self._pinned.pop(placed.digest, None)
            self._queue.offer(placed.digest)

    def _let_go(self, digest: Digest) -> bool:
        """Gives up a replaced or removed tenant in all tiers, if nobody uses it or waits for it."""
        placed = self._placement.get(digest)
        in_use = placed is not None and placed.users > 0
        if digest not in self._retired or in_use or self._queue.is_needed(digest):
            return False
        self._retired.remove(digest)
        if placed is not None:
            self._drop(placed)
            self._statistics.retired += 1
        self._queue.forget(digest)
        self._source.forget(digest)
        return True

    def _acquire(
        self, tenants: Sequence[TenantInfo], held: list[PlacedTenant], *, spare_needed: bool = False
    ) -> dict[Digest, PlacedTenant | HmiError]:
        """Finds or loads tenants, and adds what is theirs to ``held``."""
        wanted = {digest_of(info): info for info in tenants}
        acquired: dict[Digest, PlacedTenant | HmiError] = {}
        # First those that are here, so that none of them leaves for another of the batch.
        for digest, info in wanted.items():
            self._queue.used(digest, info.bytes)
            placed = self._placement.get(digest)
            if placed is not None:
                placed.is_pinned = info.pinned
                self._queue.withdraw(digest)
                held.append(placed)
                acquired[digest] = placed
        missing = [info for digest, info in wanted.items() if digest not in acquired]
        self._statistics.hits += len(acquired)
        self._statistics.misses += len(missing)
        acquired |= self._load(missing, held, spare_needed)
        return acquired | self._acquire_successors(wanted, acquired, held, spare_needed)

    def _acquire_successors(
        self,
        wanted: Mapping[Digest, TenantInfo],
        acquired: Mapping[Digest, PlacedTenant | HmiError],
        held: list[PlacedTenant],
        spare_needed: bool,
    ) -> dict[Digest, PlacedTenant | HmiError]:
        """Where a file is gone because its tenant was replaced since its record was read: the new one."""
        successors: dict[Digest, TenantInfo] = {}
        results: dict[Digest, PlacedTenant | HmiError] = {}
        for digest, result in acquired.items():
            if not isinstance(result, StoreCorruptError):
                continue
            current = self._catalog.tenants.get(wanted[digest].name)
            if current is None:
                results[digest] = UnknownTenantError(
                    f"tenant {wanted[digest].name!r} was removed while its request waited"
                )
            elif digest_of(current) != digest:
                successors[digest] = current
        if successors:
            loaded = self._acquire(list(successors.values()), held, spare_needed=spare_needed)
            results |= {digest: loaded[digest_of(info)] for digest, info in successors.items()}
        return results

    def _load(
        self, infos: Sequence[TenantInfo], held: list[PlacedTenant], spare_needed: bool
    ) -> dict[Digest, PlacedTenant | HmiError]:
        """Finds room for all, then brings all in at once."""
        loaded: dict[Digest, PlacedTenant | HmiError] = {}
        reserved: list[PlacedTenant] = []
        try:
            for info, layout in zip(infos, self._reader.layouts(infos), strict=True):
                try:
                    reserved.append(self._reserve(info, layout, spare_needed))
                except HmiError as error:
                    loaded[digest_of(info)] = error
            wanted = [
                WantedParameters(placed.info, placed.layout, self._placement.parameters(placed))
                for placed in reserved
            ]
            for placed, problem in zip(reserved, self._source.load(wanted), strict=True):
                loaded[placed.digest] = problem or placed
                if problem is None:
                    self._placement.publish(placed)
                    held.append(placed)
                    self._statistics.loads += 1
                    self._statistics.bytes_copied += placed.layout.data_bytes if self._host else 0
        finally:
            for placed in reserved:
                if placed.slot is None:
                    self._placement.drop(placed)
        if len(reserved) > sum(isinstance(result, PlacedTenant) for result in loaded.values()):
            # What was kept for damaged files is free again.
            again = [info for info in infos if isinstance(loaded[digest_of(info)], _NoRoomError)]
            loaded |= self._load(again, held, spare_needed) if again else {}
        return loaded

    def _reserve(self, info: TenantInfo, layout: TenantLayout | HmiError, spare_needed: bool) -> PlacedTenant:
        """Takes a range for a tenant; raises ``layout`` if it is an error, and OverloadedError."""
        if isinstance(layout, HmiError):
            raise layout
        size = self.arena.allocated_bytes(layout.num_elements)
        if size > self.arena.capacity_bytes:
            raise OverloadedError(
                f"tenant {info.name!r} needs {size} bytes, more than all adapter memory, "
                f"{self.arena.capacity_bytes} bytes; give the engine more {self._budget_name}"
            )
        while (placed := self._placement.reserve(info, layout)) is None:
            victim = self._queue.evict(spare_needed=spare_needed)
            leaving = None if victim is None else self._placement.get(victim)
            if leaving is None:
                placed = self._placement.reserve(info, layout, at_any_cost=True)
                if placed is not None:
                    break
                raise _NoRoomError(
                    f"no room for tenant {info.name!r}, which needs {size} bytes: of "
                    f"{self.arena.capacity_bytes} bytes of adapter memory pinned tenants take "
                    f"{self._pinned_bytes()}, and requests that run or wait the rest; give the engine more "
                    f"{self._budget_name}, or a smaller max_batch_tokens"
                )
            self._drop(leaving)
            self._statistics.evictions += 1
        return placed

    def _drop(self, placed: PlacedTenant) -> None:
        self._residents.pop(placed.digest, None)
        self._pinned.pop(placed.digest, None)
        self._placement.drop(placed)

    def _outcome(self, result: PlacedTenant | HmiError) -> ResidentTenant | HmiError:
        """The resident tenant, made once for each place that it has."""
        if isinstance(result, HmiError):
            return result
        resident = self._residents.get(result.digest)
        if resident is None or (resident.slot, resident.arena_offset) != (result.slot, result.offset):
            assert result.slot is not None  # what was acquired has been published
            resident = self._residents[result.digest] = ResidentTenant(
                info=result.info,
                slot=result.slot,
                places=frozenset((block.layer, block.site.value) for block in result.layout.blocks),
                head=result.layout.head,
                parameters=self._placement.parameters(result),
                arena_offset=result.offset,
            )
        return resident
