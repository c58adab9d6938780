"""Read-only mappings over the catalog's tables that never load a whole table."""

import difflib
import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, ValuesView
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError

from hmi_engine.errors import HmiError, StoreCorruptError, UnknownDomainError, UnknownTenantError
from hmi_engine.knowledge.database import Database
from hmi_engine.knowledge.records import DomainInfo, TenantInfo

__all__ = ["DomainView", "TenantView"]

_PAGE_ROWS = 500
_SUGGESTION_POOL = 5000

Info = TypeVar("Info", DomainInfo, TenantInfo)


class _View(Mapping[str, Info], ABC, Generic[Info]):
    """Infos by name, in the order of names, read from the catalog as they are asked for."""

    _word: ClassVar[str]
    _table: ClassVar[str]
    _select: ClassVar[str]
    _unknown: ClassVar[type[HmiError]]

    def __init__(self, database: Database) -> None:
        self._database = database

    @abstractmethod
    def _parse(self, row: sqlite3.Row) -> Info:
        """Return a row of ``_select`` as an info."""

    def __len__(self) -> int:
        return int(self._database.query(f"SELECT count(*) FROM {self._table}")[0][0])

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(
            self._database.query(f"SELECT 1 FROM {self._table} WHERE name = ?", (name,))
        )

    def __iter__(self) -> Iterator[str]:
        return (str(row["name"]) for row in self._pages(f"SELECT name FROM {self._table}", "name"))

    def __getitem__(self, name: str) -> Info:
        rows = (
            self._database.query(f"{self._select} WHERE own.name = ?", (name,))
            if isinstance(name, str)
            else []
        )
        if not rows:
            raise self._unknown(self._explain_missing(name))
        return self._info(rows[0])

    def get(self, name: str, default: Any = None) -> Any:
        """Return the info of ``name``, or ``default`` where there is none."""
        try:
            return self[name]
        except self._unknown:
            return default

    def values(self) -> ValuesView[Info]:
        """Return all infos in the order of names, read in pages."""
        return _InfoValues(self)

    def iterate_infos(self) -> Iterator[Info]:
        """Yield all infos in the order of names; changes meanwhile are seen or not, none is seen twice."""
        return map(self._info, self._pages(self._select, "own.name"))

    def _pages(self, select: str, column: str) -> Iterator[sqlite3.Row]:
        # Paging by the last name holds no lock and no read transaction between pages.
        last = ""
        while rows := self._database.query(
            f"{select} WHERE {column} > ? ORDER BY {column} LIMIT {_PAGE_ROWS}", (last,)
        ):
            yield from rows
            last = rows[-1]["name"]

    def _info(self, row: sqlite3.Row) -> Info:
        try:
            return self._parse(row)
        except (ValidationError, ValueError) as error:
            raise StoreCorruptError(
                f"{self._database.path}: the entry of {self._word} {row['name']!r:.80} is damaged: {error}"
            ) from error

    def _explain_missing(self, name: object) -> str:
        store = self._database.path.parent
        names = [
            str(row["name"])
            for row in self._database.query(f"SELECT name FROM {self._table} LIMIT {_SUGGESTION_POOL}")
        ]
        if not names:
            return f"no {self._word} {name!r:.200} in {store}: it has none yet"
        close = difflib.get_close_matches(str(name)[:200], names, n=1)
        hint = (
            f"did you mean {close[0]!r}?" if close else f"`hmi {self._word} list {store}` shows those it has"
        )
        return f"no {self._word} {name!r:.200} in {store}; {hint}"


class _InfoValues(ValuesView[Info]):
    _mapping: _View[Info]

    def __iter__(self) -> Iterator[Info]:
        return self._mapping.iterate_infos()


class DomainView(_View[DomainInfo]):
    """The store's domains by name; ``[name]`` raises :class:`UnknownDomainError` with a suggestion."""

    _word = "domain"
    _table = "domains"
    _unknown = UnknownDomainError
    _select = (
        "SELECT own.*, other.name AS parent FROM domains own "
        "LEFT JOIN domains other ON own.parent_id = other.id"
    )

    def _parse(self, row: sqlite3.Row) -> DomainInfo:
        decoded = {name: json.loads(row[name]) for name in ("card", "layers", "previous") if row[name]}
        return DomainInfo.model_validate(dict(row) | decoded)


class TenantView(_View[TenantInfo]):
    """The store's tenants by name; ``[name]`` raises :class:`UnknownTenantError` with a suggestion."""

    _word = "tenant"
    _table = "tenants"
    _unknown = UnknownTenantError
    _select = (
        "SELECT own.*, other.name AS domain FROM tenants own JOIN domains other ON own.domain_id = other.id"
    )

    def existing_ids(self, ids: Iterable[int]) -> set[int]:
        """Return those of ``ids`` that are in the store; who replaces a tenant has another id."""
        statement = "SELECT id FROM tenants WHERE id IN (SELECT value FROM json_each(?))"
        return {int(row["id"]) for row in self._database.query(statement, (json.dumps(list(ids)),))}

    def pinned(self) -> list[TenantInfo]:
        """Return the tenants that engines keep in memory, by name."""
        return [info for info in self.values() if info.pinned]

    def _parse(self, row: sqlite3.Row) -> TenantInfo:
        decoded = {"card": json.loads(row["card"]), "labels": tuple(json.loads(row["labels"]))}
        return TenantInfo.model_validate(dict(row) | decoded)
