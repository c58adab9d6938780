"""Files that are either the old ones or the new ones, never something between."""

import errno
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

from hmi_engine.errors import ReadOnlyStoreError, StoreError, StoreFullError
from hmi_engine.knowledge.parallel import map_in_threads

__all__ = [
    "PARTIAL_SUFFIX",
    "atomic_write",
    "fsync_folders",
    "fsync_path",
    "make_folders",
    "remove_quietly",
    "storage_error",
]

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a file that is being written; one found later was left by a crash."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


def atomic_write(
    path: Path,
    write: Callable[[Path], None],
    *,
    sync: bool = True,
    explain: Callable[[OSError, Path], StoreError] | None = None,
) -> None:
    """Make or replace ``path`` with what ``write`` puts into the temporary path that it is given.

    The temporary file lies in the same folder (made if missing), is fsynced and renamed, and the folder
    is fsynced, so that a crash leaves the old file or the new one. If anything fails the temporary file is
    removed and the old file stays. With ``sync=False`` the caller must flush the file, and with
    :func:`fsync_folders` its folder, before anything refers to it: that is for writing many files at once.

    Raises :class:`StoreFullError` on a full disk, quota or file size limit and :class:`ReadOnlyStoreError`
    where writing is not allowed, :class:`StoreError` on other operating system errors, all of them made by
    ``explain`` (:func:`storage_error` by default); what else ``write`` raises passes through.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        changed_folders = make_folders(path.parent)
        write(partial)
        if sync:
            fsync_path(partial)
        partial.replace(path)
        if sync:
            for folder in changed_folders:
                fsync_path(folder)
    except BaseException as error:
        remove_quietly(partial)
        if isinstance(error, OSError) and not isinstance(error, StoreError):
            raise (explain or storage_error)(error, path) from error
        raise


def fsync_path(path: Path) -> None:
    """Flush a file's data, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folders(folders: Iterable[Path], root: Path) -> None:
    """Flush the entries of folders below ``root`` and of all folders between, each once, several at a time.

    Raises as :func:`atomic_write` does.
    """
    changed = {root}
    for folder in folders:
        for above in (folder, *folder.parents):
            if above in changed or not above.is_relative_to(root):
                break
            changed.add(above)
    try:
        for _ in map_in_threads(fsync_path, changed):
            pass
    except OSError as error:
        raise storage_error(error, root) from error


def remove_quietly(path: Path) -> bool:
    """Remove a file; return whether it is gone. One that stays is an orphan for ``verify`` to find."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


def make_folders(folder: Path) -> list[Path]:
    """Make ``folder``; return the folders that get a new entry once it has one, deepest first.

    Who makes something in it flushes them (:func:`fsync_path`). Raises OSError.
    """
    changed = [folder]
    while not changed[-1].is_dir():
        changed.append(changed[-1].parent)
    if len(changed) > 1:
        folder.mkdir(parents=True, exist_ok=True)
    return changed


def storage_error(
    error: OSError,
    path: Path,
    *,
    kept: str = "Nothing of this change was kept; free some space and try again",
    refused: str = "Check the permissions of its folder",
) -> StoreError:
    """Return the error to raise where the operating system refused to write ``path``.

    A :class:`StoreFullError` says with ``kept`` what is left and what to do; other errors are
    :class:`ReadOnlyStoreError` where writing is not allowed, with what to do in ``refused``, and
    :class:`StoreError`.
    """
    if error.errno in _FULL:
        return StoreFullError(f"no room to write {path}: {error.strerror}. {kept}")
    if error.errno in _REFUSED:
        return ReadOnlyStoreError(f"cannot write {path}: {error.strerror}. {refused}")
    return StoreError(f"cannot write {path}: {error.strerror or error}")
