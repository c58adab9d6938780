"""Rows of the catalog's tables: how infos become rows, and small questions inside a transaction."""

import json
import sqlite3
from collections.abc import Sequence

from hmi_engine.errors import StoreBusyError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.records import DomainInfo, GeneralFile, TenantInfo, TrafficInfo

__all__ = [
    "check_newer",
    "domain_state",
    "has_domain",
    "has_name",
    "insert_domain",
    "insert_tenant",
    "insert_traffic",
    "other_domains_below",
    "replace_domain",
    "replace_general",
    "write_general",
]


def write_general(connection: sqlite3.Connection, general: GeneralInfo, files: Sequence[GeneralFile]) -> None:
    """Put in the description of the base model and of its files, of which there are none yet."""
    # What is as in every new store is left out: versions that know no other can read it.
    connection.execute("INSERT INTO general VALUES (1, ?)", (general.model_dump_json(exclude_defaults=True),))
    connection.executemany("INSERT INTO general_files VALUES (?, ?, ?)", files)


def replace_general(
    connection: sqlite3.Connection, general: GeneralInfo, files: Sequence[GeneralFile]
) -> None:
    """Put the description of another base model, and of its files, in the place of the present one."""
    connection.execute("DELETE FROM general")
    connection.execute("DELETE FROM general_files")
    write_general(connection, general, files)


def insert_domain(connection: sqlite3.Connection, domain: DomainInfo) -> None:
    """Add a domain's row."""
    _insert(connection, "domains", _domain_row(domain))


def insert_tenant(connection: sqlite3.Connection, tenant: TenantInfo, *, pinned: bool) -> None:
    """Add a tenant's row."""
    row = tenant.model_dump(exclude={"domain"}) | {
        "pinned": pinned,
        "labels": json.dumps(tenant.labels),
        "card": json.dumps(tenant.card),
        "created": tenant.created.isoformat(),
    }
    _insert(connection, "tenants", row)


def insert_traffic(connection: sqlite3.Connection, traffic: TrafficInfo) -> None:
    """Add the row of a file of traffic."""
    _insert(connection, "traffic", traffic.model_dump())


def replace_domain(connection: sqlite3.Connection, domain: DomainInfo) -> None:
    """Change a domain's row; updated in place, as deleting it would take the domain's traffic with it."""
    row = _domain_row(domain)
    assignments = ", ".join(f"{column} = ?" for column in row)
    connection.execute(f"UPDATE domains SET {assignments} WHERE id = ?", (*row.values(), domain.id))


def has_name(connection: sqlite3.Connection, table: str, name: str) -> bool:
    """Return whether a table has a row of this name."""
    return connection.execute(f"SELECT 1 FROM {table} WHERE name = ?", (name,)).fetchone() is not None


def has_domain(connection: sqlite3.Connection, domain_id: int) -> bool:
    """Return whether there is a domain of this id."""
    return connection.execute("SELECT 1 FROM domains WHERE id = ?", (domain_id,)).fetchone() is not None


def other_domains_below(connection: sqlite3.Connection, domain_ids: Sequence[int]) -> list[str]:
    """Return the names of domains whose parent is among ``domain_ids`` and that are not themselves."""
    given = "(SELECT value FROM json_each(?1))"
    found = connection.execute(
        f"SELECT name FROM domains WHERE parent_id IN {given} AND id NOT IN {given} ORDER BY name",
        (json.dumps(list(domain_ids)),),
    )
    return [str(row["name"]) for row in found]


def domain_state(domain: DomainInfo) -> tuple[object, ...]:
    """Return what changes whenever a domain does."""
    return domain.id, domain.parent_id, domain.generation, domain.layer_identity


def check_newer(previous: DomainInfo | TenantInfo, info: DomainInfo | TenantInfo) -> None:
    """Raise :class:`StoreBusyError` where an entry has meanwhile got a generation that is not older."""
    if info.generation <= previous.generation:
        raise StoreBusyError(
            f"{info.name!r} was replaced by another process meanwhile ("
            f"generation {previous.generation} is not older than {info.generation}); try again"
        )


def _domain_row(domain: DomainInfo) -> dict[str, object]:
    return domain.model_dump(exclude={"parent"}) | {
        "layers": domain.layers.model_dump_json() if domain.layers else None,
        "previous": domain.previous.model_dump_json() if domain.previous else None,
        "card": json.dumps(domain.card),
        "created": domain.created.isoformat(),
    }


def _insert(connection: sqlite3.Connection, table: str, row: dict[str, object]) -> None:
    places = ", ".join("?" * len(row))
    connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", tuple(row.values()))
