"""Files that belong to nobody: found by listing, removed alone; and verification in threads."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hmi_engine.errors import ReadOnlyStoreError, StoreBusyError, StoreCorruptError
from hmi_engine.knowledge import verification
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.changes import NewTenant, save_domain, save_tenants
from hmi_engine.knowledge.file_checks import Problem
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.leftovers import remove_unused
from hmi_engine.knowledge.locks import FolderLock
from hmi_engine.knowledge.plot_table import PlotTable
from hmi_engine.knowledge.verification import collect_garbage, verify

MakeTenant = Callable[..., NewTenant]
NUM_TENANTS = 40


@pytest.fixture
def store(catalog: Catalog, make_tenant: MakeTenant, make_table: Callable[..., PlotTable]) -> Catalog:
    save_domain(catalog, "general", make_table([5, 6], unigrams=True))
    save_tenants(catalog, [make_tenant(f"t{number:02d}", number) for number in range(NUM_TENANTS)])
    return catalog


def forget(catalog: Catalog, count: int) -> set[Path]:
    """Entries are gone and their files are not, as after a crash between the two."""
    infos = list(catalog.tenants.values())[:count]
    catalog.remove_tenants([info.name for info in infos])
    return {catalog.layout.resolve(info.file) for info in infos}


def all_files(layout: StoreLayout) -> set[Path]:
    return {path for path in layout.root.rglob("*") if not path.is_dir() or path.is_symlink()}


def test_garbage_is_collected_and_nothing_else(store: Catalog) -> None:
    orphans = forget(store, 7)
    strays = {
        store.layout.tenants / "00" / "1.1.safetensors.0011aabb.partial",
        store.layout.tenants / "new" / "deep" / "file",
        store.layout.domains / "9" / "9.plot.safetensors",
        store.layout.builds / "stray",
    }
    for stray in strays:
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_text("left")
    link = store.layout.tenants / "link"
    link.symlink_to(store.layout.general)
    before = all_files(store.layout)
    steps: list[tuple[int, int | None]] = []
    removed = collect_garbage(
        store.layout, store, progress=lambda _, done, total: steps.append((done, total))
    )
    gone = orphans | strays | {link}
    assert {done.path for done in removed} == gone
    assert all_files(store.layout) == before - gone
    assert steps == [(done, len(gone)) for done in range(1, len(gone) + 1)]
    assert verify(store.layout, store) == []
    assert (store.layout.general / "config.json").exists()
    assert collect_garbage(store.layout, store) == []


def test_files_of_an_undone_change_stay_where_nobody_can_tell_what_was_committed(
    store: Catalog, layout: StoreLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = layout.traffic_file(1, 99)
    layout.resolve(file).parent.mkdir(parents=True, exist_ok=True)
    layout.resolve(file).write_text("counts")

    def fail() -> list[str]:
        raise StoreCorruptError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(store, "files", fail)
        remove_unused(store, [file])
    assert layout.resolve(file).exists()
    used = store.files()
    remove_unused(store, [file, *used])
    assert not layout.resolve(file).exists()
    assert used and all(layout.resolve(each).exists() for each in used)


def test_an_interrupted_build_is_no_garbage(store: Catalog) -> None:
    lock = FolderLock(store.layout.builds / "0123456789abcdef", busy="busy")
    lock.describe("words")
    lock.release()
    assert collect_garbage(store.layout, store) == []
    assert [problem.kind for problem in verify(store.layout, store)] == ["unfinished"]


def test_garbage_is_not_collected_beside_a_writer_or_a_damaged_or_read_only_catalog(
    store: Catalog, layout: StoreLayout
) -> None:
    orphans = forget(store, 2)
    with Catalog.open(layout), pytest.raises(StoreBusyError):
        collect_garbage(layout, store)
    with Catalog.open(layout, read_only=True) as reader, pytest.raises(ReadOnlyStoreError):
        collect_garbage(layout, reader)
    with store._database.transaction() as connection:
        connection.execute("UPDATE tenants SET file = '../x' WHERE name = 't30'")
    with pytest.raises(StoreCorruptError, match="outside"):
        collect_garbage(layout, store)
    assert all(path.exists() for path in orphans)


def test_a_file_whose_entry_spells_its_path_otherwise_is_no_orphan(store: Catalog) -> None:
    info = store.tenants["t05"]
    folder, name = info.file.rsplit("/", 1)
    with store._database.transaction() as connection:
        connection.execute("UPDATE tenants SET file = ? WHERE name = 't05'", (f"./{folder}//{name}",))
    path = store.layout.root / info.file
    assert collect_garbage(store.layout, store) == []
    assert path.exists() and verify(store.layout, store) == []


def test_each_folder_is_listed_once_and_the_catalog_asked_a_few_times(
    store: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries: list[str] = []
    query = store._database.query

    def counted(statement: str, parameters: tuple[object, ...] = ()) -> list[Any]:
        queries.append(statement)
        return query(statement, parameters)

    forget(store, NUM_TENANTS // 2)
    monkeypatch.setattr(store._database, "query", counted)
    collect_garbage(store.layout, store)
    assert len(queries) < 10 < NUM_TENANTS // 2


def test_problems_come_in_the_order_of_the_files_whatever_thread_is_first(
    store: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check takes another time, and some find something."""
    check = verification.tenant_problems

    def slow(layout: StoreLayout, info: Any, *arguments: Any, **options: Any) -> list[Problem]:
        time.sleep(0.004 * (info.id % 3))
        return check(layout, info, *arguments, **options)

    monkeypatch.setattr(verification, "tenant_problems", slow)
    infos = list(store.tenants.values())
    damaged = [store.layout.resolve(infos[number].file) for number in (3, 4, 20, 39)]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    steps: list[int] = []
    problems = verify(store.layout, store, progress=lambda _, done, __: steps.append(done))
    assert [(problem.kind, problem.path) for problem in problems] == [("checksum", path) for path in damaged]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) == NUM_TENANTS + 3


def test_an_interrupted_verification_stops_its_threads_and_changes_nothing(store: Catalog) -> None:
    before = {path: path.read_bytes() for path in all_files(store.layout) if path.suffix == ".safetensors"}
    threads = set(threading.enumerate())

    def interrupt(_: str, done: int, __: int | None) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        verify(store.layout, store, progress=interrupt)
    assert set(threading.enumerate()) <= threads, "while the traceback is still held"
    assert caught.type is KeyboardInterrupt
    assert {path: path.read_bytes() for path in before} == before
    assert verify(store.layout, store) == []


def test_an_interrupted_collection_goes_on_when_asked_again(store: Catalog, layout: StoreLayout) -> None:
    orphans = forget(store, 6)

    def interrupt(_: str, done: int, __: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_garbage(layout, store, progress=interrupt)
    left = {path for path in orphans if path.exists()}
    assert len(left) == 3
    with Catalog.open(layout):  # the lock was given back
        pass
    assert {done.path for done in collect_garbage(layout, store)} == left
    assert verify(layout, store) == []


def test_folders_that_vanish_while_they_are_listed_are_empty(store: Catalog) -> None:
    shutil.rmtree(store.layout.domains)
    problems = verify(store.layout, store, deep=False)
    assert {problem.kind for problem in problems} == {"missing"}
