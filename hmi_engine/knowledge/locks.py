"""Locks between processes: who may write to a store, who builds a domain. A dead one's are dropped."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hmi_engine.errors import ReadOnlyStoreError, StoreBusyError
from hmi_engine.knowledge.atomic import remove_quietly, storage_error

__all__ = ["FolderLock", "WriterLock", "hold_folder"]

_PROBE_SECONDS = 0.5
_PROBE_INTERVAL_SECONDS = 0.02
_MAX_DESCRIPTION_BYTES = 1000


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
            self._share()
        except BaseException:
            self.release()
            raise

    @classmethod
    def is_held(cls, path: Path) -> bool:
        """Return whether some process has the store of this lock open for writing; changes nothing."""
        return _is_refused(path, fcntl.LOCK_EX)

    def _share(self) -> None:
        # Not at once: `is_held` holds the lock alone for a moment.
        deadline = time.monotonic() + _PROBE_SECONDS
        while True:
            try:
                return self._take(fcntl.LOCK_SH, "a repair of the store is running")
            except StoreBusyError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_PROBE_INTERVAL_SECONDS)

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
            # A failed conversion has dropped the shared lock, and another's may have succeeded since: who
            # did not wait for its end would go on to write without a lock.
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def release(self) -> None:
        """Give the lock back; does nothing the second time."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class FolderLock:
    """Held alone by whoever works in a folder, and may remove the folder; the lock is a file in it.

    Threads of one process exclude each other too, as every lock opens the file anew.
    """

    FILE = "lock"

    def __init__(self, folder: Path, *, busy: str) -> None:
        """Make ``folder`` if it is missing, and lock it.

        Raises :class:`StoreBusyError` with the message ``busy`` while another holds the lock, and the errors
        of :func:`~hmi_engine.knowledge.atomic.storage_error` where the folder cannot be made.
        """
        self.path = folder / self.FILE
        self._descriptor = -1
        # Not at once: `is_held` holds the lock for a moment.
        deadline = time.monotonic() + _PROBE_SECONDS
        while not self._take():
            if time.monotonic() > deadline:
                raise StoreBusyError(busy)
            time.sleep(_PROBE_INTERVAL_SECONDS)

    @classmethod
    def is_held(cls, folder: Path) -> bool:
        """Return whether some process, or another thread, works in ``folder`` now; changes nothing."""
        return _is_refused(folder / cls.FILE, fcntl.LOCK_SH)

    @classmethod
    def description(cls, folder: Path) -> str:
        """Return what :meth:`describe` wrote there, empty where nothing can be read."""
        try:
            with (folder / cls.FILE).open("rb") as file:
                return file.read(_MAX_DESCRIPTION_BYTES).decode(errors="replace")
        except OSError:
            return ""

    def describe(self, text: str) -> None:
        """Write into the lock's file what the folder is for, as a person will read it."""
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode()[:_MAX_DESCRIPTION_BYTES], 0)
        except OSError as error:
            raise storage_error(error, self.path) from error

    def clear_folder(self) -> None:
        """Remove everything in the folder but the lock.

        Raises :class:`ReadOnlyStoreError` or :class:`StoreError` where something stays.
        """
        try:
            for path in self.path.parent.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path != self.path:
                    path.unlink()
        except OSError as error:
            raise storage_error(error, self.path.parent) from error

    def remove_folder(self) -> None:
        """Remove the folder with everything in it, and give the lock back; raises as :meth:`clear_folder`.

        Does nothing when the lock was given back: the folder may be another's by now.
        """
        if self._descriptor < 0:
            return
        self.clear_folder()
        remove_quietly(self.path)
        with contextlib.suppress(OSError):  # another has made its lock there already
            self.path.parent.rmdir()
        self.release()

    def _take(self) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            return False  # who held the lock has just removed the folder
        except OSError as error:
            # mkdir found the folder, and found it gone when it looked whether it is one.
            folder = self.path.parent
            if isinstance(error, FileExistsError) and (folder.is_dir() or not folder.exists()):
                return False
            raise storage_error(error, self.path) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A file that was removed meanwhile locks nothing: the next one makes a new file.
            if os.fstat(descriptor).st_nlink:
                self._descriptor = descriptor
                return True
        except BlockingIOError:
            pass
        os.close(descriptor)
        return False

    def release(self) -> None:
        """Give the lock back; does nothing the second time."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def hold_folder(folder: Path, *, busy: str) -> Iterator[None]:
    """Keep others who call this out of an existing folder that is no store's; nothing is left in it.

    Raises :class:`StoreBusyError` with the message ``busy`` while another thread or process holds it, or has
    just removed it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise StoreBusyError(busy) from error
    except OSError as error:
        raise storage_error(error, folder) from error
    try:
        # Where a file system of others' machines has no such locks, nobody is kept out.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreBusyError(busy) from error
        if not _is_still(descriptor, folder):
            raise StoreBusyError(busy)
        yield
    finally:
        os.close(descriptor)


def _is_still(descriptor: int, folder: Path) -> bool:
    """Return whether an open folder is still the one of its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def _is_refused(path: Path, operation: int) -> bool:
    """Return whether somebody holds a lock of this file beside which ``flock`` refuses ``operation``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
