"""Files of a store that no entry of its catalog refers to, and builds that were interrupted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from hmi_engine.errors import StoreBusyError, StoreError
from hmi_engine.knowledge.atomic import PARTIAL_SUFFIX, remove_quietly
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.file_checks import Problem
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.locks import FolderLock

__all__ = ["find_leftovers", "find_orphans", "find_settled_leftovers", "remove_leftover", "remove_unused"]


def find_settled_leftovers(layout: StoreLayout, catalog: Catalog) -> list[Problem]:
    """Find what :func:`find_leftovers` finds, beside writers: nothing that one may be about to refer to.

    While somebody writes, no file is called an orphan. Raises as :func:`find_orphans`.
    """
    found = find_leftovers(layout, catalog)
    if not found:
        return []
    is_quiet = catalog.is_quiet()
    # Whoever wrote when the files were listed has ended, and what was done is to be seen now.
    still_found = set(find_leftovers(layout, catalog))
    return [each for each in found if each in still_found and (is_quiet or each.kind != "orphan")]


def find_leftovers(layout: StoreLayout, catalog: Catalog) -> list[Problem]:
    """Find files in our folders that no entry refers to, unfinished files, and interrupted builds."""
    builds = sorted(layout.builds.glob("*"))
    unfinished = [_unfinished(path) for path in builds if path.is_dir() and not FolderLock.is_held(path)]
    return find_orphans(layout, catalog) + unfinished


def find_orphans(layout: StoreLayout, catalog: Catalog) -> list[Problem]:
    """Find files in our folders that no entry refers to, and unfinished files: each folder is listed once.

    Raises :class:`StoreCorruptError` where an entry's file lies outside the store.
    """
    # Listed before the entries are read, so that what is committed meanwhile is no orphan.
    listed = {file for name in ("domains", "tenants") for file in _list_files(layout.root / name, name)}
    partials = sorted(layout.root.glob(f"{layout.catalog.name}.*{PARTIAL_SUFFIX}*"))
    current = layout.general_folder(catalog.general.folder)
    partials += sorted(current.rglob(f"*{PARTIAL_SUFFIX}"))
    partials += [file for folder in layout.general_folders() if folder != current for file in _files(folder)]
    partials += sorted(path for path in layout.builds.glob("*") if not path.is_dir())
    # Before the entries too: one that is not in the making any more has its entry, or is gone.
    known = set(catalog.files_in_the_making)
    known.update(catalog.files())
    # Paths cost more than texts, so they are made only of files that are missing, or spelled otherwise.
    known_paths = {layout.resolve(file) for file in known - listed}
    orphans = [layout.root / file for file in sorted(listed - known)]
    return [
        Problem(
            "orphan", path, f"{path} belongs to nothing in the catalog (left by a crash?)", repairable=True
        )
        for path in [path for path in orphans if path not in known_paths] + partials
        if path.is_file() or path.is_symlink()
    ]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _list_files(folder: Path, name: str) -> Iterator[str]:
    """Yield the paths of all files and links below a folder, as seen from the store; ``name`` is its own."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return  # a new store's, or removed meanwhile
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _list_files(Path(entry.path), f"{name}/{entry.name}")
        else:
            yield f"{name}/{entry.name}"


def _unfinished(folder: Path) -> Problem:
    name = FolderLock.description(folder)
    return Problem(
        "unfinished",
        folder,
        f"{folder}: the build of domain {name!r} was interrupted; give the same command again to go on where "
        "it was, or let `hmi verify --repair` remove what it has done",
        repairable=True,
    )


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def remove_leftover(problem: Problem) -> bool:
    """Remove what :func:`find_leftovers` found; return whether it is gone."""
    if problem.kind == "orphan":
        is_gone = remove_quietly(problem.path)
        if problem.path.parent.name.startswith("general."):
            _remove_if_empty(problem.path.parent)
        return is_gone
    try:
        FolderLock(problem.path, busy="a build goes on there").remove_folder()
    except StoreBusyError:
        return False
    return True


def remove_unused(catalog: Catalog, files: Iterable[str]) -> None:
    """Remove those of a change's files that no entry refers to: after an error, or an interrupt.

    The entries are asked, as an interrupt may come when the commit is done. Where they cannot be read the
    files stay, for :func:`find_orphans` to find.
    """
    unsure = set(files)
    with suppress(StoreError):
        unused = unsure.difference(catalog.files()) if unsure else unsure
        for file in sorted(unused):
            remove_quietly(catalog.layout.resolve(file))
