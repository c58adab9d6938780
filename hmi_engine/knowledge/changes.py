"""Changes of a store, each of them all or nothing: write the files, commit the catalog, drop the old files.

A crash between two steps leaves the state before or after, and at most files that no entry refers to.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from hmi_engine.errors import TenantExistsError
from hmi_engine.knowledge.adapters import Adapter
from hmi_engine.knowledge.atomic import remove_quietly
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.heads import Head
from hmi_engine.knowledge.names import check_name
from hmi_engine.knowledge.plot_table import PlotTable, write_plot
from hmi_engine.knowledge.records import DomainInfo, TenantInfo, TrafficInfo
from hmi_engine.knowledge.tenant_file import write_tenant
from hmi_engine.knowledge.traffic_file import TrafficCounts, write_traffic

__all__ = ["NewTenant", "remove_domain", "remove_tenant", "save_domain", "save_tenants", "save_traffic"]


@dataclass(frozen=True, eq=False)
class NewTenant:
    """A tenant to be saved; ``card`` is what a person wants to know of it, as JSON values."""

    name: str
    domain: str
    adapter: Adapter
    head: Head
    card: Mapping[str, Any] = field(default_factory=dict)


def save_tenants(
    catalog: Catalog, tenants: Sequence[NewTenant], *, replace: bool = False
) -> list[TenantInfo]:
    """Check and write tenants and put them into the catalog in one transaction: all of them or none.

    With ``replace``, tenants of these names are replaced; who has read an old one keeps it. Raises
    :class:`InvalidNameError`, :class:`UnknownDomainError`, :class:`InvalidAdapterError`,
    :class:`InvalidHeadError`, :class:`TenantExistsError`, :class:`StoreFullError`, :class:`StoreBusyError`.
    """
    _check_tenants(catalog, tenants, replace)
    with catalog.change_lock:
        return _save_checked(catalog, tenants, replace)


def _save_checked(catalog: Catalog, tenants: Sequence[NewTenant], replace: bool) -> list[TenantInfo]:
    layout = catalog.layout
    infos: list[TenantInfo] = []
    try:
        for tenant, number in zip(tenants, catalog.reserve(len(tenants)), strict=True):
            info = _describe_tenant(catalog, tenant, number)
            infos.append(info)
            path = layout.resolve(info.file)
            # One flush for all is far cheaper than two for each of thousands.
            sha256 = write_tenant(path, tenant.adapter, tenant.head, sync=len(tenants) == 1)
            infos[-1] = info.model_copy(update={"sha256": sha256, "bytes": path.stat().st_size})
        if len(tenants) > 1:
            os.sync()
        replaced = catalog.add_tenants(infos, replace=replace)
    except Exception:
        for info in infos:
            remove_quietly(layout.resolve(info.file))
        raise
    for info in replaced:
        remove_quietly(layout.resolve(info.file))
    return infos


def _check_tenants(catalog: Catalog, tenants: Sequence[NewTenant], replace: bool) -> None:
    """Refuse what can be refused before anything is written; the catalog checks again when it commits."""
    general = catalog.general
    seen: set[str] = set()
    for tenant in tenants:
        check_name(tenant.name)
        if tenant.name in seen:
            raise TenantExistsError(f"tenant {tenant.name!r} is given twice")
        seen.add(tenant.name)
        if not replace and tenant.name in catalog.tenants:
            raise TenantExistsError(
                f"tenant {tenant.name!r} is in {catalog.layout.root} already; pass replace=True to replace it"
            )
        tenant.adapter.validate(general)
        tenant.head.validate(general)


def _describe_tenant(catalog: Catalog, tenant: NewTenant, number: int) -> TenantInfo:
    return TenantInfo(
        id=number,
        name=tenant.name,
        domain_id=catalog.domains[tenant.domain].id,
        domain=tenant.domain,
        kind=tenant.adapter.kind,
        rank=tenant.adapter.rank,
        bytes=0,
        sha256="",
        generation=number,
        file=catalog.layout.tenant_file(number, number),
        head_kind=tenant.head.kind,
        labels=tenant.head.labels,
        card=dict(tenant.card),
        created=datetime.now(timezone.utc),
    )


def remove_tenant(catalog: Catalog, name: str) -> TenantInfo:
    """Remove a tenant and its file; return what it was. Raises :class:`UnknownTenantError`."""
    tenant = catalog.remove_tenant(name)
    remove_quietly(catalog.layout.resolve(tenant.file))
    return tenant


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
            remove_quietly(path)
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
