import fcntl
import threading
from pathlib import Path

import pytest

from hmi_engine.errors import StoreBusyError
from hmi_engine.knowledge.locks import WriterLock


def test_who_fails_to_be_alone_holds_the_lock_afterwards_whoever_was_alone_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel drops a lock whose conversion fails: in that moment the other writer becomes alone."""
    path, flock = tmp_path / "store.lock", fcntl.flock
    own, other = WriterLock(path), WriterLock(path)
    may_begin, has_begun, may_end = (threading.Event() for _ in range(3))

    def repair() -> None:
        may_begin.wait()
        with other.alone():
            has_begun.set()
            may_end.wait()

    def interleaved(descriptor: int, mode: int) -> None:
        if descriptor == own._descriptor:
            if mode & fcntl.LOCK_NB == 0:
                may_end.set()  # who waits lets the other end
            try:
                return flock(descriptor, mode)
            except BlockingIOError:
                may_begin.set()
                has_begun.wait()
                raise
        return flock(descriptor, mode)

    thread = threading.Thread(target=repair)
    thread.start()
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", interleaved)
        try:
            with pytest.raises(StoreBusyError, match="another process has the store open"), own.alone():
                pass
        finally:
            may_end.set()
            thread.join()
    other.release()
    third = WriterLock(path)
    with pytest.raises(StoreBusyError, match="another process has the store open"), third.alone():
        pass
    own.release()
    with third.alone():
        assert WriterLock.is_held(path)
    third.release()


def test_whether_somebody_writes(tmp_path: Path) -> None:
    path = tmp_path / "store.lock"
    assert not WriterLock.is_held(path)
    lock = WriterLock(path)
    assert WriterLock.is_held(path)
    lock.release()
    assert not WriterLock.is_held(path) and path.read_bytes() == b""


def test_who_only_looks_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flock, refusals = tmp_path / "store.lock", fcntl.flock, []

    def held_for_a_moment(descriptor: int, mode: int) -> None:
        if not refusals:
            refusals.append(mode)
            raise BlockingIOError
        flock(descriptor, mode)

    monkeypatch.setattr(fcntl, "flock", held_for_a_moment)
    lock = WriterLock(path)
    assert refusals and WriterLock.is_held(path)
    lock.release()
