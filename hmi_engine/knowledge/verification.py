"""Whether a store's files are those that its catalog describes, and what to do where they are not."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hmi_engine.errors import HmiError, StoreCorruptError, StoreError
from hmi_engine.knowledge.atomic import PARTIAL_SUFFIX, remove_quietly
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.plot_table import PlotTable, open_plot
from hmi_engine.knowledge.records import DomainInfo, TenantInfo
from hmi_engine.knowledge.tenant_file import load_tenant, read_layout
from hmi_engine.knowledge.tensor_file import file_sha256

__all__ = ["Problem", "ProblemKind", "repair", "verify"]

_PIECE_ROWS = 1 << 14

ProblemKind = Literal["catalog", "missing", "checksum", "content", "orphan"]


class Problem(NamedTuple):
    """One finding: ``path`` is the file, ``repairable`` whether :func:`repair` can set it right."""

    kind: ProblemKind
    path: Path
    message: str
    repairable: bool = False


Progress = Callable[[str, int, int | None], None]
"""Called with the name of the step, the number of files done and that of all files."""


def verify(
    layout: StoreLayout, catalog: Catalog, *, deep: bool = True, progress: Progress | None = None
) -> list[Problem]:
    """Check the catalog, every file that it refers to, and that there are no others.

    ``deep`` reads all files: checksums and contents (adapters and heads against the base model, the n-gram
    index against its rows). Without it, presence, sizes and headers are checked. An empty list means a sound
    store. Where the catalog itself is damaged, nothing is called an orphan: its entry may only be unreadable.
    """
    problems = [Problem("catalog", layout.catalog, text) for text in catalog.integrity_problems()]
    try:
        total = len(catalog.general_files()) + len(catalog.domains) + len(catalog.tenants)
        for done, found in enumerate(_file_problems(layout, catalog, deep), start=1):
            problems += found
            if progress:
                progress("checking files", done, total)
        if not any(problem.kind == "catalog" for problem in problems):
            problems += _find_orphans(layout, catalog)
    except StoreCorruptError as error:
        problems.append(Problem("catalog", layout.catalog, str(error)))
    return problems


def repair(layout: StoreLayout, catalog: Catalog, problems: Iterable[Problem]) -> list[Path]:
    """Remove the orphans among ``problems`` and return what was removed; nothing else is ever changed.

    A file that the catalog refers to by now stays. Raises :class:`StoreBusyError` while another process has
    the store open for writing, as its unfinished files look like orphans, :class:`StoreCorruptError` where
    the catalog is damaged, and :class:`ReadOnlyStoreError`.
    """
    with catalog.alone():
        if catalog.integrity_problems():
            raise StoreCorruptError(
                f"{layout.catalog} is damaged, so nothing is removed; restore it from a copy"
            )
        orphans = {problem.path for problem in _find_orphans(layout, catalog)}
        wanted = [problem.path for problem in problems if problem.repairable and problem.path in orphans]
        return [path for path in wanted if remove_quietly(path)]


def _file_problems(layout: StoreLayout, catalog: Catalog, deep: bool) -> Iterator[list[Problem]]:
    general = catalog.general
    for file in catalog.general_files():
        yield _check_bytes(layout.general / file.name, file.bytes, file.sha256, deep)
    for domain in catalog.domains.values():
        yield _check_domain(layout, domain, general, deep)
    for tenant in catalog.tenants.values():
        yield _check_tenant(layout, tenant, general, deep)


def _check_bytes(path: Path, size: int, sha256: str, deep: bool) -> list[Problem]:
    if not path.is_file():
        return [Problem("missing", path, f"{path} is missing; restore it from a copy of the store")]
    if path.stat().st_size != size:
        return [Problem("checksum", path, f"{path} has {path.stat().st_size} bytes, expected {size}")]
    try:
        if deep and file_sha256(path) != sha256:
            return [Problem("checksum", path, f"{path} is not what was written: its SHA-256 differs")]
    except OSError as error:
        return [Problem("checksum", path, f"{path} cannot be read: {error.strerror}")]
    return []


def _check_domain(layout: StoreLayout, domain: DomainInfo, general: GeneralInfo, deep: bool) -> list[Problem]:
    if domain.file is None:
        return []
    try:
        path = layout.resolve(domain.file)
    except StoreError as error:
        return [Problem("catalog", layout.catalog, str(error))]
    problems = _check_bytes(path, domain.bytes, domain.sha256, deep)
    if problems:
        return problems
    try:
        table = open_plot(path, general)
    except HmiError as error:
        return [Problem("content", path, str(error))]
    faults = [_find_difference(domain, table), _find_index_fault(table) if deep else None]
    return [Problem("content", path, f"{path}: {fault}") for fault in faults if fault]


def _find_difference(domain: DomainInfo, table: PlotTable) -> str | None:
    of_catalog = (domain.rows, domain.unigrams, domain.layer_identity, domain.admission_count)
    metadata = table.metadata
    of_file = (len(table.rows), table.unigrams is not None, metadata.layer_identity, metadata.admission_count)
    return f"holds {of_file}, the catalog says {of_catalog}" if of_catalog != of_file else None


def _find_index_fault(table: PlotTable) -> str | None:
    """Return what is wrong if the index does not map exactly the row keys to their rows."""
    used = table.index[table.index[:, 0] != 0]
    keys, rows = used[:, 0], used[:, 1]
    num_rows = len(table.row_keys)
    if len(keys) != num_rows:
        return f"the index has {len(keys)} n-grams, the table {num_rows} rows"
    if not torch.equal(rows.sort().values, torch.arange(num_rows)):
        return f"the index does not refer to each of the rows 0 to {num_rows - 1} once"
    if not torch.equal(table.row_keys[rows], keys):
        return "the index refers to rows of other n-grams"
    if not all(_is_finite(tensor) for tensor in (table.rows, table.unigrams) if tensor is not None):
        return "the rows hold NaN or infinity"
    return None


def _is_finite(rows: Tensor) -> bool:
    # In pieces, as each needs temporary memory of its size.
    pieces = (rows[start : start + _PIECE_ROWS] for start in range(0, len(rows), _PIECE_ROWS))
    return all(bool(piece.isfinite().all()) for piece in pieces)


def _check_tenant(layout: StoreLayout, tenant: TenantInfo, general: GeneralInfo, deep: bool) -> list[Problem]:
    try:
        path = layout.resolve(tenant.file)
    except StoreError as error:
        return [Problem("catalog", layout.catalog, str(error))]
    problems = _check_bytes(path, tenant.bytes, tenant.sha256, deep)
    if problems:
        return problems
    try:
        contents = read_layout(path)
        contents.check_fits(general, path)
        if deep:
            load_tenant(path, general)
    except HmiError as error:
        return [Problem("content", path, str(error))]
    if (contents.head.kind, contents.head.labels) != (tenant.head_kind, tenant.labels):
        return [Problem("content", path, f"{path}: head and labels are not those of tenant {tenant.name!r}")]
    return []


def _find_orphans(layout: StoreLayout, catalog: Catalog) -> list[Problem]:
    """Find files in our folders that no entry refers to, and unfinished files anywhere in the store."""
    # Listed before the entries are read, so that what is committed meanwhile is no orphan.
    files = [path for folder in (layout.domains, layout.tenants) for path in sorted(folder.rglob("*"))]
    partials = sorted(layout.root.glob(f"{layout.catalog.name}.*{PARTIAL_SUFFIX}*"))
    partials += sorted(layout.general.rglob(f"*{PARTIAL_SUFFIX}"))
    known = {layout.resolve(tenant.file) for tenant in catalog.tenants.values()}
    known |= {layout.resolve(domain.file) for domain in catalog.domains.values() if domain.file is not None}
    orphans = [path for path in files if path not in known] + partials
    return [
        Problem(
            "orphan", path, f"{path} belongs to nothing in the catalog (left by a crash?)", repairable=True
        )
        for path in orphans
        if path.is_file() or path.is_symlink()
    ]
