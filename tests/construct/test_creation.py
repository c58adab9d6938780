"""Making a store: all of it or nothing, whoever else makes one there, and on the disk under its name."""

import os
from pathlib import Path

import pytest

import hmi_engine as hmi
from hmi_engine.construct import creation
from hmi_engine.errors import StoreError, StoreExistsError


def test_who_is_second_to_make_a_store_leaves_the_first_ones(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in this process, so that their numbers of a process are the same, as in two containers."""
    path, build = tmp_path / "store", creation.build_root_table

    def make_another(*arguments, **options):
        monkeypatch.setattr(creation, "build_root_table", build)
        hmi.Store.create(path, general=tiny_bert, plot_layers=1).close()
        return build(*arguments, **options)

    monkeypatch.setattr(creation, "build_root_table", make_another)
    with pytest.raises(StoreExistsError, match="exists; choose a new folder"):
        hmi.Store.create(path, general=tiny_bert, plot_layers=2)
    with hmi.Store.open(path) as store:
        assert store.general.plot_layers == 1 and store.verify() == []
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_not_in_the_way(tiny_bert: Path, tmp_path: Path) -> None:
    left = tmp_path / f".store.{os.getpid()}.partial"
    left.mkdir()
    (left / "file").write_text("another's")
    hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=0).close()
    assert (left / "file").read_text() == "another's"


def test_a_store_below_a_file_is_an_error_of_ours(tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="cannot write"):
        hmi.Store.create(tmp_path / "file" / "store", general=tiny_bert, plot_layers=0)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_is_no_utf8_is_refused_before_anything_is_made(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"'.*\\udcff/store': the name is no UTF-8; choose another folder"):
        hmi.Store.create(tmp_path / os.fsdecode(b"\xff") / "store", general=tiny_bert, plot_layers=0)
    assert list(tmp_path.iterdir()) == []


def test_all_files_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Path | str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> Path:
        events.append("rename")
        nonlocal partial
        partial = source
        return rename(source, target)

    partial = Path()
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    path = tmp_path / "new" / "store"
    hmi.Store.create(path, general=tiny_bert, plot_layers=0).close()
    place = events.index("rename")
    written = {file for file in path.rglob("*") if file.parent.name == "general"}
    assert len(written) >= 4
    expected = {partial / file.relative_to(path) for file in written} | {partial, partial / "general"}
    assert expected <= set(events[:place])
    assert {path.parent, tmp_path} <= set(events[place:])
