from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hmi_engine.errors import StoreBusyError, StoreCorruptError
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.changes import NewTenant, save_domain, save_tenants
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.plot_table import PlotTable
from hmi_engine.knowledge.verification import Problem, repair, verify

MakeTable = Callable[..., PlotTable]
MakeTenant = Callable[..., NewTenant]


@pytest.fixture
def store(catalog: Catalog, make_table: MakeTable, make_tenant: MakeTenant) -> Catalog:
    save_domain(catalog, "general", make_table([], unigrams=True))
    save_domain(catalog, "chemistry", make_table([5, 6, 7]), parent="general")
    save_tenants(catalog, [make_tenant("one", 1), make_tenant("acme/two", 2, "chemistry")])
    return catalog


def check(catalog: Catalog, *, deep: bool = True) -> list[Problem]:
    return verify(catalog.layout, catalog, deep=deep)


def plot_path(catalog: Catalog, domain: str = "chemistry") -> Path:
    return catalog.layout.resolve(str(catalog.domains[domain].file))


def tenant_path(catalog: Catalog) -> Path:
    return catalog.layout.resolve(catalog.tenants["one"].file)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_sound_store_has_no_problems_and_reports_progress(store: Catalog) -> None:
    steps: list[tuple[int, int | None]] = []
    assert verify(store.layout, store, progress=lambda _, done, total: steps.append((done, total))) == []
    assert steps == [(done, 6) for done in range(1, 7)]
    assert check(store, deep=False) == []


def test_read_only_stores_can_be_verified(store: Catalog, layout: StoreLayout) -> None:
    with Catalog.open(layout, read_only=True) as reader:
        assert verify(layout, reader) == []


@pytest.mark.parametrize("find", [plot_path, tenant_path, lambda store: store.layout.general / "config.json"])
def test_every_kind_of_file_is_checked(store: Catalog, find: Callable[[Catalog], Path]) -> None:
    path = find(store)
    content = path.read_bytes()
    flip_last_byte(path)
    assert [(problem.kind, problem.path) for problem in check(store)] == [("checksum", path)]
    assert check(store, deep=False) == []
    path.write_bytes(content[:-1])
    for deep in (True, False):
        assert [(problem.kind, problem.path) for problem in check(store, deep=deep)] == [("checksum", path)]
    path.unlink()
    problems = check(store, deep=False)
    assert [(problem.kind, problem.path, problem.repairable) for problem in problems] == [
        ("missing", path, False)
    ]
    assert repair(store.layout, store, problems) == []


def test_contents_that_do_not_fit_are_found_though_the_checksum_does(
    store: Catalog, make_table: MakeTable
) -> None:
    """A table that some other program made wrongly and catalogued correctly."""
    table = make_table([5, 6, 7])
    used = table.index[:, 0] != 0
    swapped, doubled, outside, unknown = (table.index.clone() for _ in range(4))
    swapped[used, 1] = swapped[used, 1].roll(1)
    doubled[used, 1] = 0
    outside[used, 1] = torch.tensor([0, 1, 3])
    unknown[used, 0] = torch.tensor([5, 6, 8])
    empty = torch.zeros_like(table.index)
    not_finite = table.rows.clone()
    not_finite[1, 1, 1] = torch.inf
    faulty = [replace(table, index=index) for index in (swapped, doubled, outside, unknown, empty)]
    for wrong in [*faulty, replace(table, rows=not_finite)]:
        save_domain(store, "chemistry", wrong)
        (problem,) = check(store)
        assert (problem.kind, problem.path) == ("content", plot_path(store))
    save_domain(store, "chemistry", table)
    assert check(store) == []


def test_entries_that_do_not_fit_their_file_are_found(store: Catalog) -> None:
    with store._database.transaction() as connection:
        connection.execute("UPDATE domains SET rows = 4 WHERE name = 'chemistry'")
        connection.execute("UPDATE tenants SET labels = '[\"a\"]' WHERE name = 'one'")
    assert [(problem.kind, problem.path) for problem in check(store, deep=False)] == [
        ("content", plot_path(store)),
        ("content", tenant_path(store)),
    ]


def test_a_changed_base_is_found(store: Catalog) -> None:
    store.set_general(store.general.model_copy(update={"plot_layers": 3}))
    assert {(problem.kind, problem.path.suffix) for problem in check(store, deep=False)} == {
        ("content", ".safetensors")
    }


def test_dangling_references_and_forged_paths_are_found(store: Catalog, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("not ours")
    with store._database.transaction() as connection:
        connection.execute("UPDATE tenants SET file = '../victim' WHERE name = 'one'")
        connection.execute("UPDATE domains SET file = '/etc/passwd' WHERE name = 'chemistry'")
    kinds = [problem.kind for problem in check(store)]
    assert kinds == ["catalog", "catalog"]
    stray = Problem("orphan", plot_path(store, "general"), "", repairable=True)
    with pytest.raises(StoreCorruptError, match="outside"):
        repair(store.layout, store, [stray])
    store._database._connection.execute("PRAGMA foreign_keys = OFF")
    with store._database.transaction() as connection:
        connection.execute("UPDATE tenants SET domain_id = 99 WHERE name = 'one'")
    problems = check(store)
    assert any("refers to a missing row of domains" in problem.message for problem in problems)
    with pytest.raises(StoreCorruptError, match="nothing is removed"):
        repair(store.layout, store, problems)
    assert victim.read_text() == "not ours"


def test_orphans_are_found_and_only_they_are_removed(store: Catalog) -> None:
    layout = store.layout
    strays = [
        layout.tenants / "00" / "99.99.safetensors",
        layout.tenants / "ff" / "1.1.safetensors.0011aabb.partial",
        layout.domains / "99" / "1.plot.safetensors",
        layout.general / "model.safetensors.0011aabb.partial",
        layout.root / "catalog.sqlite.0011aabb.partial",
    ]
    for stray in strays:
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_text("left")
    mine = layout.root / "notes.txt"
    mine.write_text("mine")
    problems = check(store, deep=False)
    assert {problem.path for problem in problems} == {*strays}
    assert all(problem.kind == "orphan" and problem.repairable for problem in problems)
    forged = [
        Problem("orphan", path, "", repairable=True)
        for path in (tenant_path(store), mine, Path("/etc/passwd"))
    ]
    assert set(repair(layout, store, [*problems, *forged])) == {*strays}
    assert check(store) == []
    assert mine.read_text() == "mine"
    assert repair(layout, store, problems) == []


def test_nothing_is_removed_while_another_writes(store: Catalog, layout: StoreLayout) -> None:
    stray = layout.tenants / "stray"
    stray.write_text("being written")
    with Catalog.open(layout), pytest.raises(StoreBusyError):
        repair(layout, store, check(store))
    assert stray.exists()
    assert repair(layout, store, check(store)) == [stray]


def test_a_damaged_catalog_is_found(store: Catalog, layout: StoreLayout) -> None:
    store._database._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    content = bytearray(layout.catalog.read_bytes())
    page = 4096
    for start in range(3 * page, len(content), page):
        content[start + 8 : start + 16] = b"\xff" * 8
    layout.catalog.write_bytes(content)
    with Catalog.open(layout, read_only=True) as damaged:
        problems = verify(layout, damaged)
        assert {problem.kind for problem in problems} == {"catalog"}
