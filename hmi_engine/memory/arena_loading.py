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
from hmi_engine.memory.placement import Holding, PlacedTenant, Placement
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

_READ = "read"
"""Uses the range that it writes to."""

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

    def load(self, infos: Sequence[TenantInfo], holding: Holding, *, spare_needed: bool) -> LoadResults:
        """Brings in distinct tenants that are not in the arena, all at once, for each its place or an error.

        ``holding`` claims each that is brought in, also where this ends by an exception. With
        ``spare_needed`` nothing leaves that queued requests wait for. Where one that was given room turns out
        to be damaged, the room is offered to those that found none.
        """
        waiting, results = list(infos), LoadResults()
        while waiting:
            loaded = self._load_once(waiting, holding, spare_needed)
            results |= loaded
            was_room = any(
                isinstance(result, HmiError) and not isinstance(result, OverloadedError | ReadTimeoutError)
                for result in loaded.values()
            )
            without = [info for info in waiting if isinstance(loaded[digest_of(info)], NoRoomError)]
            waiting = without if was_room else []
        return results

    def _load_once(self, infos: Sequence[TenantInfo], holding: Holding, spare_needed: bool) -> LoadResults:
        layouts = self.reader.layouts(infos)
        results = LoadResults()
        reserved: list[PlacedTenant] = []
        is_reading = False
        try:
            with self.lock:
                wanted = self._reserve_each(infos, layouts, spare_needed, reserved, results)
            is_reading = True
            outcomes = self.source.load(wanted)
            is_reading = False
            with self.lock:
                self._publish_each(reserved, outcomes, holding, results)
        except BaseException:  # such as Ctrl-C's
            with self.lock:
                if is_reading:
                    for placed in reserved:
                        self._take_back(placed)
                else:
                    self._start_anew(reserved)
            raise
        return results

    def _reserve_each(
        self,
        infos: Sequence[TenantInfo],
        layouts: Sequence[TenantLayout | HmiError],
        spare_needed: bool,
        reserved: list[PlacedTenant],
        results: LoadResults,
    ) -> list[WantedParameters]:
        """Takes ranges for tenants, those of ``reserved``; errors are put into ``results``."""
        self._take_back_stuck()
        for info, layout in zip(infos, layouts, strict=True):
            try:
                reserved.append(self._reserve(info, layout, spare_needed))
            except HmiError as error:
                results[digest_of(info)] = error
        return [
            WantedParameters(placed.info, placed.layout, self.placement.parameters(placed))
            for placed in reserved
        ]

    def _publish_each(
        self,
        reserved: Sequence[PlacedTenant],
        outcomes: Sequence[HmiError | Arrival | None],
        holding: Holding,
        results: LoadResults,
    ) -> None:
        for placed, outcome in zip(reserved, outcomes, strict=True):
            if isinstance(outcome, HmiError):
                results[placed.digest] = outcome
                self._take_back(placed)
            else:
                results[placed.digest] = placed
                self._publish(placed, outcome)
                holding.claim(placed)

    def _start_anew(self, reserved: Sequence[PlacedTenant]) -> None:
        """Has all leave whom nobody uses: an exception came where tenants were put, moved or taken out.

        Whoever was on the move might be read from where another lies now.
        """
        for placed in reserved:
            if self.reader.is_reading(placed.digest) and placed not in self._stuck:
                self._leave_to_read(placed)
        self._stuck = [placed for placed in self._stuck if placed.users]
        self.departures.drop_unused()

    def _publish(self, placed: PlacedTenant, arrival: Arrival | None) -> None:
        placed.arrival = arrival
        placed.is_pinned = self.departures.is_pinned(placed.digest)
        self.placement.publish(placed)
        self.statistics.loads += 1
        self.statistics.bytes_copied += placed.layout.data_bytes if self.source is not self.reader else 0

    def _take_back(self, placed: PlacedTenant) -> None:
        """Frees the range of a tenant that did not come, once no read writes to it."""
        if self.reader.is_reading(placed.digest):
            self._leave_to_read(placed)
        else:
            self.placement.drop(placed)

    def _take_back_stuck(self) -> None:
        ended = [placed for placed in self._stuck if not self.reader.is_reading(placed.digest)]
        for placed in ended:
            placed.used_by.clear()
            self._stuck.remove(placed)
            self.placement.drop(placed)

    def _leave_to_read(self, placed: PlacedTenant) -> None:
        """Keeps a range where it is, to which a read writes."""
        placed.used_by.add(_READ)
        self._stuck.append(placed)

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
