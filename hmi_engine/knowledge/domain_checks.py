"""What must hold in the domain tree when a change of the catalog commits; asked inside its transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from hmi_engine.errors import (
    DomainCycleError,
    DomainExistsError,
    DomainInUseError,
    StoreBusyError,
    UnknownDomainError,
)
from hmi_engine.knowledge.catalog_rows import domain_state, has_domain, has_name, other_domains_below
from hmi_engine.knowledge.names import check_name
from hmi_engine.knowledge.records import DomainInfo

__all__ = [
    "check_nothing_else_below",
    "check_parent",
    "check_place",
    "check_removable",
    "check_unchanged",
    "check_unused_name",
]


def check_unused_name(connection: sqlite3.Connection, name: str, root: Path) -> None:
    """Raise :class:`InvalidNameError`, or :class:`DomainExistsError` where the store in ``root`` has it."""
    check_name(name, "domain")
    if has_name(connection, "domains", name):
        raise DomainExistsError(f"domain {name!r} is in {root} already; update it instead")


def check_parent(connection: sqlite3.Connection, domain: DomainInfo) -> None:
    """Raise :class:`UnknownDomainError` where a domain's parent is not in the store."""
    if domain.parent_id is None or not has_domain(connection, domain.parent_id):
        raise UnknownDomainError(
            f"the parent of domain {domain.name!r}, {domain.parent!r}, is not in the store"
        )


def check_unchanged(domains: Mapping[str, DomainInfo], planned_from: DomainInfo) -> None:
    """Raise :class:`StoreBusyError` where a domain is not any more what a change was planned from."""
    current = domains.get(planned_from.name)
    if current is None or domain_state(current) != domain_state(planned_from):
        raise StoreBusyError(f"domain {planned_from.name!r} was changed by someone else meanwhile; try again")


def check_place(domains: Mapping[str, DomainInfo], domain: DomainInfo) -> None:
    """Raise :class:`DomainCycleError` where a domain is below itself.

    Raises :class:`StoreBusyError` where it has neither its own domain layers nor its parent's.
    """
    above = domain
    for _ in range(len(domains) + 1):
        if above.parent is None:
            break
        above = domains[above.parent]
    else:
        raise DomainCycleError(f"domain {domain.name!r} would be below itself")
    if domain.parent and domain.layers is None:
        parent = domains[domain.parent]
        if parent.layer_identity != domain.layer_identity:
            raise StoreBusyError(f"domain {parent.name!r} got other domain layers meanwhile; try again")


def check_nothing_else_below(connection: sqlite3.Connection, replanned: Sequence[DomainInfo]) -> None:
    """Raise :class:`StoreBusyError` where a domain is below ``replanned`` ones that is not one of them."""
    if others := other_domains_below(connection, [info.id for info in replanned]):
        raise StoreBusyError(f"domain {others[0]!r} was put below by someone else meanwhile; try again")


def check_removable(connection: sqlite3.Connection, domain: DomainInfo) -> None:
    """Raise :class:`DomainInUseError` for the root, and where a domain has tenants or children."""
    (tenants,) = connection.execute(
        "SELECT count(*) FROM tenants WHERE domain_id = ?", (domain.id,)
    ).fetchone()
    (children,) = connection.execute(
        "SELECT count(*) FROM domains WHERE parent_id = ?", (domain.id,)
    ).fetchone()
    if domain.parent_id is None:
        raise DomainInUseError(
            f"domain {domain.name!r} is the root of the tree and stays as long as the store"
        )
    if tenants or children:
        raise DomainInUseError(
            f"domain {domain.name!r} still has {tenants} tenants and {children} children; remove them first"
        )
