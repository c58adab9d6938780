"""Brings tenants into the arena: finds room for them, has others leave, and reads while nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from hmi_engine.errors import HmiError, OverloadedError, ReadTimeoutError
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.knowledge.tenant_file import TenantLayout
from hmi_engine.memory.departures import Departures
from hmi_engine.memory.eviction import DemandQueue
from hmi_engine.memory.placement import PlacedTenant, Placement
from hmi_engine.memory.residency_statistics import ResidencyStatistics
from hmi_engine.memory.streams import Arrival
from hmi_engine.memory.tenant_reader import (
    Digest,
    ParameterSource,
    TenantReader,
    WantedParameters,
    digest_of,
)

__all__ = ["ArenaLoader", "LoadResults", "NoRoomError"]

LoadResults = dict[Digest, PlacedTenant | HmiError]


class NoRoomError(OverloadedError):
    """There is memory enough for the tenant, but others that must stay have it."""


@dataclass
class ArenaLoader:
    """Loads for one caller at a time; holds ``lock`` to change what others see, never while it reads.

    Attributes:
        placement: the arena; ``lock`` guards it.
        queue: decides who leaves; ``lock`` guards it.
        reader: knows the files' layouts.
        source: gives parameters: the reader, or the tier before the arena.
        statistics: counts of the arena; ``lock`` guards them.
        departures: lets tenants leave that have to for another; ``lock`` guards it.
        lock: guards all that is said to be guarded.
        budget_name: the option that gives the arena more memory.
    """

    placement: Placement
    queue: DemandQueue[Digest]
    reader: TenantReader
    source: ParameterSource
    statistics: ResidencyStatistics
    departures: Departures
    lock: threading.RLock
    budget_name: str

    def __post_init__(self) -> None:
        """Nothing is stuck yet."""
        # Ranges of reads that nobody waits for any more: they may still be written to, so nobody gets them.
        self._stuck: list[PlacedTenant] = []

    def load(
        self, infos: Sequence[TenantInfo], held: list[PlacedTenant], *, spare_needed: bool
    ) -> LoadResults:
        """Brings in distinct tenants that are not in the arena, all at once, for each its place or an error.

        ``held`` gets each that is brought in, whose ``claims`` count the caller: also where this ends by an
        exception. With ``spare_needed`` nothing leaves that queued requests wait for. Where one that was
        given room turns out to be damaged, the room is offered to those that found none.
        """
        waiting, results = list(infos), LoadResults()
        while waiting:
            loaded = self._load_once(waiting, held, spare_needed)
            results |= loaded
            was_room = any(
                isinstance(result, HmiError) and not isinstance(result, OverloadedError | ReadTimeoutError)
                for result in loaded.values()
            )
            without = [info for info in waiting if isinstance(loaded[digest_of(info)], NoRoomError)]
            waiting = without if was_room else []
        return results

    def _load_once(
        self, infos: Sequence[TenantInfo], held: list[PlacedTenant], spare_needed: bool
    ) -> LoadResults:
        layouts = self.reader.layouts(infos)
        results = LoadResults()
        with self.lock:
            self._take_back_stuck()
            reserved: list[PlacedTenant] = []
            for info, layout in zip(infos, layouts, strict=True):
                try:
                    reserved.append(self._reserve(info, layout, spare_needed))
                except HmiError as error:
                    results[digest_of(info)] = error
            wanted = [
                WantedParameters(placed.info, placed.layout, self.placement.parameters(placed))
                for placed in reserved
            ]
        try:
            outcomes = self.source.load(wanted)
        except BaseException:  # such as Ctrl-C's, which leaves reads to themselves
            with self.lock:
                for placed in reserved:
                    self._take_back(placed)
            raise
        with self.lock:
            for placed, outcome in zip(reserved, outcomes, strict=True):
                if isinstance(outcome, HmiError):
                    results[placed.digest] = outcome
                    self._take_back(placed)
                else:
                    results[placed.digest] = placed
                    self._publish(placed, outcome)
                    held.append(placed)
        return results

    def _publish(self, placed: PlacedTenant, arrival: Arrival | None) -> None:
        placed.arrival = arrival
        placed.is_pinned = self.departures.is_pinned(placed.digest)
        self.placement.publish(placed)
        placed.claims += 1
        self.statistics.loads += 1
        self.statistics.bytes_copied += placed.layout.data_bytes if self.source is not self.reader else 0

    def _take_back(self, placed: PlacedTenant) -> None:
        """Frees the range of a tenant that did not come, once no read writes to it."""
        if self.reader.is_reading(placed.digest):
            placed.users += 1  # the read, which writes to where it is now
            self._stuck.append(placed)
        else:
            self.placement.drop(placed)

    def _take_back_stuck(self) -> None:
        ended = [placed for placed in self._stuck if not self.reader.is_reading(placed.digest)]
        for placed in ended:
            self._stuck.remove(placed)
            self.placement.drop(placed)

    def _reserve(self, info: TenantInfo, layout: TenantLayout | HmiError, spare_needed: bool) -> PlacedTenant:
        """Takes a range for a tenant; raises ``layout`` if it is an error, and OverloadedError."""
        if isinstance(layout, HmiError):
            raise layout
        arena = self.placement.arena
        size = arena.bytes_of(layout.num_elements)
        if size > arena.capacity_bytes:
            raise OverloadedError(
                f"tenant {info.name!r} needs {size} bytes, more than all adapter memory, "
                f"{arena.capacity_bytes} bytes; give the engine more {self.budget_name}"
            )
        while (placed := self.placement.reserve(info, layout)) is None:
            victim = self.queue.evict(spare_needed=spare_needed)
            leaving = None if victim is None else self.placement.get(victim)
            if leaving is None:
                placed = self.placement.reserve(info, layout, at_any_cost=True)
                if placed is not None:
                    break
                raise NoRoomError(
                    f"no room for tenant {info.name!r}, which needs {size} bytes: of "
                    f"{arena.capacity_bytes} bytes of adapter memory pinned tenants take "
                    f"{self.departures.pinned_bytes}, and requests that run or wait, or reads that do not "
                    f"end, the rest; give the engine more {self.budget_name}, or a smaller max_batch_tokens"
                )
            self.departures.drop(leaving)
            self.statistics.evictions += 1
        return placed
