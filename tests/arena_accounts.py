"""Who is in an arena, and whether all its memory is that of tenants which can be found, and so can leave."""

from __future__ import annotations

from hmi_engine.memory.residency import AdapterResidency

GRANULE = 4096
"""Bytes, of which an arena gives whole numbers."""


def lost_bytes(residency: AdapterResidency) -> int:
    """Bytes that are taken, but by no tenant that is there; call it while nothing is loaded."""
    return residency.arena.used_bytes - sum(placed.size for placed in residency._placement.all())


def names_in(residency: AdapterResidency) -> set[str]:
    """Of the tenants that are there."""
    return {placed.info.name for placed in residency._placement.all()}


def assert_nothing_is_lost(residency: AdapterResidency) -> None:
    """All memory that is used is that of tenants which can leave; call it while nothing is held."""
    assert not lost_bytes(residency)
    assert not any(each.users or each.claims for each in residency._placement.all())
