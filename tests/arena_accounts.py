"""Whether all memory of an arena is that of tenants which can be found, and so can leave."""

from __future__ import annotations

from hmi_engine.memory.residency import AdapterResidency


def lost_bytes(residency: AdapterResidency) -> int:
    """Bytes that are taken, but by no tenant that is there; call it while nothing is loaded."""
    return residency.arena.used_bytes - sum(placed.size for placed in residency._placement.all())
