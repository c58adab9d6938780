"""The folder that an adapter is exported into: for one export at a time, and what is said where one fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hmi_engine.errors import StoreError
from hmi_engine.knowledge.atomic import fsync_path, make_folders, storage_error
from hmi_engine.knowledge.locks import hold_folder

__all__ = ["export_error", "hold_export_folder"]


def export_error(error: OSError, path: Path) -> StoreError:
    """The error to raise where the operating system refused to write a file of an export."""
    return storage_error(
        error,
        path,
        kept="The store is as it was; free some space and export again",
        refused="Choose a folder in which you may write",
    )


@contextmanager
def hold_export_folder(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other exports out of it, whose files would stand among these.

    Raises:
        StoreBusyError: another export writes into it.
        StoreError: it cannot be made; as :func:`export_error`.
    """
    try:
        for above in make_folders(folder)[1:]:
            fsync_path(above)
    except OSError as error:
        raise export_error(error, folder) from error
    with hold_folder(folder, busy=f"{folder}: another export writes into it; choose another folder, or wait"):
        yield
