"""Whether the files of one entry of the catalog are what the entry says, and what could set them right."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal, NamedTuple

from hmi_engine.errors import HmiError, StoreError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.plot_table import open_plot
from hmi_engine.knowledge.records import DomainInfo, PlotFile, StoreFile, TenantInfo, TrafficInfo
from hmi_engine.knowledge.table_checks import table_faults
from hmi_engine.knowledge.tenant_file import load_tenant, read_layout
from hmi_engine.knowledge.tensor_file import file_sha256
from hmi_engine.knowledge.traffic_file import read_traffic

__all__ = [
    "Problem",
    "ProblemKind",
    "byte_problems",
    "domain_problems",
    "sound_previous",
    "store_file_problems",
    "table_problems",
    "tenant_problems",
    "traffic_problems",
]

ProblemKind = Literal["catalog", "missing", "checksum", "content", "orphan", "unfinished"]


_ONE_TABLE = threading.Lock()
"""Checks of large tables take memory for copies of their indexes, so threads take turns."""


class Problem(NamedTuple):
    """One finding: ``path`` is the file or folder, ``repairable`` whether ``repair`` can set it right."""

    kind: ProblemKind
    path: Path
    message: str
    repairable: bool = False


def byte_problems(path: Path, size: int, sha256: str, *, deep: bool) -> list[Problem]:
    """Check that a file is there and has its size, and if ``deep`` its SHA-256."""
    try:
        found = path.stat().st_size if path.is_file() else None
    except OSError:  # removed between the two
        found = None
    if found is None:
        return [Problem("missing", path, f"{path} is missing; restore it from a copy of the store")]
    if found != size:
        return [Problem("checksum", path, f"{path} has {found} bytes, expected {size}")]
    try:
        if deep and file_sha256(path) != sha256:
            return [Problem("checksum", path, f"{path} is not what was written: its SHA-256 differs")]
    except OSError as error:
        return [Problem("checksum", path, f"{path} cannot be read: {error.strerror}")]
    return []


def store_file_problems(layout: StoreLayout, file: StoreFile | TenantInfo, *, deep: bool) -> list[Problem]:
    """Check a file that the catalog gives by its path relative to the store."""
    try:
        path = layout.resolve(file.file)
    except StoreError as error:
        return [Problem("catalog", layout.catalog, str(error))]
    return byte_problems(path, file.bytes, file.sha256, deep=deep)


def domain_problems(
    layout: StoreLayout, domain: DomainInfo, general: GeneralInfo, *, deep: bool
) -> list[Problem]:
    """Check a domain's table, the generation before it, and its own domain layers."""
    current, previous = domain.plot_file(), domain.previous
    found = table_problems(layout, current, general, deep=deep) if current else []
    if found:
        way_out = _way_out(layout, domain, general, deep)
        repairable = way_out is not None
        found = [_with_advice(problem, way_out or _NO_WAY_OUT, repairable) for problem in found]
    if previous:
        advice = "the domain works without it, and `hmi verify --repair` forgets it"
        found += [
            _with_advice(problem, advice, True)
            for problem in table_problems(layout, previous, general, deep=deep)
        ]
    if domain.layers:
        advice = (
            f"set the layers of domain {domain.name!r} again, or restore the file from a copy of the store"
        )
        found += [
            _with_advice(problem, advice, False)
            for problem in store_file_problems(layout, domain.layers, deep=deep)
        ]
    return found


def table_problems(layout: StoreLayout, file: PlotFile, general: GeneralInfo, *, deep: bool) -> list[Problem]:
    """Check one generation of a table against its entry in the catalog."""
    problems = store_file_problems(layout, file, deep=deep)
    if problems:
        return problems
    path = layout.resolve(file.file)
    try:
        table = open_plot(path, general)
        with _ONE_TABLE:
            faults = list(table_faults(file, table, deep=deep))
    except HmiError as error:
        return [Problem("content", path, str(error))]
    return [Problem("content", path, f"{path}: {fault}") for fault in faults]


def sound_previous(
    layout: StoreLayout, domain: DomainInfo, general: GeneralInfo, *, deep: bool = True
) -> PlotFile | None:
    """Return the generation before the current one if it is sound and can stand in for it, else None.

    It cannot where the domain has got other domain layers since.
    """
    previous = domain.previous
    if previous is None:
        return None
    if (previous.layer_identity, previous.unigrams) != (domain.layer_identity, domain.unigrams):
        return None
    return None if table_problems(layout, previous, general, deep=deep) else previous


_NO_WAY_OUT = (
    "there is no sound generation before it, and the unigram rows of the vocabulary were in it: restore the "
    "file from a copy of the store, or make the store (for a domain with layers of its own: set them) again"
)


def _way_out(layout: StoreLayout, domain: DomainInfo, general: GeneralInfo, deep: bool) -> str | None:
    if sound_previous(layout, domain, general, deep=deep):
        return "`hmi verify --repair` falls back to the generation before it"
    if domain.unigrams:
        return None
    return (
        "there is no sound generation before it: after `hmi verify --repair` domain "
        f"{domain.name!r} has no rows of its own until `hmi domain update` gets its corpus again"
    )


def _with_advice(problem: Problem, advice: str, repairable: bool) -> Problem:
    if problem.kind == "catalog":
        return problem  # a forged or damaged entry says nothing that a repair could trust
    return problem._replace(message=f"{problem.message}; {advice}", repairable=repairable)


def tenant_problems(
    layout: StoreLayout, tenant: TenantInfo, general: GeneralInfo, *, deep: bool
) -> list[Problem]:
    """Check what is in a tenant's file against the base model: layout, head, and if ``deep`` every value.

    The file is one in which :func:`store_file_problems` found nothing.
    """
    path = layout.resolve(tenant.file)
    try:
        contents = read_layout(path)
        contents.check_fits(general, path)
        if deep:
            load_tenant(path, general, layout=contents)
    except HmiError as error:
        return [Problem("content", path, str(error))]
    if (contents.head.kind, contents.head.labels) != (tenant.head_kind, tenant.labels):
        return [Problem("content", path, f"{path}: head and labels are not those of tenant {tenant.name!r}")]
    return []


def traffic_problems(layout: StoreLayout, traffic: TrafficInfo, *, deep: bool) -> list[Problem]:
    """Check a file of counted traffic, and if ``deep`` all its contents."""
    problems = store_file_problems(layout, traffic, deep=deep)
    if deep and not problems:
        path = layout.resolve(traffic.file)
        try:
            read_traffic(path)
        except HmiError as error:
            problems = [Problem("content", path, str(error))]
    advice = "`hmi verify --repair` drops it, and the next update knows nothing of that traffic"
    return [_with_advice(problem, advice, True) for problem in problems]
