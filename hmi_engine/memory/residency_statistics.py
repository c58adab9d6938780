"""What an engine's memory of tenants counts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HostStatistics", "ResidencyStatistics"]


@dataclass
class ResidencyStatistics:
    """Counts of the arena since the engine started; a batch asks for each of its tenants once.

    Attributes:
        hits: tenants that were there.
        misses: tenants that were not.
        loads: that were brought in.
        evictions: that left for others.
        retired: that left because they were replaced or removed.
        moves: that were moved to bring free memory together.
        bytes_moved: by that.
        files_read: tenants read from files.
        bytes_read: by that.
        bytes_copied: from host memory into the arena, where these are two.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    retired: int = 0
    moves: int = 0
    bytes_moved: int = 0
    files_read: int = 0
    bytes_read: int = 0
    bytes_copied: int = 0


@dataclass
class HostStatistics:
    """Counts of the host tier since the engine started.

    Attributes:
        hits: tenants that the arena lacked and host memory had.
        misses: those that had to be read from files.
        evictions: tenants that left for others.
        resident_tenants: in host memory now.
        resident_bytes: that they take.
        reserved_bytes: with memory kept for reuse; never more than the budget.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    resident_tenants: int = 0
    resident_bytes: int = 0
    reserved_bytes: int = 0
