"""The catalog: which domains and tenants exist, and which files hold them.

A file is written first and named by numbers from :meth:`Catalog.reserve`, which are never given twice; the
catalog's commit then makes it part of the store. A crash between the two leaves an orphan file, never a
catalog entry without its file.
"""

import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from hmi_engine.errors import (
    GeneralChangedError,
    GeneralInUseError,
    ReadOnlyStoreError,
    StoreBusyError,
    StoreCorruptError,
    StoreExistsError,
    TenantExistsError,
    UnknownDomainError,
)
from hmi_engine.knowledge.catalog_rows import (
    check_newer,
    has_domain,
    has_name,
    insert_domain,
    insert_tenant,
    insert_traffic,
    replace_domain,
    replace_general,
    write_general,
)
from hmi_engine.knowledge.catalog_views import DomainView, TenantView
from hmi_engine.knowledge.database import Database, create_database
from hmi_engine.knowledge.domain_checks import (
    check_nothing_else_below,
    check_parent,
    check_place,
    check_removable,
    check_unchanged,
    check_unused_name,
)
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.inheritance import inheritance_chain
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.locks import WriterLock
from hmi_engine.knowledge.names import check_name
from hmi_engine.knowledge.records import DomainChange, DomainInfo, GeneralFile, TenantInfo, TrafficInfo
from hmi_engine.knowledge.tensor_file import file_sha256

__all__ = ["ROOT_DOMAIN", "Catalog", "DomainInfo", "GeneralFile", "TenantInfo"]

ROOT_DOMAIN = "general"
"""Name of the root of the domain tree, which every store has."""


class Catalog:
    """The open catalog of one store; usable by many threads, and as a context manager that closes it.

    ``tenants`` and ``domains`` are read-only mappings from name to info that always show the current state.
    A Catalog must not be carried over ``os.fork``: open one in the child.
    """

    def __init__(self, layout: StoreLayout, *, read_only: bool = False) -> None:
        """Open the store at ``layout``; :meth:`open` documents what is raised."""
        self.layout = layout
        self.read_only = read_only
        self._database = Database(layout.catalog, read_only=read_only)
        try:
            self._lock = None if read_only else WriterLock(layout.lock)
        except BaseException:
            self._database.close()
            raise
        # Held from the writing of a file to its commit, so that no repair of this process runs between.
        self.change_lock = threading.RLock()
        # Written by changes of this process long before they commit: no orphans.
        self.files_in_the_making: set[str] = set()
        # What the arenas of this process' engines on the store hold, by engine: no larger tenant is added.
        self.arena_bytes = weakref.WeakKeyDictionary[object, int]()
        # The base model that the opener makes tenants for, where it says so: none is added to another one.
        self.expected_general: GeneralInfo | None = None
        self.tenants = TenantView(self._database)
        self.domains = DomainView(self._database)

    @classmethod
    def create(cls, layout: StoreLayout, general: GeneralInfo) -> "Catalog":
        """Make the catalog of a new store, whose ``general/`` folder is complete, and open it.

        The files in ``general/`` are recorded with their checksums, and the root domain is made. Raises
        :class:`StoreExistsError` if there is a catalog, :class:`UnsupportedModelError` where ``general`` does
        not fit the formats, and as ``atomic_write``.
        """
        if layout.catalog.exists():
            raise StoreExistsError(f"{layout.root} is a store already; open it, or choose another folder")
        general.check_supported()
        files = _describe_files(layout.general_folder(general.folder))
        root = DomainInfo.without_table(
            id=1,
            name=ROOT_DOMAIN,
            parent_id=None,
            parent=None,
            generation=0,
            layer_identity=general.domain_layers,
            min_count=0,
            plot_bytes=0,
            row_format=general.row_dtype,
        )

        def fill(connection: sqlite3.Connection) -> None:
            write_general(connection, general, files)
            insert_domain(connection, root)
            connection.execute("UPDATE counters SET last = 1 WHERE name = 'number'")

        create_database(layout.catalog, fill)
        return cls(layout)

    @classmethod
    def open(cls, layout: StoreLayout, *, read_only: bool = False) -> "Catalog":
        """Open the catalog of a store.

        Raises :class:`StoreNotFoundError` where there is none, :class:`StoreVersionError` where a newer HMI
        wrote it, :class:`StoreCorruptError` where it is damaged, :class:`StoreBusyError` while a repair runs.
        """
        return cls(layout, read_only=read_only)

    def close(self) -> None:
        """Close the catalog; does nothing the second time."""
        self._database.close()
        if self._lock:
            self._lock.release()

    def __enter__(self) -> "Catalog":
        """Return the catalog itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the catalog."""
        self.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other writers out; raises :class:`StoreBusyError` while another one has the store open."""
        if self._lock is None:
            raise ReadOnlyStoreError(
                f"{self.layout.root} was opened with read_only=True; open it for writing"
            )
        with self._lock.alone():
            yield

    def is_quiet(self) -> bool:
        """Return whether nobody is writing: every file that no entry refers to now was left by a crash.

        False while another process has the store open for writing, or a thread of this one changes it.
        """
        if self._lock is None:
            return not WriterLock.is_held(self.layout.lock)
        if not self.change_lock.acquire(blocking=False):
            return False
        try:
            with self._lock.alone():
                return True
        except StoreBusyError:
            return False
        finally:
            self.change_lock.release()

    @property
    def version(self) -> tuple[int, int]:
        """What changes with every change of the catalog, by this process or another; read in microseconds."""
        return self._database.version

    def snapshot(self) -> AbstractContextManager[None]:
        """For a with-statement, in which all that is read is of one state of the catalog."""
        return self._database.snapshot()

    @property
    def general(self) -> GeneralInfo:
        """Description of the base model."""
        rows = self._database.query("SELECT info FROM general")
        try:
            return GeneralInfo.model_validate_json(rows[0]["info"])
        except (IndexError, ValidationError) as error:
            raise StoreCorruptError(
                f"{self.layout.catalog}: no valid description of the base model"
            ) from error

    def check_general(self, general: GeneralInfo) -> None:
        """Raise :class:`GeneralChangedError` where ``general`` is not the base model any more."""
        if self.general != general:
            raise GeneralChangedError(
                f"the base model of {self.layout.root} was distilled since the store was opened: open the "
                "store and its engines again"
            )

    def general_files(self) -> list[GeneralFile]:
        """Return the recorded files of the ``general/`` folder, by name."""
        rows = self._database.query("SELECT name, bytes, sha256 FROM general_files ORDER BY name")
        return [GeneralFile(*row) for row in rows]

    def set_general(self, general: GeneralInfo) -> None:
        """Replace the description of the base model and record the files of ``general/`` anew."""
        general.check_supported()
        files = _describe_files(self.layout.general_folder(general.folder))
        with self._database.transaction() as connection:
            replace_general(connection, general, files)

    def reserve(self, count: int = 1) -> range:
        """Return ``count`` numbers, larger than all before and never given again: ids and generations."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE counters SET last = last + ? WHERE name = 'number'", (count,))
            (last,) = connection.execute("SELECT last FROM counters WHERE name = 'number'").fetchone()
        return range(last - count + 1, last + 1)

    def add_domain(self, domain: DomainInfo) -> None:
        """Add a node to the tree.

        Raises :class:`DomainExistsError`, :class:`InvalidNameError`, and :class:`UnknownDomainError` if there
        is no such parent.
        """
        with self._database.transaction() as connection:
            self._insert_domain(connection, domain)

    def replace_domain(self, domain: DomainInfo) -> DomainInfo:
        """Replace what is known of a node, found by name; return what it was. Id and parent stay.

        Raises :class:`UnknownDomainError`, and :class:`StoreBusyError` if the node has meanwhile got a
        generation that is not older.
        """
        with self._database.transaction() as connection:
            previous = self.domains[domain.name]
            if (previous.id, previous.parent_id) != (domain.id, domain.parent_id):
                raise StoreBusyError(
                    f"domain {domain.name!r} was removed and made again meanwhile; try again"
                )
            check_newer(previous, domain)
            replace_domain(connection, domain)
        return previous

    def commit_domains(
        self,
        changes: Sequence[DomainChange],
        *,
        unchanged: Sequence[DomainInfo] = (),
        replanned: Sequence[DomainInfo] = (),
        taken_traffic: Sequence[int] = (),
        general: GeneralInfo | None = None,
    ) -> None:
        """Put new states of domains in place, all of them or none; traffic that was taken in is forgotten.

        ``unchanged`` are further domains that the change was planned from; those of them that are gone had no
        children, and count for nothing. Of ``replanned`` domains the change has planned the children too, so
        that no others may have come below them. With ``general`` that base model, whose folder is complete,
        takes the place of the present one.

        Raises :class:`DomainExistsError`, :class:`UnknownDomainError` where a domain's parent is gone,
        :class:`StoreBusyError` where a domain is not any more what the change was planned from, and
        :class:`DomainCycleError` where a domain would be below itself, and :class:`GeneralInUseError` where
        the present base model has tenants.
        """
        files = _describe_files(self.layout.general_folder(general.folder)) if general else []
        with self._database.transaction() as connection:
            if general:
                self.check_no_tenants()
                replace_general(connection, general, files)
            for change in changes:
                if change.before is None:
                    self._insert_domain(connection, change.after)
                    continue
                check_unchanged(self.domains, change.before)
                if change.after.parent_id is not None:
                    check_parent(connection, change.after)
                replace_domain(connection, change.after)
            for change in changes:
                check_place(self.domains, change.after)
            changed = {change.after.name for change in changes}
            for info in unchanged:
                if info.name not in changed and info.name in self.domains:
                    check_unchanged(self.domains, info)
            check_nothing_else_below(connection, replanned)
            connection.executemany("DELETE FROM traffic WHERE id = ?", [(id,) for id in taken_traffic])

    def check_no_tenants(self) -> None:
        """Raise :class:`GeneralInUseError` where there are tenants: adapters fit one base model only."""
        if len(self.tenants):
            raise GeneralInUseError(
                f"{self.layout.root} has {len(self.tenants)} tenants, whose adapters fit its present base "
                f"model only (the first is {next(iter(self.tenants))!r}): distil before tenants are added, "
                "or give one domain its own layers (--domain)"
            )

    def _insert_domain(self, connection: sqlite3.Connection, domain: DomainInfo) -> None:
        check_unused_name(connection, domain.name, self.layout.root)
        check_parent(connection, domain)
        insert_domain(connection, domain)

    def add_traffic(self, traffic: TrafficInfo) -> None:
        """Note a file of a domain's traffic; raises :class:`UnknownDomainError` if the domain is gone."""
        with self._database.transaction() as connection:
            if not has_domain(connection, traffic.domain_id):
                raise UnknownDomainError(f"the domain of {traffic.file} is not in the store any more")
            insert_traffic(connection, traffic)

    def traffic_files(self) -> list[TrafficInfo]:
        """Return the files of traffic that no update has taken in yet, of all domains, oldest first."""
        rows = self._database.query(
            "SELECT id, domain_id, file, bytes, sha256, tokens FROM traffic ORDER BY id"
        )
        return [TrafficInfo.model_validate(dict(row)) for row in rows]

    def remove_traffic(self, numbers: Sequence[int]) -> None:
        """Remove entries of traffic by their ids; unknown ones count as removed. The files stay."""
        with self._database.transaction() as connection:
            connection.executemany("DELETE FROM traffic WHERE id = ?", [(number,) for number in numbers])

    def remove_domain(self, name: str) -> DomainInfo:
        """Remove a node and return what it was.

        Raises :class:`UnknownDomainError`, and :class:`DomainInUseError` for the root and for a node that has
        tenants or children.
        """
        with self._database.transaction() as connection:
            domain = self.domains[name]
            check_removable(connection, domain)
            connection.execute("DELETE FROM domains WHERE id = ?", (domain.id,))
        return domain

    def add_tenants(self, tenants: Sequence[TenantInfo], *, replace: bool = False) -> list[TenantInfo]:
        """Add tenants in one transaction: all or none. Return the entries that were replaced.

        Who replaces a pinned tenant is pinned too. Raises :class:`TenantExistsError` for a name in use unless
        ``replace``, :class:`UnknownDomainError`, :class:`InvalidNameError`, :class:`GeneralChangedError`
        where the base model is not ``expected_general`` any more, and :class:`StoreBusyError` if another
        process has meanwhile put in a newer generation.
        """
        replaced: list[TenantInfo] = []
        with self._database.transaction() as connection:
            if self.expected_general is not None:
                self.check_general(self.expected_general)
            for tenant in tenants:
                check_name(tenant.name)
                if not has_domain(connection, tenant.domain_id):
                    raise UnknownDomainError(
                        f"domain {tenant.domain!r} of tenant {tenant.name!r} is not in the store"
                    )
                pinned = tenant.pinned
                if has_name(connection, "tenants", tenant.name):
                    replaced.append(self._make_room(connection, tenant, replace))
                    pinned = pinned or replaced[-1].pinned
                insert_tenant(connection, tenant, pinned=pinned)
        return replaced

    def _make_room(self, connection: sqlite3.Connection, tenant: TenantInfo, replace: bool) -> TenantInfo:
        if not replace:
            raise TenantExistsError(
                f"tenant {tenant.name!r} is in {self.layout.root} already; put another in its "
                "place with replace=True (--replace)"
            )
        previous = self.tenants[tenant.name]
        check_newer(previous, tenant)
        connection.execute("DELETE FROM tenants WHERE id = ?", (previous.id,))
        return previous

    def remove_tenants(self, names: Iterable[str]) -> list[TenantInfo]:
        """Remove tenants in one transaction and return what they were; raises :class:`UnknownTenantError`."""
        removed = []
        with self._database.transaction() as connection:
            for name in names:
                tenant = self.tenants[name]
                connection.execute("DELETE FROM tenants WHERE id = ?", (tenant.id,))
                removed.append(tenant)
        return removed

    def pin_tenant(self, name: str, pinned: bool) -> TenantInfo:
        """Note whether engines shall keep a tenant in memory; return it as it is now.

        Raises :class:`UnknownTenantError`.
        """
        with self._database.transaction() as connection:
            tenant = self.tenants[name]
            connection.execute("UPDATE tenants SET pinned = ? WHERE id = ?", (pinned, tenant.id))
        return tenant.model_copy(update={"pinned": pinned})

    def files(self) -> list[str]:
        """Return the relative paths of all files that entries refer to, as the entries have them."""
        rows = self._database.query("SELECT file FROM tenants UNION ALL SELECT file FROM traffic")
        domains = self.domains.values()
        of_domains = [file for info in domains for file in (info.plot_file(), info.previous, info.layers)]
        return [str(row["file"]) for row in rows] + [file.file for file in of_domains if file]

    def chain(self, domain: str) -> list[DomainInfo]:
        """Return the nodes to search for a row, from ``domain`` towards the root.

        Only ancestors of the same layer identity belong to it: where the domain layers change, the rows do.
        Raises :class:`UnknownDomainError`, and :class:`StoreCorruptError` if the tree has a loop.
        """
        return inheritance_chain(domain, self.domains.__getitem__)

    def integrity_problems(self) -> list[str]:
        """Return what SQLite's own checks find wrong with the catalog; empty if it is sound."""
        return self._database.integrity_problems()


def _describe_files(folder: Path) -> list[GeneralFile]:
    return [
        GeneralFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
