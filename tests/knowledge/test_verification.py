import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hmi_engine.errors import StoreBusyError, StoreCorruptError
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.changes import NewTenant, remove_domain, remove_tenants, save_domain, save_tenants
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.locks import FolderLock
from hmi_engine.knowledge.plot_table import PlotTable
from hmi_engine.knowledge.row_formats import RowFormat
from hmi_engine.knowledge.traffic_file import TrafficCounts, write_traffic
from hmi_engine.knowledge.verification import Problem, Repair, repair, verify

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
    assert [(problem.kind, problem.path) for problem in problems] == [("missing", path)]
    if find is not plot_path:
        assert not problems[0].repairable
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
    for index in (swapped, doubled, outside, unknown, empty):
        save_domain(store, "chemistry", replace(table, index=index))
        (problem,) = [found for found in check(store) if found.path == plot_path(store)]
        assert problem.kind == "content" and "index" in problem.message
    for _ in range(2):  # the generation before is checked too
        save_domain(store, "chemistry", table)
    assert check(store) == []


def keys(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def broken_rows(table: PlotTable) -> PlotTable:
    rows = table.rows.clone()
    rows[1, 1, 1] = torch.inf
    return replace(table, rows=rows)


def of_format(table: PlotTable, row_format: RowFormat, **tensors: torch.Tensor) -> PlotTable:
    metadata = table.metadata.model_copy(update={"row_format": row_format})
    return replace(table, metadata=metadata, **tensors)


INT8 = {"rows": torch.ones(3, 2, 8, dtype=torch.int8), "row_scales": torch.ones(3, 2)}
PQ8 = {"rows": torch.ones(3, 2, 2, dtype=torch.uint8), "codebooks": torch.ones(2, 2, 256, 4).half()}


@pytest.mark.parametrize("table_format", ["float16", "int8", "pq8"])
def test_tables_of_every_row_format_are_sound(
    store: Catalog, make_table: MakeTable, table_format: str
) -> None:
    table = make_table([5, 6, 7])
    tensors = {"float16": {}, "int8": INT8, "pq8": PQ8}[table_format]
    candidates = {"candidate_keys": keys(1, 2, 9), "candidate_counts": keys(1, 1, 3)}
    save_domain(store, "chemistry", replace(of_format(table, table_format, **tensors), **candidates))
    assert check(store) == []
    assert store.domains["chemistry"].row_format == table_format


WRONG_CONTENTS: dict[str, tuple[Callable[[PlotTable], PlotTable], str]] = {
    "infinite row": (broken_rows, "rows hold NaN or infinity"),
    "infinite scale": (
        lambda table: of_format(table, "int8", **INT8 | {"row_scales": torch.full((3, 2), torch.inf)}),
        "row scales hold NaN",
    ),
    "codebook of NaN": (
        lambda table: of_format(table, "pq8", **PQ8 | {"codebooks": PQ8["codebooks"] * torch.nan}),
        "codebooks hold NaN",
    ),
    "count of zero": (lambda table: replace(table, row_counts=keys(2, 0, 1)), "row counts are not positive"),
    "unsorted candidates": (
        lambda table: replace(table, candidate_keys=keys(9, 8), candidate_counts=keys(1, 1)),
        "candidate keys are not ascending",
    ),
    "candidate twice": (
        lambda table: replace(table, candidate_keys=keys(8, 8), candidate_counts=keys(1, 1)),
        "candidate keys are not ascending and distinct",
    ),
    "negative candidate": (
        lambda table: replace(table, candidate_keys=keys(8), candidate_counts=keys(-1)),
        "candidate counts are not positive",
    ),
    "candidate with a row": (
        lambda table: replace(table, candidate_keys=keys(6, 8), candidate_counts=keys(1, 1)),
        "1 candidates have a row",
    ),
    "documents": (lambda table: replace(table, documents=keys(3, 2)), "digests"),
    "weight": (
        lambda table: replace(table, metadata=table.metadata.model_copy(update={"occurrence_weight": -1.0})),
        "occurrence_weight is",
    ),
}


@pytest.mark.parametrize("case", WRONG_CONTENTS)
def test_wrong_contents_are_found_and_named(store: Catalog, make_table: MakeTable, case: str) -> None:
    change, message = WRONG_CONTENTS[case]
    sound = make_table([5, 6, 7])
    save_domain(store, "chemistry", sound)
    save_domain(store, "chemistry", change(sound))
    (problem,) = check(store)
    assert (problem.kind, problem.path) == ("content", plot_path(store))
    assert message in problem.message
    assert check(store, deep=False) == []
    (repaired,) = [
        found for found in repair(store.layout, store, [problem]) if "removed" not in found.message
    ]
    assert "domain 'chemistry' is back at generation" in repaired.message
    assert check(store) == []


def test_rows_that_are_not_sorted_are_found(store: Catalog, make_table: MakeTable) -> None:
    save_domain(store, "chemistry", make_table([5, 7, 6]))
    (problem,) = check(store)
    assert "row keys are not ascending" in problem.message


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip_last_byte,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "other header": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("domain", ["general", "chemistry"])
def test_a_damaged_table_gives_way_to_the_generation_before(
    store: Catalog, make_table: MakeTable, damage: str, domain: str
) -> None:
    unigrams = domain == "general"
    before = store.domains[domain]
    save_domain(store, domain, make_table([8, 9], unigrams=unigrams, seed=1))
    path = plot_path(store, domain)
    DAMAGES[damage](path)
    problems = check(store)
    assert {(problem.path, problem.repairable) for problem in problems} == {(path, True)}
    assert "falls back to the generation before" in problems[0].message
    done = repair(store.layout, store, problems)
    assert f"domain {domain!r} is back at generation {before.generation}" in done[0].message
    after = store.domains[domain]
    assert (after.file, after.sha256, after.rows) == (before.file, before.sha256, before.rows)
    assert after.previous is None and after.generation > before.generation
    if damage == "a folder":
        path.rmdir()
    assert check(store) == [] and not path.exists()
    save_domain(store, domain, make_table([10], unigrams=unigrams, seed=2))
    assert check(store) == []


def test_a_table_without_a_sound_generation_before_is_dropped(store: Catalog, make_table: MakeTable) -> None:
    save_domain(store, "chemistry", make_table([8, 9]))
    previous = store.domains["chemistry"].previous
    assert previous is not None
    flip_last_byte(plot_path(store))
    store.layout.resolve(previous.file).unlink()
    problems = check(store)
    assert [problem.kind for problem in problems] == ["checksum", "missing"]
    assert "hmi domain update" in problems[0].message
    done = repair(store.layout, store, problems)
    assert "no rows of its own" in done[0].message
    assert check(store) == []
    info = store.domains["chemistry"]
    assert (info.file, info.rows, info.previous) == (None, 0, None)
    assert [node.name for node in store.chain("chemistry")] == ["chemistry", "general"]


def test_a_root_without_a_sound_generation_is_told_of_and_left(store: Catalog) -> None:
    path = plot_path(store, "general")
    flip_last_byte(path)
    (problem,) = check(store)
    assert not problem.repairable and "make the store" in problem.message
    assert repair(store.layout, store, [problem, problem._replace(repairable=True)]) == []
    assert path.exists() and check(store) == [problem]


def test_a_generation_of_other_domain_layers_cannot_stand_in(store: Catalog, make_table: MakeTable) -> None:
    info = store.domains["chemistry"]
    other = make_table([8, 9])
    other = replace(other, metadata=other.metadata.model_copy(update={"layer_identity": "own"}))
    save_domain(store, "chemistry", other)
    assert store.domains["chemistry"].previous == info.plot_file()
    flip_last_byte(plot_path(store))
    (problem,) = check(store)
    assert "no sound generation" in problem.message
    repair(store.layout, store, [problem])
    assert store.domains["chemistry"].file is None
    # The older file is no entry's any more.
    assert [found.kind for found in check(store)] == ["orphan"]


def test_a_damaged_generation_before_is_forgotten(store: Catalog, make_table: MakeTable) -> None:
    save_domain(store, "chemistry", make_table([8, 9]))
    previous = store.domains["chemistry"].previous
    assert previous is not None
    flip_last_byte(store.layout.resolve(previous.file))
    (problem,) = check(store)
    assert problem.path == store.layout.resolve(previous.file) and problem.repairable
    done = repair(store.layout, store, [problem])
    assert [repaired.path for repaired in done] == [problem.path] * 2  # forgotten, removed
    assert check(store) == []
    assert store.domains["chemistry"].rows == 2


def save_traffic(store: Catalog) -> Path:
    """A file of counted traffic of domain chemistry, in the catalog."""
    (number,) = store.reserve()
    domain_id = store.domains["chemistry"].id
    file = f"domains/{domain_id}/{number}.traffic.safetensors"
    path = store.layout.resolve(file)
    counts = TrafficCounts(keys(5, 9), torch.tensor([1.0, 2.5]).double(), 3.5, 0.0, 7, 6, 2)
    row = (number, domain_id, file, write_traffic(path, counts), path.stat().st_size, 7)
    with store._database.transaction() as connection:
        connection.execute(
            "INSERT INTO traffic (id, domain_id, file, sha256, bytes, tokens) VALUES (?, ?, ?, ?, ?, ?)", row
        )
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_traffic_is_dropped_and_sound_traffic_stays(store: Catalog, damage: str) -> None:
    sound, damaged = save_traffic(store), save_traffic(store)
    assert check(store) == [] and len(store.traffic_files()) == 2
    DAMAGES[damage](damaged)
    (problem,) = check(store)
    assert problem.path == damaged and problem.repairable
    done = repair(store.layout, store, [problem])
    assert "7 tokens of traffic" in done[0].message
    if damage == "a folder":
        damaged.rmdir()
    assert check(store) == [] and sound.exists() and not damaged.exists()
    assert len(store.traffic_files()) == 1


def test_a_new_generation_keeps_the_traffic(store: Catalog, make_table: MakeTable) -> None:
    path = save_traffic(store)
    save_domain(store, "chemistry", make_table([8, 9]))
    assert len(store.traffic_files()) == 1 and path.exists()


def test_a_removed_domain_leaves_no_file(store: Catalog, make_table: MakeTable) -> None:
    save_domain(store, "organic", make_table([20]), parent="general")
    save_domain(store, "organic", make_table([21]))
    folder = plot_path(store, "organic").parent
    remove_domain(store, "organic")
    assert check(store) == [] and not folder.exists()
    remove_tenants(store, ["acme/two"])
    path = save_traffic(store)
    remove_domain(store, "chemistry")
    assert check(store) == [] and not path.exists()


def test_what_is_sound_by_now_stays(store: Catalog, make_table: MakeTable) -> None:
    save_domain(store, "chemistry", make_table([8, 9]))
    path = plot_path(store)
    content = path.read_bytes()
    flip_last_byte(path)
    problems = check(store)
    path.write_bytes(content)
    assert repair(store.layout, store, problems) == []
    assert store.domains["chemistry"].rows == 2


def test_a_repair_waits_for_a_change_of_its_own_process(store: Catalog) -> None:
    stray = store.layout.domains / "9" / "9.plot.safetensors"
    stray.parent.mkdir()
    stray.write_text("about to be committed")
    problems, done = check(store), []
    thread = threading.Thread(target=lambda: done.append(repair(store.layout, store, problems)))
    with store.change_lock:
        thread.start()
        thread.join(0.1)
        assert stray.exists() and done == []
    thread.join()
    assert not stray.exists()


def test_interrupted_builds_are_found_and_removed_but_not_running_ones(store: Catalog) -> None:
    builds = store.layout.builds
    lock = FolderLock(builds / "0123456789abcdef", busy="busy")
    lock.describe("acme/words")
    (lock.path.parent / "rows.rows").write_bytes(b"rows")
    assert check(store) == []
    lock.release()
    (problem,) = check(store)
    assert (problem.kind, problem.path, problem.repairable) == ("unfinished", lock.path.parent, True)
    assert "'acme/words'" in problem.message and "same command again" in problem.message
    with_lock = FolderLock(problem.path, busy="busy")
    assert repair(store.layout, store, [problem]) == [] and problem.path.exists()
    with_lock.release()
    assert repair(store.layout, store, [problem]) == [Repair(problem.path, f"removed {problem.path}")]
    assert check(store) == [] and list(builds.iterdir()) == []


def test_loops_in_the_tree_are_found(store: Catalog, make_table: MakeTable) -> None:
    save_domain(store, "organic", make_table([20]), parent="chemistry")
    with store._database.transaction() as connection:
        (number,) = connection.execute("SELECT id FROM domains WHERE name = 'organic'").fetchone()
        connection.execute("UPDATE domains SET parent_id = ? WHERE name = 'chemistry'", (number,))
    problems = check(store)
    assert {problem.kind for problem in problems} == {"catalog"}
    assert {"'chemistry'" in problem.message for problem in problems} == {True, False}


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
    assert {repaired.path for repaired in repair(layout, store, [*problems, *forged])} == {*strays}
    assert check(store) == []
    assert mine.read_text() == "mine"
    assert repair(layout, store, problems) == []


def test_nothing_is_removed_while_another_writes(store: Catalog, layout: StoreLayout) -> None:
    stray = layout.tenants / "stray"
    stray.write_text("being written")
    with Catalog.open(layout), pytest.raises(StoreBusyError):
        repair(layout, store, check(store))
    assert stray.exists()
    assert repair(layout, store, check(store)) == [Repair(stray, f"removed {stray}")]


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
