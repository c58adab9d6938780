"""Which tenants are in memory: loaded on demand, those worth most kept, none evicted while in use."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import cast

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
from hmi_engine.memory.arena_loading import ArenaLoader, LoadResults, NoRoomError
from hmi_engine.memory.departures import Departures
from hmi_engine.memory.eviction import DemandQueue, FrequencyPerByte, Tickets
from hmi_engine.memory.held_tenants import HeldTenants
from hmi_engine.memory.host_tier import HostTier
from hmi_engine.memory.parameter_format import padded_rank
from hmi_engine.memory.placement import Holding, PlacedTenant, Placement
from hmi_engine.memory.residency_statistics import HostStatistics, ResidencyStatistics
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.streams import Arrival, DeviceStreams, HostStreams
from hmi_engine.memory.tenant_reader import (
    DEFAULT_READ_TIMEOUT,
    Digest,
    ParameterSource,
    TenantReader,
    digest_of,
)

__all__ = ["AdapterResidency", "BatchTickets"]

BatchTickets = tuple[Tickets[Digest], Tickets[Digest]]
"""What one batch of a queue waits for, in the arena and in the tier before it."""


class AdapterResidency:
    """Tenants in one arena under a byte budget, and those before it in host memory where the arena is not.

    Thread-safe. One thread at a time loads. Releasing, asking for what is here, and holding tenants that are
    all here never wait for a read; but nobody's tenants are held before those of a batch that waits for room.
    """

    def __init__(
        self,
        layout: StoreLayout,
        catalog: Catalog,
        general: GeneralInfo,
        arena_bytes: int,
        *,
        host_bytes: int | None = None,
        streams: DeviceStreams | None = None,
        batches_in_flight: int = 1,
        read_timeout: float = DEFAULT_READ_TIMEOUT,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Loads nothing yet.

        Args:
            layout: the store's files.
            catalog: tells which tenants were replaced or removed.
            general: the base that tenants must fit.
            arena_bytes: the arena's budget.
            host_bytes: budget of a tier in host memory before the arena; None: files are read into the arena.
            streams: of the device on which the arena lies; default the CPU. A GPU needs ``host_bytes``.
            batches_in_flight: how many batches' tenants are held at a time.
            read_timeout: seconds after which a read that has not ended fails its tenant.
            dtype: of the arena; other than float32 only with ``host_bytes``, where files are converted.
        """
        assert host_bytes is not None or dtype is torch.float32
        streams = streams or HostStreams()
        self._catalog = catalog
        self._reader = TenantReader(layout, general, read_timeout=read_timeout, dtype=dtype)
        self._host = None if host_bytes is None else HostTier(self._reader, host_bytes, streams)
        self._source: ParameterSource = self._host or self._reader
        self._placement = Placement(arena_bytes, streams, dtype)
        self.arena = self._placement.arena
        self.slots = self._placement.slots
        self._statistics = ResidencyStatistics()
        self._queue = DemandQueue[Digest](FrequencyPerByte())
        self._departures = Departures(catalog, self._placement, self._queue, self._source, self._statistics)
        self._batches_in_flight = batches_in_flight
        self._users: set[Holding] = set()
        self._num_releases = 0
        self._is_room_awaited = False
        self._loading = threading.Lock()  # taken before the other
        self._lock = threading.RLock()
        self._released = threading.Condition(self._lock)
        self._closed = False
        self._loader = ArenaLoader(
            placement=self._placement,
            queue=self._queue,
            reader=self._reader,
            source=self._source,
            statistics=self._statistics,
            departures=self._departures,
            lock=self._lock,
            budget_name=self._budget_name,
        )

    @property
    def num_resident(self) -> int:
        """Tenants in the arena now."""
        return len(self._placement)

    def is_resident(self, digest: Hashable) -> bool:
        """Whether the weights of this digest are in the arena now."""
        with self._lock:
            return self._placement.get(cast(Digest, digest)) is not None

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

    def expected_bytes(self, tenant: TenantInfo) -> int:
        """What a tenant will take of the arena, as far as its record tells; rather more than less."""
        as_float32 = self.arena.allocated_bytes(tenant.bytes // 4)
        if self._reader.dtype is torch.float32 or not tenant.rank:
            return as_float32
        # Half as much, but for the head; and a small rank becomes a multiple of what it was.
        return max(as_float32, as_float32 * padded_rank(tenant.rank) // tenant.rank // 2)

    def batch_bytes_of(self, tenant: TenantInfo) -> int:
        """What a tenant takes of :attr:`batch_bytes`: nothing if it is pinned and in memory."""
        with self._lock:
            if self._departures.is_counted_as_pinned(digest_of(tenant)):
                return 0
        return self.expected_bytes(tenant)

    @property
    def batch_bytes(self) -> int:
        """What one batch's tenants should take together, so that those in flight fit beside each other.

        It is what pinned tenants leave, so they do not count: see :meth:`batch_bytes_of`.
        """
        with self._lock:
            capacity = self.arena.capacity_bytes
            left = (capacity - self._departures.set_aside_bytes) // self._batches_in_flight
            return max(0, min(capacity // max(2, self._batches_in_flight), left))

    def holding(self, tenants: Sequence[TenantInfo], *, wait: bool = False) -> HeldTenants:
        """Makes tenants resident and holds them: none leaves, none moves, until they are released.

        Holds, in the order of ``tenants``, the resident tenant or the error that kept it from loading, so
        that one damaged file fails nobody else: :class:`StoreCorruptError`; :class:`ReadTimeoutError`;
        :class:`OverloadedError` if it does not fit beside the others; :class:`UnknownTenantError` if it was
        removed before it was loaded. A tenant that was replaced before it was loaded is the new one. With
        ``wait``, one that does not fit waits until what is held now has been released: by another thread.

        Raises:
            EngineClosedError: after :meth:`close`.
        """
        holding = Holding()
        try:
            if self._loading.locked():
                held = self._hold_residents(tenants, holding)
                if held is not None:
                    return held
            with self._loading:  # not by acquire(), after which an exception would leave it taken
                return self._load_and_hold(tenants, holding, wait)
        except BaseException:
            self._let_go(holding)
            raise

    def _hold_residents(self, tenants: Sequence[TenantInfo], holding: Holding) -> HeldTenants | None:
        """Holds tenants while others are loaded; None where one is not here, or somebody waits for room.

        That might never come if what lies there were held by ever new batches. The catalog is followed by who
        loads, as what is on its way would not be known here.
        """
        wanted = {digest_of(info): info for info in tenants}
        with self._lock:
            if self._is_room_awaited or any(self._placement.get(digest) is None for digest in wanted):
                return None
            return self._hold(tenants, self._claim_residents(wanted, holding), holding)

    def _load_and_hold(self, tenants: Sequence[TenantInfo], holding: Holding, wait: bool) -> HeldTenants:
        try:
            releases = self._num_releases
            acquired = self._acquire(tenants, holding)
            while wait and _lacks_room(acquired) and self._wait_for_release(releases):
                releases = self._num_releases
                again = [info for info in tenants if isinstance(acquired[digest_of(info)], NoRoomError)]
                acquired |= self._load(again, holding)
            return self._hold(tenants, acquired, holding)
        finally:
            self._is_room_awaited = False

    def _hold(self, tenants: Sequence[TenantInfo], acquired: LoadResults, holding: Holding) -> HeldTenants:
        """Makes who has claimed tenants a user of them, so that they do not move either."""
        with self._lock:
            outcomes = [self._outcome(acquired[digest_of(info)]) for info in tenants]
            arrivals = _still_coming(holding.placed)
            holding.use()
            self._users.add(holding)
        return HeldTenants(outcomes, arrivals, lambda: self._let_go(holding))

    def _outcome(self, result: PlacedTenant | HmiError) -> ResidentTenant | HmiError:
        return result if isinstance(result, HmiError) else self._placement.resident(result)

    def _wait_for_release(self, since: int) -> bool:
        """Returns when something has been released ``since`` so many releases, False if nothing will be."""
        with self._lock:
            if self._num_releases == since and not self._users:
                return False
            self._is_room_awaited = True
            self._released.wait_for(lambda: self._num_releases != since)
            return True

    def _let_go(self, holding: Holding) -> None:
        """Ends claims and use."""
        try:
            self._undo(holding)
        except BaseException:  # such as Ctrl-C's, after which nobody would come back to do the rest
            self._undo(holding)
            raise

    def _undo(self, holding: Holding) -> None:
        with self._lock:
            holding.let_go()
            for placed in holding.placed:
                self._departures.settle(placed)
            self._users.discard(holding)
            self._num_releases += 1
            self._released.notify_all()

    def prefetch(self, tenants: Sequence[TenantInfo]) -> int:
        """Loads tenants ahead of their requests, as far as there is room beside what queued requests need.

        Returns:
            How many of them are in memory now.

        Raises:
            StoreCorruptError, UnknownTenantError: of the first that cannot be loaded; the others are.
            OverloadedError: one is larger than the arena, or is pinned and finds no room.
            EngineClosedError: after :meth:`close`.
        """
        holding = Holding()
        try:
            with self._loading:
                acquired = self._acquire(tenants, holding, spare_needed=True)
                self._let_go(holding)
        except BaseException:
            self._let_go(holding)
            raise
        for info in tenants:
            result = acquired[digest_of(info)]
            if isinstance(result, HmiError) and (info.pinned or not isinstance(result, NoRoomError)):
                raise result
        return sum(isinstance(result, PlacedTenant) for result in acquired.values())

    def load_pinned(self, tenants: Sequence[TenantInfo]) -> None:
        """Loads pinned tenants, which then stay; damaged ones are left to the request that asks for them.

        Raises:
            OverloadedError: they take more than the arena.
        """
        with self._loading:
            layouts = [each for each in self._reader.layouts(tenants) if not isinstance(each, HmiError)]
            needed = sum(self.arena.bytes_of(layout.num_elements) for layout in layouts)
            if needed > self.arena.capacity_bytes:
                raise OverloadedError(
                    f"the {len(tenants)} pinned tenants need {needed} bytes, more than all adapter memory, "
                    f"{self.arena.capacity_bytes} bytes; unpin some, or give the engine more "
                    f"{self._budget_name}"
                )
            holding = Holding()
            try:
                self._acquire(tenants, holding)
            finally:
                self._let_go(holding)

    def expect(self, batches: Sequence[Sequence[TenantInfo]]) -> list[BatchTickets]:
        """Notes a queue of batches, in the order in which they will run; each is to be released once.

        What a queued batch needs is evicted only when nothing else can go, the last needed first.
        """
        with self._lock:
            queued = [[digest_of(info) for info in batch] for batch in batches]
            queued = [list(dict.fromkeys(digests)) for digests in queued]
            first, noted = self._queue.next_number, list[Tickets[Digest]]()
            try:
                for digests in queued:
                    noted.append(self._source.expect(digests))
                own = [self._queue.expect(digests) for digests in queued]
                return list(zip(own, noted, strict=True))
            except BaseException:  # such as Ctrl-C's: nobody knows the tickets
                self._queue.forget_from(first)
                for tickets in noted:
                    self._source.release(tickets)
                raise

    def release(self, *batches: BatchTickets) -> None:
        """Forgets batches of a queue that have run or will not."""
        with self._lock:
            for tickets, source_tickets in batches:
                self._queue.release(tickets)
                self._source.release(source_tickets)
                for _, digest in tickets:
                    self._departures.request_left(digest)

    def close(self) -> None:
        """Gives all memory back; tenants must not be in use."""
        with self._loading, self._lock:
            self._closed = True
            self._placement.close()
            self._source.close()

    @property
    def _budget_name(self) -> str:
        return "host_memory" if self._host is None else "device_memory"

    def _acquire(
        self, tenants: Sequence[TenantInfo], holding: Holding, *, spare_needed: bool = False
    ) -> LoadResults:
        """Finds or loads tenants; ``holding`` claims those that there are."""
        wanted = {digest_of(info): info for info in tenants}
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is closed; open another one on the store")
            self._departures.follow_catalog()
            # First those that are here, so that none of them leaves for another of the batch.
            acquired = self._claim_residents(wanted, holding)
        missing = [info for digest, info in wanted.items() if digest not in acquired]
        return acquired | self._load(missing, holding, spare_needed=spare_needed)

    def _claim_residents(self, wanted: Mapping[Digest, TenantInfo], holding: Holding) -> LoadResults:
        """Counts a request for each of ``wanted``, and finds those that are here."""
        found = LoadResults()
        for digest, info in wanted.items():
            self._queue.used(digest, info.bytes)
            placed = self._placement.get(digest)
            if placed is not None:
                holding.claim(placed)
                self._queue.withdraw(digest)
                found[digest] = placed
        self._statistics.hits += len(found)
        self._statistics.misses += len(wanted) - len(found)
        return found

    def _load(
        self, infos: Sequence[TenantInfo], holding: Holding, *, spare_needed: bool = False
    ) -> LoadResults:
        """Loads tenants, each once however often it is named, or those that have replaced them."""
        wanted = {digest_of(info): info for info in infos}
        loaded = self._loader.load(list(wanted.values()), holding, spare_needed=spare_needed)
        return loaded | self._acquire_successors(wanted, loaded, holding, spare_needed)

    def _acquire_successors(
        self,
        wanted: Mapping[Digest, TenantInfo],
        loaded: LoadResults,
        holding: Holding,
        spare_needed: bool,
    ) -> LoadResults:
        """Where a file is gone because its tenant was replaced since its record was read: the new one."""
        successors: dict[Digest, TenantInfo] = {}
        results = LoadResults()
        for digest, result in loaded.items():
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
            acquired = self._acquire(list(successors.values()), holding, spare_needed=spare_needed)
            results |= {digest: acquired[digest_of(info)] for digest, info in successors.items()}
        return results


def _still_coming(held: Sequence[PlacedTenant]) -> list[Arrival]:
    """What brings tenants that have not come yet, each once."""
    for placed in held:
        if placed.arrival is not None and placed.arrival.has_come:
            placed.arrival = None
    return list(dict.fromkeys(placed.arrival for placed in held if placed.arrival is not None))


def _lacks_room(acquired: LoadResults) -> bool:
    return any(isinstance(result, NoRoomError) for result in acquired.values())
