import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from pathlib import Path

import pytest

from hmi_engine.errors import (
    DomainExistsError,
    DomainInUseError,
    InvalidNameError,
    ReadOnlyStoreError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreExistsError,
    StoreNotFoundError,
    StoreVersionError,
    TenantExistsError,
    UnknownDomainError,
    UnknownTenantError,
    UnsupportedModelError,
)
from hmi_engine.knowledge import database
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.records import DomainInfo, TenantInfo

NOW = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone.utc)


def tenant(name: str, number: int, domain: str = "general", domain_id: int = 1) -> TenantInfo:
    return TenantInfo(
        id=number,
        name=name,
        domain_id=domain_id,
        domain=domain,
        kind="lora",
        rank=4,
        bytes=10,
        sha256="ab",
        generation=number,
        file=f"tenants/00/{number}.{number}.safetensors",
        head_kind="classification",
        labels=("ja", "nein"),
        card={"accuracy": 0.5, "note": "ü"},
        created=NOW,
    )


def domain(name: str, number: int, parent: DomainInfo, identity: str = "base-layers") -> DomainInfo:
    return DomainInfo(
        id=number,
        name=name,
        parent_id=parent.id,
        parent=parent.name,
        generation=number,
        file=f"domains/{number}/{number}.plot.safetensors",
        bytes=10,
        sha256="cd",
        rows=3,
        unigrams=True,
        layer_identity=identity,
        corpus_tokens=100,
        min_count=2,
        admission_count=5,
        card={},
        created=NOW,
    )


def add_domains(catalog: Catalog, *names: str, identity: str = "base-layers") -> list[DomainInfo]:
    """Adds a path of domains below the root."""
    parent, added = catalog.domains["general"], []
    for name in names:
        parent = domain(name, catalog.reserve()[0], parent, identity)
        catalog.add_domain(parent)
        added.append(parent)
    return added


def test_a_new_catalog_has_the_general_knowledge_and_the_root(catalog: Catalog, general: GeneralInfo) -> None:
    assert catalog.general == general
    assert [file.name for file in catalog.general_files()] == ["config.json", "vocabulary/words.txt"]
    assert list(catalog.domains) == ["general"]
    assert catalog.domains["general"].layer_identity == general.domain_layers
    assert len(catalog.tenants) == 0
    assert catalog.integrity_problems() == []


def test_everything_survives_reopening(catalog: Catalog, layout: StoreLayout) -> None:
    (path,) = add_domains(catalog, "chemistry")
    catalog.add_tenants([tenant("acme/one", *catalog.reserve(), "chemistry", path.id)])
    expected = (catalog.tenants["acme/one"], catalog.domains["chemistry"])
    assert expected[0].card == {"accuracy": 0.5, "note": "ü"}
    assert expected[0].labels == ("ja", "nein")
    assert expected[0].created == NOW
    assert expected[1] == path
    catalog.close()
    for read_only in (False, True):
        with Catalog.open(layout, read_only=read_only) as reopened:
            assert (reopened.tenants["acme/one"], reopened.domains["chemistry"]) == expected


def test_creating_twice_or_from_an_impossible_base_is_refused(
    catalog: Catalog, layout: StoreLayout, general: GeneralInfo, tmp_path: Path
) -> None:
    with pytest.raises(StoreExistsError):
        Catalog.create(layout, general)
    with pytest.raises(UnsupportedModelError):
        Catalog.create(StoreLayout(tmp_path / "other"), general.model_copy(update={"plot_layers": 9}))
    assert not (tmp_path / "other").exists()


def test_general_can_be_replaced(catalog: Catalog, layout: StoreLayout, general: GeneralInfo) -> None:
    (layout.general / "merge.safetensors").write_bytes(b"new")
    changed = general.model_copy(update={"domain_layers": "distilled"})
    catalog.set_general(changed)
    assert catalog.general == changed
    assert [file.name for file in catalog.general_files()][1] == "merge.safetensors"


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"no store.*hmi init"):
        Catalog.open(StoreLayout(tmp_path))
    with pytest.raises(StoreNotFoundError):
        Catalog.open(StoreLayout(tmp_path / "gone"), read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_store_below_a_folder_whose_name_is_no_utf8(
    catalog: Catalog, layout: StoreLayout, tmp_path: Path
) -> None:
    catalog.close()
    folder = tmp_path / os.fsdecode(b"na\xefve % ?#\n")
    folder.mkdir()
    moved = StoreLayout(layout.root.rename(folder / "store"))
    with Catalog.open(moved) as opened, Catalog.open(moved, read_only=True) as reader:
        add_domains(opened, "chemistry")
        assert list(reader.domains) == ["chemistry", "general"]


def test_a_catalog_that_is_no_catalog(tmp_path: Path) -> None:
    layout = StoreLayout(tmp_path)
    layout.catalog.write_bytes(b"not a database at all " * 100)
    with pytest.raises(StoreCorruptError, match="damaged"):
        Catalog.open(layout)
    layout.catalog.unlink()
    with sqlite3.connect(layout.catalog) as connection:
        connection.execute("CREATE TABLE tenants (x)")
    connection.close()
    with pytest.raises(StoreCorruptError, match="no catalog of an HMI store"):
        Catalog.open(layout)


def test_a_store_of_a_newer_version_names_both_versions(catalog: Catalog, layout: StoreLayout) -> None:
    catalog.close()
    connection = sqlite3.connect(layout.catalog)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    for read_only in (False, True):
        with pytest.raises(StoreVersionError, match=r"format 7; this HMI reads up to 3"):
            Catalog.open(layout, read_only=read_only)


def test_durability_settings(catalog: Catalog) -> None:
    def pragma(name: str) -> object:
        return catalog._database.query(f"PRAGMA {name}")[0][0]

    assert (pragma("journal_mode"), pragma("synchronous"), pragma("foreign_keys")) == ("wal", 2, 1)


def test_numbers_are_never_given_twice(catalog: Catalog, layout: StoreLayout) -> None:
    given: list[int] = []
    for count in (1, 3, 0, 2):
        given += catalog.reserve(count)
    catalog.add_tenants([tenant("a", given[-1])])
    catalog.remove_tenants(["a"])
    catalog.close()
    with Catalog.open(layout) as reopened:
        given += reopened.reserve(2)
    assert given == sorted(set(given))
    assert 1 not in given


def test_views_are_ordered_mappings(catalog: Catalog) -> None:
    names = ["b", "acme/x", "Z", "a.1", "0"] + [f"n{number:04d}" for number in range(1200)]
    catalog.add_tenants(
        [tenant(name, number) for name, number in zip(names, catalog.reserve(len(names)), strict=True)]
    )
    assert len(catalog.tenants) == len(names)
    assert list(catalog.tenants) == sorted(names)
    assert [info.name for info in catalog.tenants.values()] == sorted(names)
    assert len(catalog.tenants.values()) == len(names)
    assert [name for name, info in catalog.tenants.items() if info.rank == 4][:3] == sorted(names)[:3]
    assert "b" in catalog.tenants
    assert "c" not in catalog.tenants
    assert 3 not in catalog.tenants
    assert catalog.tenants.get("c") is None
    assert catalog.tenants.get("b").name == "b"


def test_unknown_names_get_a_suggestion(catalog: Catalog) -> None:
    with pytest.raises(UnknownTenantError, match="it has none yet"):
        _ = catalog.tenants["acme/chemprot"]
    catalog.add_tenants([tenant("acme/chemprot", *catalog.reserve())])
    with pytest.raises(UnknownTenantError, match="did you mean 'acme/chemprot'"):
        _ = catalog.tenants["acme/chemport"]
    with pytest.raises(UnknownTenantError, match="hmi tenant list"):
        _ = catalog.tenants["zzz"]
    with pytest.raises(UnknownTenantError):
        _ = catalog.tenants[3]  # type: ignore[index]
    with pytest.raises(UnknownDomainError, match="did you mean 'general'"):
        _ = catalog.domains["genral"]
    with pytest.raises(UnknownTenantError):
        catalog.remove_tenants(["zzz"])
    with pytest.raises(UnknownDomainError):
        catalog.remove_domain("zzz")


def test_many_tenants_are_added_all_or_none(catalog: Catalog) -> None:
    first, second, third = catalog.reserve(3)
    catalog.add_tenants([tenant("a", first)])
    with pytest.raises(TenantExistsError, match="replace=True"):
        catalog.add_tenants([tenant("b", second), tenant("a", third)])
    with pytest.raises(InvalidNameError):
        catalog.add_tenants([tenant("b", second), tenant("../c", third)])
    with pytest.raises(UnknownDomainError, match="'gone'"):
        catalog.add_tenants([tenant("b", second), tenant("c", third, "gone", 99)])
    assert list(catalog.tenants) == ["a"]


def test_replacing_returns_the_old_entry_and_needs_a_newer_generation(catalog: Catalog) -> None:
    old, newer = tenant("a", *catalog.reserve()), tenant("a", *catalog.reserve())
    catalog.add_tenants([old])
    assert catalog.add_tenants([newer], replace=True) == [old]
    assert catalog.tenants["a"] == newer
    with pytest.raises(StoreBusyError, match="meanwhile"):
        catalog.add_tenants([old], replace=True)
    assert catalog.tenants["a"] == newer
    assert catalog.remove_tenants(["a"]) == [newer]
    assert "a" not in catalog.tenants


def test_domains_replace_in_place_and_keep_children_and_tenants(catalog: Catalog) -> None:
    parent, child = add_domains(catalog, "parent", "child")
    catalog.add_tenants([tenant("t", *catalog.reserve(), "parent", parent.id)])
    (number,) = catalog.reserve()
    changed = parent.model_copy(update={"generation": number, "rows": 99, "file": f"domains/2/{number}.x"})
    assert catalog.replace_domain(changed) == parent
    assert catalog.domains["parent"] == changed
    assert catalog.domains["child"] == child
    assert catalog.tenants["t"].domain == "parent"
    assert catalog.integrity_problems() == []
    with pytest.raises(StoreBusyError, match="meanwhile"):
        catalog.replace_domain(parent)
    with pytest.raises(StoreBusyError, match="made again"):
        catalog.replace_domain(changed.model_copy(update={"id": 77}))


def test_domains_in_use_stay(catalog: Catalog) -> None:
    parent, child = add_domains(catalog, "parent", "child")
    catalog.add_tenants([tenant("t", *catalog.reserve(), "child", child.id)])
    with pytest.raises(DomainInUseError, match="0 tenants and 1 children"):
        catalog.remove_domain("parent")
    with pytest.raises(DomainInUseError, match="1 tenants and 0 children"):
        catalog.remove_domain("child")
    with pytest.raises(DomainInUseError, match="root"):
        catalog.remove_domain("general")
    catalog.remove_tenants(["t"])
    assert catalog.remove_domain("child") == child
    assert catalog.remove_domain("parent") == parent
    assert list(catalog.domains) == ["general"]


def test_domains_are_refused_like_tenants(catalog: Catalog) -> None:
    (parent,) = add_domains(catalog, "parent")
    with pytest.raises(DomainExistsError):
        catalog.add_domain(domain("parent", *catalog.reserve(), parent))
    with pytest.raises(InvalidNameError):
        catalog.add_domain(domain("../x", *catalog.reserve(), parent))
    with pytest.raises(UnknownDomainError, match="'gone'"):
        catalog.add_domain(
            domain("x", *catalog.reserve(), parent.model_copy(update={"id": 99, "name": "gone"}))
        )


def test_the_chain_ends_where_the_layers_change(catalog: Catalog) -> None:
    add_domains(catalog, "science", "chemistry")
    assert [node.name for node in catalog.chain("chemistry")] == ["chemistry", "science", "general"]
    assert [node.name for node in catalog.chain("general")] == ["general"]
    (own,) = add_domains(catalog, "law", identity="law-layers")
    catalog.add_domain(domain("patents", *catalog.reserve(), own, "law-layers"))
    assert [node.name for node in catalog.chain("patents")] == ["patents", "law"]
    with pytest.raises(UnknownDomainError):
        catalog.chain("physics")


def test_a_tree_with_a_loop_is_corrupt(catalog: Catalog) -> None:
    parent, child = add_domains(catalog, "parent", "child")
    with catalog._database.transaction() as connection:
        connection.execute("UPDATE domains SET parent_id = ? WHERE id = ?", (child.id, parent.id))
    with pytest.raises(StoreCorruptError, match="own ancestor"):
        catalog.chain("child")


def test_a_damaged_entry_is_corrupt_and_named(catalog: Catalog) -> None:
    catalog.add_tenants([tenant("a", *catalog.reserve())])
    with catalog._database.transaction() as connection:
        connection.execute("UPDATE tenants SET labels = '[1'")
    with pytest.raises(StoreCorruptError, match="tenant 'a' is damaged"):
        _ = catalog.tenants["a"]


def test_read_only_catalogs_refuse_every_change(
    catalog: Catalog, layout: StoreLayout, general: GeneralInfo
) -> None:
    catalog.add_tenants([tenant("a", *catalog.reserve())])
    root = catalog.domains["general"]
    with Catalog.open(layout, read_only=True) as reader:
        changes: list[Callable[[], object]] = [
            reader.reserve,
            lambda: reader.add_tenants([tenant("b", 50)]),
            lambda: reader.remove_tenants(["a"]),
            lambda: reader.add_domain(domain("d", 50, root)),
            lambda: reader.replace_domain(root),
            lambda: reader.remove_domain("general"),
            lambda: reader.set_general(general),
            lambda: reader.alone().__enter__(),
        ]
        for change in changes:
            with pytest.raises(ReadOnlyStoreError, match="read_only=True"):
                change()
        catalog.add_tenants([tenant("b", *catalog.reserve())])
        assert list(reader.tenants) == ["a", "b"]


@pytest.fixture
def without_memory(layout: StoreLayout) -> Callable[[], AbstractContextManager[None]]:
    """In its with-statement SQLite can make no shared memory, as in a folder that may not be written."""

    @contextmanager
    def block() -> Iterator[None]:
        obstacle = layout.catalog.with_name(f"{layout.catalog.name}-shm")
        obstacle.symlink_to("nowhere")  # which SQLite does not follow
        try:
            yield
        finally:
            obstacle.unlink()

    return block


def test_who_may_not_write_in_the_folder_sees_every_change(
    catalog: Catalog, layout: StoreLayout, without_memory: Callable[[], AbstractContextManager[None]]
) -> None:
    catalog.close()
    with without_memory():
        reader = Catalog.open(layout, read_only=True)
        versions = [reader.version]
        assert list(reader.domains) == ["general"] and len(reader.tenants) == 0
        assert reader.version == versions[0], "nothing has changed"
    with Catalog.open(layout) as writer:
        add_domains(writer, "chemistry")
        writer.add_tenants([tenant("acme", 50)])
    with without_memory():  # the writer has gone, and taken its log with it
        versions.append(reader.version)
        assert list(reader.domains) == ["chemistry", "general"] and list(reader.tenants) == ["acme"]
        assert reader.tenants["acme"].id == 50 and len(reader.tenants) == 1
    with Catalog.open(layout) as writer:  # stays: its log is read too
        writer.remove_tenants(["acme"])
        versions.append(reader.version)
        assert len(reader.tenants) == 0 and "acme" not in reader.tenants
        writer.add_tenants([tenant("acme", 51)])
        versions.append(reader.version)
        assert reader.tenants["acme"].id == 51
    assert len(set(versions)) == 4
    reader.close()
    with pytest.raises(StoreError):
        _ = reader.version


def test_a_log_without_its_memory_is_refused_where_none_can_be_made(
    catalog: Catalog,
    layout: StoreLayout,
    without_memory: Callable[[], AbstractContextManager[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the log holds would be missing."""
    monkeypatch.setattr(database, "_SETTLE_SECONDS", 0.0)
    add_domains(catalog, "chemistry")
    copied = layout.catalog.with_name("copy").with_suffix(".wal")
    log = layout.catalog.with_name(f"{layout.catalog.name}-wal")
    shutil.copy(log, copied)
    catalog.close()
    copied.rename(log)
    with without_memory(), pytest.raises(ReadOnlyStoreError, match="cannot be opened"):
        Catalog.open(layout, read_only=True)


def test_a_long_writer_makes_others_busy(
    catalog: Catalog, layout: StoreLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.05)
    with (
        Catalog.open(layout) as second,
        catalog._database.transaction(),
        pytest.raises(StoreBusyError, match="later"),
    ):
        second.reserve()


def test_threads_share_a_catalog(catalog: Catalog) -> None:
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for number in catalog.reserve(20):
                catalog.add_tenants([tenant(f"w{worker}-{number}", number)])
                assert f"w{worker}-{number}" in catalog.tenants
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(catalog.tenants) == 80


def test_a_closed_catalog_says_so(catalog: Catalog) -> None:
    catalog.close()
    catalog.close()
    with pytest.raises(StoreError, match="closed"):
        len(catalog.tenants)


def test_only_one_may_be_alone(catalog: Catalog, layout: StoreLayout) -> None:
    with catalog.alone():
        with pytest.raises(StoreBusyError, match="repair"):
            Catalog.open(layout)
        Catalog.open(layout, read_only=True).close()
    with Catalog.open(layout), pytest.raises(StoreBusyError, match="open for writing"), catalog.alone():
        pass
    with catalog.alone():
        pass


@pytest.fixture
def file_size_limit(catalog: Catalog) -> Iterator[None]:
    """Keeps the catalog from growing: SQLite's own limit gives the same error as a full disk."""
    (pages,) = catalog._database.query("PRAGMA page_count")[0]
    catalog._database.query(f"PRAGMA max_page_count = {pages}")
    yield
    catalog._database.query("PRAGMA max_page_count = 1000000")


def test_a_full_disk_keeps_the_old_entries(catalog: Catalog, file_size_limit: None) -> None:
    many = [tenant(f"t{number}", number) for number in catalog.reserve(500)]
    with pytest.raises(StoreError, match="no room") as caught:
        catalog.add_tenants(many)
    assert type(caught.value).__name__ == "StoreFullError"
    assert len(catalog.tenants) == 0
    assert catalog.integrity_problems() == []
