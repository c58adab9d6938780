"""Changes of a store, each of them all or nothing: write the files, commit the catalog, drop the old files.

A crash between two steps leaves the state before or after, and at most files that no entry refers to.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from hmi_engine.errors import HmiError, InvalidAdapterError, TenantExistsError
from hmi_engine.knowledge.adapters import Adapter
from hmi_engine.knowledge.atomic import fsync_folders, fsync_path, remove_quietly, storage_error
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.heads import Head
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.leftovers import remove_unused
from hmi_engine.knowledge.names import check_name
from hmi_engine.knowledge.parallel import map_in_threads
from hmi_engine.knowledge.plot_table import PlotTable, write_plot
from hmi_engine.knowledge.records import DomainInfo, TenantInfo, TrafficInfo
from hmi_engine.knowledge.tenant_file import write_tenant
from hmi_engine.knowledge.traffic_file import TrafficCounts, write_traffic

__all__ = [
    "TENANTS_PER_BATCH",
    "NewTenant",
    "remove_domain",
    "remove_tenants",
    "save_domain",
    "save_in_batches",
    "save_tenants",
    "save_traffic",
]

TENANTS_PER_BATCH = 500
"""In one transaction: enough that flushing 256 folders and the catalog weighs little."""

_FILES_PER_FLUSH = 16
"""Given to another thread at once: handing over costs as much as flushing a file."""

Progress = Callable[[str, int, int | None], None]
"""Called with the name of the step, the number done and that of all, None where it is not known."""


@dataclass(frozen=True, eq=False)
class NewTenant:
    """A tenant to be saved; ``card`` is what a person wants to know of it, as JSON values."""

    name: str
    domain: str
    adapter: Adapter
    head: Head
    card: Mapping[str, Any] = field(default_factory=dict)


def save_tenants(
    catalog: Catalog,
    tenants: Sequence[NewTenant],
    *,
    replace: bool = False,
    max_bytes: int | None = None,
    given_before: Set[str] = frozenset(),
) -> list[TenantInfo]:
    """Check and write tenants and put them into the catalog in one transaction: all of them or none.

    With ``replace``, tenants of these names are replaced, and a pinned one's successor is pinned; who has
    read an old one keeps it. A file of more than ``max_bytes`` is refused, and a name that is given twice or
    is among ``given_before``. Raises :class:`InvalidNameError`, :class:`UnknownDomainError`,
    :class:`InvalidAdapterError`, :class:`InvalidHeadError`, :class:`TenantExistsError`,
    :class:`StoreFullError`, :class:`StoreBusyError`.
    """
    with catalog.change_lock:
        numbers = catalog.reserve(len(tenants))
        try:
            infos = _write_tenants(catalog, tenants, numbers, replace, max_bytes, given_before)
        except BaseException:
            _remove_files(catalog.layout, numbers)
            raise
        try:
            replaced = catalog.add_tenants(infos, replace=replace)
        except Exception:  # not an interrupt, which may come when the commit is done
            _remove_files(catalog.layout, numbers)
            raise
    for info in replaced:
        remove_quietly(catalog.layout.resolve(info.file))
    kept_pins = {info.name for info in replaced if info.pinned}
    return [info.model_copy(update={"pinned": True}) if info.name in kept_pins else info for info in infos]


def _remove_files(layout: StoreLayout, numbers: range) -> None:
    for number in numbers:
        remove_quietly(layout.resolve(layout.tenant_file(number, number)))


def save_in_batches(
    catalog: Catalog,
    tenants: Iterable[NewTenant],
    *,
    replace: bool = False,
    batch: int | None = TENANTS_PER_BATCH,
    max_bytes: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Save tenants as :func:`save_tenants` does, ``batch`` of them in a transaction; return how many.

    Every batch is on the disk when the next is drawn from ``tenants``. An error leaves the batches before it
    in the store and nothing of its own; where it is one of :func:`save_tenants`, its message says how many
    tenants that is. ``batch=None`` makes one transaction of all.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}, must be at least 1")
    total = len(tenants) if isinstance(tenants, Sized) else None
    drawn = iter(tenants)
    names: set[str] = set()
    while group := list(islice(drawn, batch)):
        try:
            save_tenants(catalog, group, replace=replace, max_bytes=max_bytes, given_before=names)
        except HmiError as error:
            # Names are given once each, so there are as many of them as tenants.
            kept = (
                f"The {len(names)} tenants given before this batch are in the store" if names else "None is"
            )
            raise type(error)(f"{error} ({kept}; of this batch of {len(group)}, none is)") from error
        names.update(tenant.name for tenant in group)
        if progress:
            progress("adding tenants", len(names), total)
    return len(names)


def _check_given_once(tenants: Sequence[NewTenant], before: Set[str]) -> None:
    seen: set[str] = set()
    for tenant in tenants:
        check_name(tenant.name)
        if tenant.name in seen or tenant.name in before:
            raise TenantExistsError(f"tenant {tenant.name!r} is given twice")
        seen.add(tenant.name)


def _write_tenants(
    catalog: Catalog,
    tenants: Sequence[NewTenant],
    numbers: range,
    replace: bool,
    max_bytes: int | None,
    given_before: Set[str],
) -> list[TenantInfo]:
    """Check and write all files in this thread; others, which need little of Python, flush those before."""
    _check_given_once(tenants, given_before)
    if not replace:
        _check_new(catalog, tenants)
    # Read once: each is a query.
    general = catalog.general
    domains = {name: catalog.domains[name] for name in {tenant.domain for tenant in tenants}}
    infos: list[TenantInfo] = []
    folders: set[Path] = set()

    def written() -> Iterator[Path]:
        for tenant, number in zip(tenants, numbers, strict=True):
            tenant.adapter.validate(general)
            tenant.head.validate(general)
            _check_arenas(catalog, tenant)
            file = catalog.layout.tenant_file(number, number)
            path = catalog.layout.resolve(file)
            infos.append(_write_tenant(path, file, tenant, domains[tenant.domain], number, max_bytes))
            folders.add(path.parent)
            yield path

    paths = written()
    for _ in map_in_threads(_flush, iter(lambda: list(islice(paths, _FILES_PER_FLUSH)), [])):
        pass
    fsync_folders(folders, catalog.layout.root)
    return infos


def _check_new(catalog: Catalog, tenants: Sequence[NewTenant]) -> None:
    existing = catalog.tenants.existing_names(tenant.name for tenant in tenants)
    for tenant in tenants:
        if tenant.name in existing:
            raise TenantExistsError(
                f"tenant {tenant.name!r} is in {catalog.layout.root} already; replace it with replace=True "
                "(--replace)"
            )


def _check_arenas(catalog: Catalog, tenant: NewTenant) -> None:
    """Refuse what an engine that is open now could never hold, rather than at its first request."""
    smallest = min(list(catalog.arena_bytes.values()), default=None)
    if smallest is None:
        return
    elements = tenant.adapter.num_parameters + sum(part.numel() for part in tenant.head.tensors().values())
    if 4 * elements > smallest:
        raise InvalidAdapterError(
            f"tenant {tenant.name!r} takes {4 * elements} bytes of memory, more than all that an engine open "
            f"on this store has for tenants, {smallest} bytes; give it a smaller rank or fewer layers, or "
            "the engine more memory"
        )


def _write_tenant(
    path: Path, file: str, tenant: NewTenant, domain: DomainInfo, number: int, max_bytes: int | None
) -> TenantInfo:
    """Write one file; neither it nor its folder is flushed."""
    sha256 = write_tenant(path, tenant.adapter, tenant.head, sync=False)
    num_bytes = path.stat().st_size
    if max_bytes is not None and num_bytes > max_bytes:
        raise InvalidAdapterError(
            f"tenant {tenant.name!r} takes {num_bytes} bytes, more than max_bytes={max_bytes}; give it a "
            "smaller rank or fewer layers, or raise the limit"
        )
    return TenantInfo(
        id=number,
        name=tenant.name,
        domain_id=domain.id,
        domain=domain.name,
        kind=tenant.adapter.kind,
        rank=tenant.adapter.rank,
        bytes=num_bytes,
        sha256=sha256,
        generation=number,
        file=file,
        head_kind=tenant.head.kind,
        labels=tenant.head.labels,
        card=dict(tenant.card),
        created=datetime.now(timezone.utc),
    )


def _flush(paths: Sequence[Path]) -> None:
    """Flush each file: not os.sync(), which reports no error and waits for other programs' files."""
    for path in paths:
        try:
            fsync_path(path)
        except OSError as error:
            raise storage_error(error, path) from error


def remove_tenants(catalog: Catalog, names: Iterable[str]) -> list[TenantInfo]:
    """Remove tenants, all of them or none, and their files; return what they were.

    Raises :class:`UnknownTenantError`.
    """
    removed = catalog.remove_tenants(names)
    for tenant in removed:
        remove_quietly(catalog.layout.resolve(tenant.file))
    return removed


def save_domain(
    catalog: Catalog,
    name: str,
    table: PlotTable,
    *,
    parent: str | None = None,
    card: Mapping[str, Any] | None = None,
) -> DomainInfo:
    """Write a domain's table and put it into the catalog: a new node below ``parent``, or a new generation.

    ``parent=None`` means the domain exists (``general`` always does) and gets this table in place of its old
    one, which stays on disk so that a repair has something to fall back to; ``card=None`` then keeps its
    card. Raises :class:`InvalidNameError`, :class:`UnknownDomainError`,
    :class:`DomainExistsError`, :class:`StoreFullError`, :class:`StoreBusyError`.
    """
    check_name(name, "domain")
    with catalog.change_lock:
        previous = catalog.domains[name] if parent is None else None
        info = _describe_domain(catalog, name, table, previous=previous, parent=parent, card=card)
        path = catalog.layout.resolve(str(info.file))
        try:
            sha256 = write_plot(path, table)
            info = info.model_copy(update={"sha256": sha256, "bytes": path.stat().st_size})
            if previous is None:
                catalog.add_domain(info)
            else:
                catalog.replace_domain(info)
        except Exception:
            remove_quietly(path)
            raise
    if previous is not None and previous.previous is not None:
        remove_quietly(catalog.layout.resolve(previous.previous.file))
    return info


def _describe_domain(
    catalog: Catalog,
    name: str,
    table: PlotTable,
    *,
    previous: DomainInfo | None,
    parent: str | None,
    card: Mapping[str, Any] | None,
) -> DomainInfo:
    (number,) = catalog.reserve()
    parent_info = catalog.domains[parent] if parent is not None else None
    domain_id = previous.id if previous else number
    return DomainInfo(
        id=domain_id,
        name=name,
        parent_id=previous.parent_id if previous else parent_info.id if parent_info else None,
        parent=previous.parent if previous else parent,
        generation=number,
        file=catalog.layout.plot_file(domain_id, number),
        bytes=0,
        sha256="",
        rows=len(table.rows),
        unigrams=table.unigrams is not None,
        row_format=table.metadata.row_format,
        plot_bytes=previous.plot_bytes if previous else 0,
        layers=previous.layers if previous else None,
        previous=previous.plot_file() if previous else None,
        layer_identity=table.metadata.layer_identity,
        corpus_tokens=table.metadata.corpus_tokens,
        min_count=table.metadata.min_count,
        admission_count=table.metadata.admission_count,
        created=datetime.now(timezone.utc),
        card=previous.card if previous and card is None else dict(card or {}),
    )


def save_traffic(catalog: Catalog, domain: str, counts: TrafficCounts) -> TrafficInfo:
    """Write n-grams of a domain's traffic and note them in the catalog; the next update takes them in.

    Raises :class:`UnknownDomainError`, :class:`ReadOnlyStoreError`, :class:`StoreFullError`.
    """
    info = catalog.domains[domain]
    with catalog.change_lock:
        (number,) = catalog.reserve()
        file = catalog.layout.traffic_file(info.id, number)
        path = catalog.layout.resolve(file)
        try:
            sha256 = write_traffic(path, counts)
            traffic = TrafficInfo(
                id=number,
                domain_id=info.id,
                file=file,
                bytes=path.stat().st_size,
                sha256=sha256,
                tokens=counts.tokens,
            )
            catalog.add_traffic(traffic)
        except BaseException:
            remove_unused(catalog, [file])
            raise
    return traffic


def remove_domain(catalog: Catalog, name: str) -> DomainInfo:
    """Remove a domain and its files; return what it was.

    Raises :class:`UnknownDomainError`, and :class:`DomainInUseError` for the root and for a node that has
    tenants or children.
    """
    traffic = catalog.traffic_files()
    domain = catalog.remove_domain(name)
    files = [domain.plot_file(), domain.previous, domain.layers]
    files += [file for file in traffic if file.domain_id == domain.id]
    paths = [catalog.layout.resolve(file.file) for file in files if file is not None]
    for path in paths:
        remove_quietly(path)
    for folder in {path.parent for path in paths}:
        # The folder belongs to this id alone, which is never given again.
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return domain
