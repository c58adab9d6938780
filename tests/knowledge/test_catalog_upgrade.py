"""Catalogs of the former version, as it was before tenants could be pinned."""

import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
from knowledge.test_catalog import tenant

from hmi_engine.errors import ReadOnlyStoreError, StoreVersionError
from hmi_engine.knowledge import database
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.layout import StoreLayout

# Of the release before, word for word.
TENANTS_OF_VERSION_2 = """
CREATE TABLE tenants (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, domain_id INTEGER NOT NULL REFERENCES domains (id),
    kind TEXT NOT NULL, rank INTEGER NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL,
    generation INTEGER NOT NULL, file TEXT NOT NULL UNIQUE, head_kind TEXT NOT NULL, labels TEXT NOT NULL,
    card TEXT NOT NULL, created TEXT NOT NULL);
CREATE INDEX tenants_by_domain ON tenants (domain_id);
INSERT INTO tenants VALUES (7, 'acme/one', 1, 'lora', 4, 10, 'ab', 7, 'tenants/07/7.7.safetensors',
    'classification', '["ja", "nein"]', '{"accuracy": 0.5}', '2026-01-02T03:04:05+00:00');
UPDATE counters SET last = 7;
PRAGMA user_version = 2;
"""


@pytest.fixture
def old(catalog: Catalog) -> StoreLayout:
    """A store of the former version with one tenant."""
    catalog.close()
    connection = sqlite3.connect(catalog.layout.catalog)
    connection.executescript(f"DROP TABLE tenants; {TENANTS_OF_VERSION_2}")
    connection.close()
    return catalog.layout


def stored(layout: StoreLayout) -> tuple[int, set[str]]:
    """Version and columns, as plain SQLite sees them."""
    connection = sqlite3.connect(layout.catalog)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        return version, {row[1] for row in connection.execute("PRAGMA table_info(tenants)")}
    finally:
        connection.close()


def schema(layout: StoreLayout) -> set[tuple[str, str]]:
    """Names of all tables' columns and indexes."""
    connection = sqlite3.connect(layout.catalog)
    try:
        columns = "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c"
        indexes = "SELECT tbl_name, name FROM sqlite_master WHERE type = 'index'"
        return {*connection.execute(columns), *connection.execute(indexes)}
    finally:
        connection.close()


def test_opening_for_writing_upgrades_and_keeps_everything(
    old: StoreLayout, tmp_path: Path, general: object
) -> None:
    for _ in range(2):
        with Catalog.open(old) as opened:
            info = opened.tenants["acme/one"]
            assert (info.id, info.rank, info.labels, info.card) == (7, 4, ("ja", "nein"), {"accuracy": 0.5})
            assert not info.pinned and opened.tenants.pinned() == []
            assert opened.integrity_problems() == []
    assert stored(old)[0] == 3
    fresh = StoreLayout(tmp_path / "fresh")
    fresh.general.mkdir(parents=True)
    Catalog.create(fresh, general).close()  # type: ignore[arg-type]
    assert schema(old) == schema(fresh)
    with Catalog.open(old) as opened:
        assert opened.pin_tenant("acme/one", True).pinned
        opened.add_tenants([tenant("b", *opened.reserve())])
    with Catalog.open(old, read_only=True) as opened:
        assert [info.name for info in opened.tenants.pinned()] == ["acme/one"]
        assert not opened.tenants["b"].pinned


def test_a_read_only_store_stays_as_it_is_and_can_be_read(old: StoreLayout) -> None:
    with Catalog.open(old, read_only=True) as reader:
        assert not reader.tenants["acme/one"].pinned
        assert reader.tenants.pinned() == []
        assert [info.name for info in reader.tenants.values()] == ["acme/one"]
        with pytest.raises(ReadOnlyStoreError):
            reader.pin_tenant("acme/one", True)
        assert stored(old) == (2, stored(old)[1]) and "pinned" not in stored(old)[1]
        with Catalog.open(old) as writer:  # upgrades under the reader
            writer.pin_tenant("acme/one", True)
        assert reader.tenants["acme/one"].pinned
        assert [info.name for info in reader.tenants.pinned()] == ["acme/one"]


def test_two_that_upgrade_at_once_do_it_once(old: StoreLayout) -> None:
    opened: list[Catalog] = []
    start = threading.Barrier(4)

    def open_it() -> None:
        start.wait()
        opened.append(Catalog.open(old))

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    for catalog in opened:
        assert catalog.tenants["acme/one"].id == 7
        catalog.close()
    assert stored(old)[0] == 3


def test_an_upgrade_that_fails_leaves_the_former_version(
    old: StoreLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(old)
    statements = (*database._UPGRADES[2], "INSERT INTO no_such_table VALUES (1)")
    monkeypatch.setattr(database, "_UPGRADES", {2: statements})
    with pytest.raises(Exception, match="no_such_table"):
        Catalog.open(old)
    assert stored(old) == before
    monkeypatch.undo()
    with Catalog.open(old) as opened:
        assert "acme/one" in opened.tenants


def test_earlier_versions_are_refused(old: StoreLayout) -> None:
    connection = sqlite3.connect(old.catalog)
    connection.execute("PRAGMA user_version = 1")
    connection.close()
    with pytest.raises(StoreVersionError, match="make the store again"):
        Catalog.open(old)


def test_a_copy_of_the_former_store_opens_elsewhere(old: StoreLayout, tmp_path: Path) -> None:
    copied = StoreLayout(Path(shutil.copytree(old.root, tmp_path / "elsewhere" / "store")))
    with Catalog.open(copied) as opened:
        assert list(opened.tenants) == ["acme/one"]
    assert (stored(copied)[0], stored(old)[0]) == (3, 2)
