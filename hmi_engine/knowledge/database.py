"""The catalog's SQLite file: how it is made, opened and locked, and what its errors mean to a person."""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from hmi_engine.errors import (
    ReadOnlyStoreError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreNotFoundError,
    StoreVersionError,
)
from hmi_engine.knowledge.atomic import atomic_write

__all__ = ["FORMAT_VERSION", "Database", "create_database"]

FORMAT_VERSION = 3
_APPLICATION_ID = 0x484D4953  # "HMIS"
_BUSY_SECONDS = 10.0
_SETTLE_SECONDS = 0.5
_SETTLE_INTERVAL_SECONDS = 0.02

_SCHEMA = """
CREATE TABLE general (id INTEGER PRIMARY KEY CHECK (id = 1), info TEXT NOT NULL);
CREATE TABLE general_files (name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, last INTEGER NOT NULL);
INSERT INTO counters VALUES ('number', 0);
CREATE TABLE domains (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, parent_id INTEGER REFERENCES domains (id),
    generation INTEGER NOT NULL, file TEXT UNIQUE, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL,
    rows INTEGER NOT NULL, unigrams INTEGER NOT NULL, layer_identity TEXT NOT NULL,
    corpus_tokens INTEGER NOT NULL, min_count INTEGER NOT NULL, admission_count INTEGER NOT NULL,
    plot_bytes INTEGER NOT NULL, row_format TEXT NOT NULL, layers TEXT, previous TEXT,
    created TEXT NOT NULL, card TEXT NOT NULL);
CREATE INDEX domains_by_parent ON domains (parent_id);
CREATE TABLE traffic (
    id INTEGER PRIMARY KEY, domain_id INTEGER NOT NULL REFERENCES domains (id) ON DELETE CASCADE,
    file TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, tokens INTEGER NOT NULL);
CREATE INDEX traffic_by_domain ON traffic (domain_id);
CREATE TABLE tenants (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, domain_id INTEGER NOT NULL REFERENCES domains (id),
    kind TEXT NOT NULL, rank INTEGER NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL,
    generation INTEGER NOT NULL, file TEXT NOT NULL UNIQUE, head_kind TEXT NOT NULL, labels TEXT NOT NULL,
    card TEXT NOT NULL, created TEXT NOT NULL, pinned INTEGER NOT NULL DEFAULT 0);
CREATE INDEX tenants_by_domain ON tenants (domain_id);
CREATE INDEX pinned_tenants ON tenants (name) WHERE pinned;
"""

_UPGRADES = {
    2: (
        "ALTER TABLE tenants ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX pinned_tenants ON tenants (name) WHERE pinned",
    ),
}
"""What makes a catalog of each former version one of the next."""


def create_database(path: Path, fill: Callable[[sqlite3.Connection], None]) -> None:
    """Make a catalog file atomically: the schema, then what ``fill`` inserts. Raises as ``atomic_write``."""

    def write(partial: Path) -> None:
        with _explained(path):
            connection = sqlite3.connect(partial)
            try:
                connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
                with connection:
                    fill(connection)
            finally:
                connection.close()

    atomic_write(path, write)


class _FileState(NamedTuple):
    """What changes with every change of a file."""

    inode: int
    bytes: int
    changed_ns: int


def _state_of(path: Path) -> _FileState | None:
    """Return a file's state, None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _FileState(found.st_ino, found.st_size, found.st_mtime_ns)


class Database:
    """One connection to a catalog, shared by all threads of the process under one lock.

    A catalog of a former version is upgraded when it is opened for writing. Opened read-only it stays as it
    is: columns of later versions are missing then, and infos have their defaults.

    Raises :class:`StoreNotFoundError` where there is no catalog, :class:`StoreVersionError` where a newer HMI
    wrote it and :class:`StoreCorruptError` where it is no catalog of HMI.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        self.read_only = read_only
        self._log = path.with_name(f"{path.name}-wal")
        self._lock = threading.RLock()
        # Of a file that is read as it lies there: it and its log, as they were when it was opened.
        self._seen: tuple[_FileState | None, _FileState | None] | None = None
        self._times_reopened = 0
        if not path.is_file():
            raise StoreNotFoundError(
                f"{path.parent} is no store: {path.name} is missing. Create one with "
                f"`hmi init {path.parent} --general MODEL` or hmi_engine.Store.create"
            )
        with _explained(path):
            self._connection = self._connect()
        try:
            self._check_version()
        except BaseException:
            self._connection.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        # By its bytes: a name need not be UTF-8.
        uri = f"file:{quote(os.fsencode(self.path.absolute()))}?mode={'ro' if self.read_only else 'rw'}"
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            connection = self._open(uri)
            try:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                self._seen = None
                return connection
            except sqlite3.OperationalError as error:
                connection.close()
                is_without_memory = any(
                    part in str(error) for part in ("unable to open", "readonly database")
                )
                if not self.read_only or not is_without_memory:
                    raise
                # WAL needs a shared-memory file beside the catalog. Where this user cannot make one, and no
                # writer has, SQLite may read the file alone, as long as it stays as it is.
                seen = self._state()
                if seen[1] is None or not seen[1].bytes:
                    self._seen = seen
                    return self._open(f"{uri}&immutable=1")
                # A log without that memory: a writer comes or goes just now, or was killed elsewhere.
                if time.monotonic() > deadline:
                    raise
            time.sleep(_SETTLE_INTERVAL_SECONDS)

    def _state(self) -> tuple[_FileState | None, _FileState | None]:
        """Return what the file and its log are like now."""
        return _state_of(self.path), _state_of(self._log)

    def _follow(self) -> None:
        """Open a file anew that is read as it lies there and has changed since."""
        if self._seen is None or self._connection.in_transaction:
            return
        if self._seen != self._state():
            former = self._connection
            self._connection = self._connect()
            self._times_reopened += 1
            former.close()

    def _open(self, uri: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        return connection

    def _check_version(self) -> None:
        with _explained(self.path):
            (application_id,) = self._connection.execute("PRAGMA application_id").fetchone()
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if application_id != _APPLICATION_ID:
                raise StoreCorruptError(f"{self.path} is an SQLite file, but no catalog of an HMI store")
            if version > FORMAT_VERSION:
                raise StoreVersionError(
                    f"{self.path.parent} was written in store format {version}; this HMI reads up to "
                    f"{FORMAT_VERSION}. Upgrade HMI: pip install --upgrade hmi"
                )
            if version < min(_UPGRADES):
                raise StoreVersionError(
                    f"{self.path.parent} was written by an earlier, unreleased HMI (store format {version}); "
                    "make the store again"
                )
            self._connection.execute("PRAGMA foreign_keys = ON")
            if not self.read_only:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
        if version < FORMAT_VERSION and not self.read_only:
            self._upgrade()

    def _upgrade(self) -> None:
        with self.transaction() as connection:
            # Asked again under the lock: another process may have done it meanwhile.
            for version in range(self.stored_version, FORMAT_VERSION):
                for statement in _UPGRADES[version]:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")

    @property
    def stored_version(self) -> int:
        """Version of the catalog's format as it is on the disk now."""
        return int(self.query("PRAGMA user_version")[0][0])

    def close(self) -> None:
        """Close the connection; other calls then raise :class:`StoreError`."""
        with self._lock:
            self._seen = None
            self._connection.close()

    def query(self, statement: str, parameters: tuple[object, ...] = ()) -> list[sqlite3.Row]:
        """Return all rows of a SELECT."""
        with self._lock, _explained(self.path):
            self._follow()
            return self._connection.execute(statement, parameters).fetchall()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that the body reads, :attr:`version` too, is of one state of the file; others may write on."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            self.query("BEGIN")
            try:
                yield
            finally:
                self.query("COMMIT")

    @property
    def version(self) -> tuple[int, int]:
        """What changes with every change of the file: by other connections, and by this one."""
        with self._lock:
            try:  # not by the context manager, which would cost a quarter of this
                if self._seen is not None:
                    self._follow()
                if self._seen is not None:
                    return 0, self._times_reopened  # SQLite's own changes with every statement then
                (others,) = self._connection.execute("PRAGMA data_version").fetchone()
                return others, self._connection.total_changes + self._times_reopened
            except sqlite3.Error as error:
                raise _explain(error, self.path) from error

    @property
    def committed_version(self) -> tuple[int, int] | None:
        """:attr:`version`; None in a transaction of this thread, as what it sees may yet be undone."""
        with self._lock:
            version = self.version
            return None if self._connection.in_transaction else version

    def integrity_problems(self) -> list[str]:
        """Return what SQLite's own checks find wrong with the file; empty if it is sound."""
        try:
            checks = self.query("PRAGMA integrity_check")
            dangling = self.query("PRAGMA foreign_key_check")
        except StoreCorruptError as error:
            return [str(error)]
        found = [str(row[0]) for row in checks if row[0] != "ok"]
        return found + [
            f"row {row['rowid']} of {row['table']} refers to a missing row of {row['parent']}"
            for row in dangling
        ]

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the body as one transaction: all of it is on the disk afterwards, or, on an error, none of it.

        Raises :class:`StoreBusyError` if another process writes for longer than ten seconds,
        :class:`StoreFullError` and :class:`ReadOnlyStoreError`.
        """
        if self.read_only:
            raise ReadOnlyStoreError(
                f"{self.path.parent} was opened with read_only=True; open it for writing"
            )
        with self._lock, _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


_MEANINGS = (
    ("database is locked", StoreBusyError, "another process is writing to the store; try again later"),
    (
        "disk is full",
        StoreFullError,
        "no room for the catalog. Nothing of this change was kept; free some space and try again",
    ),
    (
        "readonly database",
        ReadOnlyStoreError,
        "the catalog cannot be written; check the folder's permissions",
    ),
    ("unable to open", ReadOnlyStoreError, "the catalog cannot be opened; check the folder's permissions"),
    ("malformed", StoreCorruptError, "the catalog is damaged; run `hmi verify`, restore it from a copy"),
    ("not a database", StoreCorruptError, "the catalog is damaged; run `hmi verify`, restore it from a copy"),
)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as ours."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explain(error, path) from error


def _explain(error: sqlite3.Error, path: Path) -> StoreError:
    """Return ours for an error of SQLite. Told apart by text: codes reach Python only from 3.11 on."""
    text = str(error)
    for part, error_type, meaning in _MEANINGS:
        if part in text:
            return error_type(f"{path}: {meaning} (SQLite: {text})")
    return StoreError(f"{path}: SQLite: {text}")
