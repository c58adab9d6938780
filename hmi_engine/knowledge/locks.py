"""The lock that keeps ``repair`` from removing files that a writer is about to put into the catalog."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hmi_engine.errors import ReadOnlyStoreError, StoreBusyError

__all__ = ["WriterLock"]


class WriterLock:
    """Held by every process that has the store open for writing; the kernel drops it when a process dies.

    Writers share it, as the catalog orders their changes. Only a repair needs to be alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ReadOnlyStoreError(
                f"cannot open {path}: {error.strerror}. Check the folder's permissions, or open read-only"
            ) from error
        try:
            self._take(fcntl.LOCK_SH, "a repair of the store is running")
        except BaseException:
            self.release()
            raise

    def _take(self, mode: int, obstacle: str) -> None:
        try:
            fcntl.flock(self._descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreBusyError(f"{self._path.parent}: {obstacle}; try again when it is done") from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock alone; raises :class:`StoreBusyError` while another writer has the store open."""
        try:
            self._take(fcntl.LOCK_EX, "another process has the store open for writing")
            yield
        finally:
            # A failed conversion has dropped the shared lock, so it is taken again in either case.
            self._take(fcntl.LOCK_SH, "a repair of the store is running")

    def release(self) -> None:
        """Give the lock back; does nothing the second time."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
