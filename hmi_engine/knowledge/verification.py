"""Whether a store's files are those that its catalog describes, and setting right what can be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hmi_engine.errors import StoreCorruptError
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.catalog_rows import domain_state
from hmi_engine.knowledge.file_checks import (
    Problem,
    ProblemKind,
    byte_problems,
    domain_problems,
    sound_previous,
    store_file_problems,
    table_problems,
    tenant_problems,
    traffic_problems,
)
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.leftovers import (
    find_leftovers,
    find_orphans,
    find_settled_leftovers,
    remove_leftover,
)
from hmi_engine.knowledge.parallel import map_in_threads
from hmi_engine.knowledge.records import DomainInfo, GeneralFile, PlotFile, TenantInfo, TrafficInfo

__all__ = ["Problem", "ProblemKind", "Repair", "collect_garbage", "repair", "verify"]


class Repair(NamedTuple):
    """What :func:`repair` did about the file or folder ``path``."""

    path: Path
    message: str


Progress = Callable[[str, int, int | None], None]
"""Called with the name of the step, the number of files done and that of all files."""


def verify(
    layout: StoreLayout, catalog: Catalog, *, deep: bool = True, progress: Progress | None = None
) -> list[Problem]:
    """Check the catalog, every file that it refers to, and that there are no others.

    ``deep`` reads all files, several at a time: checksums and contents (adapters and heads against the base
    model, tables as :mod:`~hmi_engine.knowledge.table_checks` tells). Without it, presence, sizes and headers
    are checked. An empty list means a sound store. Where the catalog itself is damaged, nothing is called an
    orphan: its entry may only be unreadable.

    Others may write meanwhile: what is found of an entry counts if the entry is still the same afterwards,
    and nothing is called an orphan that may be about to get its entry.
    """
    problems = [Problem("catalog", layout.catalog, text) for text in catalog.integrity_problems()]
    try:
        total = len(catalog.general_files()) + len(catalog.domains) + len(catalog.tenants)
        total += len(catalog.traffic_files())
        with closing(map_in_threads(_read, _checks(layout, catalog, deep))) as found_of_each:
            for done, (found, check) in enumerate(found_of_each, start=1):
                problems += _still_true(check, check.look() if check.look and not found else found)
                if progress:
                    progress("checking files", done, total)
        problems += [Problem("catalog", layout.catalog, text) for text in _tree_faults(catalog)]
        if not any(problem.kind == "catalog" for problem in problems):
            problems += find_settled_leftovers(layout, catalog)
    except StoreCorruptError as error:
        problems.append(Problem("catalog", layout.catalog, str(error)))
    return problems


def repair(layout: StoreLayout, catalog: Catalog, problems: Iterable[Problem]) -> list[Repair]:
    """Set right what is repairable among ``problems`` and return what was done.

    Orphans, interrupted builds and damaged counts of traffic are removed. A damaged table gives way to the
    generation before it, if that is sound, else to none. Each finding is looked at again first: what is sound
    by now stays as it is.

    Raises :class:`StoreBusyError` while another process has the store open for writing, as its unfinished
    files look like orphans, :class:`StoreCorruptError` where the catalog is damaged, and
    :class:`ReadOnlyStoreError`.
    """
    wanted = {problem.path for problem in problems if problem.repairable}
    with catalog.change_lock, catalog.alone():
        _check_sound(layout, catalog)
        done: list[Repair] = []
        for domain in list(catalog.domains.values()):
            done += _mend_domain(layout, catalog, domain, wanted)
        done += _drop_traffic(layout, catalog, wanted)
        leftovers = [problem for problem in find_leftovers(layout, catalog) if problem.path in wanted]
        return done + list(_remove(leftovers, None))


def collect_garbage(
    layout: StoreLayout, catalog: Catalog, *, progress: Progress | None = None
) -> list[Repair]:
    """Remove the files that no entry refers to; return what was done.

    Their folders are listed, and no file is read. Interrupted builds stay, as the same command goes on with
    them. Raises as :func:`repair`.
    """
    with catalog.change_lock, catalog.alone():
        _check_sound(layout, catalog)
        return list(_remove(find_orphans(layout, catalog), progress))


def _check_sound(layout: StoreLayout, catalog: Catalog) -> None:
    if catalog.integrity_problems():
        raise StoreCorruptError(f"{layout.catalog} is damaged, so nothing is removed; restore it from a copy")


def _remove(leftovers: Sequence[Problem], progress: Progress | None) -> Iterator[Repair]:
    for done, problem in enumerate(leftovers, start=1):
        if remove_leftover(problem):
            yield Repair(problem.path, f"removed {problem.path}")
        if progress:
            progress("removing files", done, len(leftovers))


class _Check(NamedTuple):
    """``read`` runs in a thread; ``look``, all Python, in the caller's where ``read`` found nothing.

    Python code in several threads would only wait for one another's turn: with tenants' contents looked at
    in the threads, two cores verified less than half as many. ``is_current`` tells whether the catalog still
    has the entry that was checked.
    """

    read: Callable[[], list[Problem]]
    is_current: Callable[[], bool]
    look: Callable[[], list[Problem]] | None = None


def _checks(layout: StoreLayout, catalog: Catalog, deep: bool) -> Iterator[_Check]:
    """Yield the check of each file, or of each domain's files."""
    general = catalog.general
    for file in catalog.general_files():
        path = layout.general_folder(general.folder) / file.name
        yield _Check(
            partial(byte_problems, path, file.bytes, file.sha256, deep=deep),
            partial(_is_general_file, catalog, general.folder, file),
        )
    for domain in catalog.domains.values():
        yield _Check(
            partial(domain_problems, layout, domain, general, deep=deep),
            partial(_is_domain, catalog, domain),
        )
    for tenant in catalog.tenants.values():
        yield _Check(
            partial(store_file_problems, layout, tenant, deep=deep),
            partial(_is_tenant, catalog, tenant),
            partial(tenant_problems, layout, tenant, general, deep=deep),
        )
    for traffic in catalog.traffic_files():
        yield _Check(
            partial(traffic_problems, layout, traffic, deep=deep), partial(_is_traffic, catalog, traffic)
        )


def _still_true(check: _Check, found: list[Problem]) -> list[Problem]:
    """Return what was found if it is of an entry that there is: files go right after their entry."""
    return found if found and check.is_current() else []


def _is_general_file(catalog: Catalog, folder: str, file: GeneralFile) -> bool:
    return catalog.general.folder == folder and file in catalog.general_files()


def _is_domain(catalog: Catalog, domain: DomainInfo) -> bool:
    current = catalog.domains.get(domain.name)
    return current is not None and domain_state(current) == domain_state(domain)


def _is_tenant(catalog: Catalog, tenant: TenantInfo) -> bool:
    current = catalog.tenants.get(tenant.name)
    return current is not None and (current.id, current.generation) == (tenant.id, tenant.generation)


def _is_traffic(catalog: Catalog, traffic: TrafficInfo) -> bool:
    return traffic in catalog.traffic_files()


def _read(check: _Check) -> tuple[list[Problem], _Check]:
    return check.read(), check


def _tree_faults(catalog: Catalog) -> Iterator[str]:
    """Find domains from which no way leads up to the root."""
    parents = {domain.name: domain.parent for domain in catalog.domains.values()}
    for name, parent in parents.items():
        above, visited = parent, {name}
        while above is not None and above not in visited:
            visited.add(above)
            above = parents.get(above)
        if above is not None:
            yield f"domain {name!r} hangs in a loop of the tree"


def _mend_domain(
    layout: StoreLayout, catalog: Catalog, domain: DomainInfo, wanted: set[Path]
) -> list[Repair]:
    """Put a sound table, or none, in the place of one that is damaged, and forget a damaged previous one."""
    general = catalog.general

    def damaged(file: PlotFile | None) -> bool:
        if file is None or layout.resolve(file.file) not in wanted:
            return False
        return bool(table_problems(layout, file, general, deep=True))

    if damaged(domain.plot_file()):
        return _replace_table(layout, catalog, domain, general)
    if domain.previous and damaged(domain.previous):
        _commit(catalog, domain, previous=None)
        message = f"domain {domain.name!r} keeps its table and has no generation to fall back to any more"
        return [Repair(layout.resolve(domain.previous.file), message)]
    return []


def _replace_table(
    layout: StoreLayout, catalog: Catalog, domain: DomainInfo, general: GeneralInfo
) -> list[Repair]:
    path = layout.resolve(str(domain.file))
    previous = sound_previous(layout, domain, general)
    if previous:
        _commit(catalog, domain, **previous.model_dump(exclude={"generation"}), previous=None)
        done = f"domain {domain.name!r} is back at generation {previous.generation}: what came later is lost"
    elif not domain.unigrams:
        _commit(
            catalog,
            domain,
            file=None,
            bytes=0,
            sha256="",
            rows=0,
            corpus_tokens=0,
            admission_count=0,
            previous=None,
        )
        done = (
            f"domain {domain.name!r} has no rows of its own now; "
            "give `hmi domain update` its corpus to compute them again"
        )
    else:
        return []
    return [Repair(path, done)]


def _drop_traffic(layout: StoreLayout, catalog: Catalog, wanted: set[Path]) -> list[Repair]:
    damaged = [
        traffic
        for traffic in catalog.traffic_files()
        if layout.resolve(traffic.file) in wanted and traffic_problems(layout, traffic, deep=True)
    ]
    catalog.remove_traffic([traffic.id for traffic in damaged])
    return [
        Repair(layout.resolve(traffic.file), f"dropped the counts of {traffic.tokens} tokens of traffic")
        for traffic in damaged
    ]


def _commit(catalog: Catalog, domain: DomainInfo, **changes: object) -> None:
    (generation,) = catalog.reserve()
    catalog.replace_domain(domain.model_copy(update={**changes, "generation": generation}))
