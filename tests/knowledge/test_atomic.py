import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from hmi_engine.errors import ReadOnlyStoreError, StoreError, StoreFullError
from hmi_engine.knowledge import atomic
from hmi_engine.knowledge.atomic import PARTIAL_SUFFIX, atomic_write, remove_quietly


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_and_replaced_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    atomic_write(path, lambda partial: partial.write_bytes(b"old") and None)
    atomic_write(path, lambda partial: partial.write_bytes(b"new") and None)
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), StoreError("y")])
def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(partial: Path) -> None:
        partial.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        atomic_write(path, fail)
    assert caught.value is error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StoreFullError),
        (errno.EDQUOT, StoreFullError),
        (errno.EFBIG, StoreFullError),
        (errno.EROFS, ReadOnlyStoreError),
        (errno.EACCES, ReadOnlyStoreError),
        (errno.EIO, StoreError),
    ],
)
@pytest.mark.parametrize("step", ["write", "fsync"])
def test_system_errors_have_a_type_and_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[StoreError], step: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(expected, match="file") as caught:
        atomic_write(path, fail if step == "write" else lambda partial: partial.touch())
    assert type(caught.value) is expected
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_real_limit_on_the_file_size_is_a_full_store(
    tmp_path: Path, run_in_child: Callable[[Callable[[], object]], int]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_too_much() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(StoreFullError, match="no room"):
            atomic_write(path, lambda partial: partial.write_bytes(b"x" * 8192) and None)

    assert run_in_child(write_too_much) == 0
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_really_full_disk(small_disk: Path) -> None:
    path = small_disk / "file"
    atomic_write(path, lambda partial: partial.write_bytes(b"o" * 400_000) and None)
    with pytest.raises(StoreFullError, match="free some space"):
        atomic_write(path, lambda partial: partial.write_bytes(b"n" * 800_000) and None)
    assert path.read_bytes() == b"o" * 400_000
    assert names(small_disk) == ["file"]


def test_data_is_on_the_disk_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename = Path.replace
    monkeypatch.setattr(
        atomic,
        "fsync_path",
        lambda path: events.append("data" if path.suffix == PARTIAL_SUFFIX else path.name),
    )
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (events.append("rename"), rename(self, target))[1]
    )
    atomic_write(tmp_path / "new" / "folder" / "file", lambda partial: partial.touch())
    assert events == ["data", "rename", "folder", "new", tmp_path.name]


def test_removing_quietly(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert remove_quietly(tmp_path / "file")
    assert not remove_quietly(tmp_path / "file")
    assert not remove_quietly(tmp_path)
