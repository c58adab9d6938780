"""Read-only mappings over the catalog's tables that never load a whole table.

Of tenants, which every request asks for, what was read is kept until the catalog changes in any way, by this
process or another. SQLite tells that in microseconds (:attr:`Database.version`), a tenth of a look into it.
"""

from __future__ import annotations

import difflib
import json
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, ValuesView
from contextlib import suppress
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError

from hmi_engine.errors import HmiError, StoreCorruptError, UnknownDomainError, UnknownTenantError
from hmi_engine.knowledge.database import Database
from hmi_engine.knowledge.records import DomainInfo, TenantInfo

__all__ = ["DomainView", "TenantView"]

_PAGE_ROWS = 500
_SUGGESTION_POOL = 5000
_FIRST_VERSION_WITH_PINS = 3

MAX_KEPT_BYTES = 64 << 20
"""Of tenants' infos in memory, about: some 20,000 with short cards."""

# Measured with tracemalloc: an info with an empty card, and JSON of numbers as Python objects.
_BYTES_OF_INFO = 3000
_BYTES_PER_LETTER = 10

_AFTER_ALL_NAMES = "\U0010ffff"

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
        return self.count()

    def __contains__(self, name: object) -> bool:
        return _is_text(name) and bool(
            self._database.query(f"SELECT 1 FROM {self._table} WHERE name = ?", (name,))
        )

    def __iter__(self) -> Iterator[str]:
        return (str(row["name"]) for row in self._pages(f"SELECT own.name FROM {self._table} own"))

    def __getitem__(self, name: str) -> Info:
        return self._info(self._row(name))

    def count(self, prefix: str = "") -> int:
        """Return how many names begin with ``prefix``."""
        if not prefix:
            return int(self._database.query(f"SELECT count(*) FROM {self._table}")[0][0])
        if not _is_text(prefix):
            return 0
        statement = f"SELECT count(*) FROM {self._table} WHERE name >= ? AND name < ?"
        return int(self._database.query(statement, (prefix, prefix + _AFTER_ALL_NAMES))[0][0])

    def get(self, name: str, default: Any = None) -> Any:
        """Return the info of ``name``, or ``default`` where there is none."""
        try:
            return self[name]
        except self._unknown:
            return default

    def values(self) -> ValuesView[Info]:
        """Return all infos in the order of names, read in pages."""
        return _InfoValues(self)

    def iterate_infos(self, prefix: str = "") -> Iterator[Info]:
        """Yield the infos whose names begin with ``prefix``, in the order of names, read in pages.

        Changes meanwhile are seen or not, none is seen twice.
        """
        return map(self._info, self._pages(self._select, prefix) if _is_text(prefix) else ())

    def _pages(self, select: str, prefix: str = "") -> Iterator[sqlite3.Row]:
        # Paging by the last name holds no lock and no read transaction between pages.
        comparison, last = ">=", prefix
        while rows := self._database.query(
            f"{select} WHERE own.name {comparison} ? AND own.name < ? ORDER BY own.name LIMIT {_PAGE_ROWS}",
            (last, prefix + _AFTER_ALL_NAMES),
        ):
            yield from rows
            comparison, last = ">", rows[-1]["name"]

    def _row(self, name: str) -> sqlite3.Row:
        rows = self._database.query(f"{self._select} WHERE own.name = ?", (name,)) if _is_text(name) else []
        if not rows:
            raise self._unknown(self._explain_missing(name))
        return rows[0]

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


def _is_text(name: object) -> bool:
    """Return whether ``name`` is text that SQLite takes: a lone surrogate, as JSON may have, is not."""
    if not isinstance(name, str):
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


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

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._known = _Known(None)

    def __len__(self) -> int:
        """Return how many tenants there are."""
        known = self._current()
        if known.count is None:
            known.count = self.count()
        return known.count

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tenant of this name."""
        return name in self._current().infos or super().__contains__(name)

    def __getitem__(self, name: str) -> TenantInfo:
        """Return the info of a tenant as it is now."""
        known = self._current()
        info = known.infos.get(name)
        if info is None:
            row = self._row(name)
            info = self._info(row)
            known.keep(info, row)
        return info

    def find(self, names: Iterable[str]) -> dict[str, TenantInfo]:
        """Return those of ``names`` that are in the store, by one look at the catalog's version for all.

        Damaged entries are left out: ``[name]`` tells what is wrong with them.
        """
        known = self._current()
        found: dict[str, TenantInfo] = {}
        missing: list[str] = []
        for name in dict.fromkeys(names):
            info = known.infos.get(name)
            if info is not None:
                found[name] = info
            elif _is_text(name):
                missing.append(name)
        if missing:
            statement = f"{self._select} WHERE own.name IN (SELECT value FROM json_each(?))"
            for row in self._database.query(statement, (json.dumps(missing),)):
                with suppress(StoreCorruptError):
                    info = found[row["name"]] = self._info(row)
                    known.keep(info, row)
        return found

    def existing_names(self, names: Iterable[str]) -> set[str]:
        """Return those of ``names`` that are in the store, by one query; damaged entries count."""
        statement = "SELECT name FROM tenants WHERE name IN (SELECT value FROM json_each(?))"
        return {str(row["name"]) for row in self._database.query(statement, (json.dumps(list(names)),))}

    def existing_ids(self, ids: Iterable[int]) -> set[int]:
        """Return those of ``ids`` that are in the store; who replaces a tenant has another id."""
        statement = "SELECT id FROM tenants WHERE id IN (SELECT value FROM json_each(?))"
        return {int(row["id"]) for row in self._database.query(statement, (json.dumps(list(ids)),))}

    def pinned(self) -> list[TenantInfo]:
        """Return the tenants that engines keep in memory, by name; found by an index of their own."""
        if self._database.stored_version < _FIRST_VERSION_WITH_PINS:
            return []
        return [
            self._info(row)
            for row in self._database.query(f"{self._select} WHERE own.pinned ORDER BY own.name")
        ]

    def _current(self) -> _Known:
        """Return what is known of the catalog as it is now: nothing, after any change."""
        version = self._database.committed_version
        if version is None:
            return _Known(None)
        known = self._known
        if known.version != version:
            # A new object, so that a thread that reads for the version before does not fill this one.
            known = self._known = _Known(version)
        return known

    def _parse(self, row: sqlite3.Row) -> TenantInfo:
        decoded = {"card": json.loads(row["card"]), "labels": tuple(json.loads(row["labels"]))}
        return TenantInfo.model_validate(dict(row) | decoded)


class _Known:
    """Infos of one version of the catalog; what was kept first goes first when they take too much memory."""

    def __init__(self, version: tuple[int, int] | None) -> None:
        self.version = version
        self.infos: dict[str, TenantInfo] = {}
        self.count: int | None = None
        self._bytes: dict[str, int] = {}
        self._total_bytes = 0
        self._lock = threading.Lock()

    def keep(self, info: TenantInfo, row: sqlite3.Row) -> None:
        """Keep an info that was read when the catalog had this version or a later one."""
        size = _BYTES_OF_INFO + _BYTES_PER_LETTER * (len(row["card"]) + len(row["labels"]))
        with self._lock:
            if info.name in self.infos or size > MAX_KEPT_BYTES:
                return
            self.infos[info.name] = info
            self._bytes[info.name] = size
            self._total_bytes += size
            while self._total_bytes > MAX_KEPT_BYTES:
                first = next(iter(self.infos))
                del self.infos[first]
                self._total_bytes -= self._bytes.pop(first)
