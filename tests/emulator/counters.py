"""What a launch has moved, from the emulator's observation of every access."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["GlobalTraffic", "LaunchCounters", "SharedAccess", "global_traffic_by_place", "launch_counters"]


class GlobalTraffic(NamedTuple):
    """Bytes of global memory in one direction.

    The three differ by what caches could save: ``sector_bytes >= block_bytes``, and ``block_bytes`` exceeds
    ``distinct_bytes`` by what several blocks touch and by parts of sectors that nobody wants.
    """

    sector_bytes: int
    """32 for every sector of every request of a warp: what the first-level cache is asked for."""
    block_bytes: int
    """32 for every sector that a block touches, once a block: what leaves the multiprocessors if the
    first-level cache keeps all."""
    distinct_bytes: int
    """Bytes that the launch touches: the least that any kernel must move."""


class SharedAccess(NamedTuple):
    """The accesses of one instruction to shared memory."""

    code: int
    requests: int
    """Of a warp each."""
    wavefronts: int
    """Passes over the banks that they took."""
    fewest_wavefronts: int
    """Passes that lanes and widths like these take without bank conflicts."""
    worst_degree: int
    """The most passes that one group of lanes, which could have been served in one, took."""
    place: str
    """``file:line``; empty if there were no conflicts."""


class LaunchCounters(NamedTuple):
    kernel: str
    """With its template arguments."""
    blocks: int
    reads: GlobalTraffic
    writes: GlobalTraffic
    shared: list[SharedAccess]

    @property
    def sector_bytes(self) -> int:
        return self.reads.sector_bytes + self.writes.sector_bytes

    @property
    def block_bytes(self) -> int:
        return self.reads.block_bytes + self.writes.block_bytes

    @property
    def distinct_bytes(self) -> int:
        return self.reads.distinct_bytes + self.writes.distinct_bytes

    @property
    def wavefronts(self) -> int:
        return sum(access.wavefronts for access in self.shared)

    @property
    def excess_wavefronts(self) -> int:
        """Wavefronts that bank conflicts cost."""
        return self.wavefronts - sum(access.fewest_wavefronts for access in self.shared)

    @property
    def conflicts(self) -> list[SharedAccess]:
        """Instructions with bank conflicts, the most expensive first."""
        found = [access for access in self.shared if access.wavefronts > access.fewest_wavefronts]
        return sorted(found, key=lambda access: access.fewest_wavefronts - access.wavefronts)


def launch_counters(module: ModuleType) -> list[LaunchCounters]:
    """The module's launches since its emulator was configured."""
    launches = module.emulator.counters()
    codes = {
        code for launch in launches for code, access in launch["shared"].items() if access[1] > access[2]
    }
    places = _places(module, codes)
    return [
        LaunchCounters(
            module.emulator.function_at(launch["kernel"]),
            launch["blocks"],
            GlobalTraffic(**launch["reads"]),
            GlobalTraffic(**launch["writes"]),
            [SharedAccess(code, *access, places.get(code, "")) for code, access in launch["shared"].items()],
        )
        for launch in launches
    ]


def global_traffic_by_place(module: ModuleType, launch: int = -1) -> list[tuple[str, int]]:
    """Sector bytes of one launch by ``file:line``, the most first: where unexpected traffic comes from."""
    by_code: dict[int, int] = module.emulator.counters()[launch]["global_sector_bytes"]
    places = _places(module, by_code)
    totals: dict[str, int] = {}
    for code, sector_bytes in by_code.items():
        totals[places[code]] = totals.get(places[code], 0) + sector_bytes
    return sorted(totals.items(), key=lambda item: -item[1])


def _places(module: ModuleType, codes: Iterable[int]) -> dict[int, str]:
    ordered = sorted(codes)
    found: Any = module.emulator.places_of(ordered)
    return dict(zip(ordered, found, strict=True))
