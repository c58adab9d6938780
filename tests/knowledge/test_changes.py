"""Changes of a store: what they keep, and that a crash or a full disk at any point leaves old or new."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from hmi_engine.errors import (
    DomainExistsError,
    InvalidAdapterError,
    InvalidHeadError,
    InvalidNameError,
    ReadOnlyStoreError,
    StoreFullError,
    TenantExistsError,
    UnknownDomainError,
    UnknownTenantError,
)
from hmi_engine.knowledge import tenant_file
from hmi_engine.knowledge.adapters import Adapter, LoraBlock, Site
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.changes import (
    NewTenant,
    remove_domain,
    remove_tenants,
    save_domain,
    save_tenants,
    save_traffic,
)
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import ClassificationHead
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.plot_table import PlotTable, open_plot
from hmi_engine.knowledge.tenant_file import load_tenant
from hmi_engine.knowledge.traffic_file import TrafficCounts
from hmi_engine.knowledge.verification import repair, verify

MakeTable = Callable[..., PlotTable]
MakeTenant = Callable[..., NewTenant]
RunInChild = Callable[[Callable[[], object]], int]
CRASHED = 9


def stored_files(layout: StoreLayout) -> set[str]:
    folders = (layout.domains, layout.tenants)
    return {
        path.relative_to(layout.root).as_posix()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_tenants_are_saved_described_replaced_and_removed(
    catalog: Catalog, general: GeneralInfo, make_tenant: MakeTenant
) -> None:
    (first,) = save_tenants(catalog, [make_tenant("acme/one", 1)])
    assert catalog.tenants["acme/one"] == first
    assert (first.kind, first.rank, first.head_kind, first.card) == ("lora", 2, "classification", {"seed": 1})
    assert first.labels == ("no", "yes", "naïve")
    (second,) = save_tenants(catalog, [make_tenant("acme/one", 2)], replace=True)
    assert second.generation > first.generation
    assert stored_files(catalog.layout) == {second.file}
    adapter, _ = load_tenant(catalog.layout.resolve(second.file), general)
    expected = make_tenant("acme/one", 2).adapter
    for key, block in expected.blocks.items():
        assert all(
            torch.equal(adapter.blocks[key].tensors()[name], value) for name, value in block.tensors().items()
        )
    assert remove_tenants(catalog, ["acme/one"]) == [second]
    assert stored_files(catalog.layout) == set()
    with pytest.raises(UnknownTenantError):
        remove_tenants(catalog, ["acme/one"])


def test_a_head_that_cannot_be_kept_leaves_the_one_that_it_was_to_replace(
    catalog: Catalog, make_tenant: MakeTenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept,) = save_tenants(catalog, [make_tenant("acme/one", 1)])
    tenant = make_tenant("acme/one", 2)
    labels = tuple(f"label {number}" for number in range(300))
    head = ClassificationHead(labels, torch.zeros(300, 8), torch.zeros(300), "cls")
    monkeypatch.setattr(tenant_file, "MAX_HEADER_BYTES", 4096)  # a real one takes seconds to fill
    with pytest.raises(InvalidHeadError, match="300 labels do not fit"):
        save_tenants(catalog, [NewTenant("acme/one", "general", tenant.adapter, head)], replace=True)
    assert catalog.tenants["acme/one"] == kept
    assert stored_files(catalog.layout) == {kept.file}
    assert verify(catalog.layout, catalog) == []


def test_many_tenants_are_one_change(catalog: Catalog, make_tenant: MakeTenant) -> None:
    infos = save_tenants(catalog, [make_tenant(f"t{seed}", seed) for seed in range(300)])
    assert len(catalog.tenants) == len(infos) == 300
    assert verify(catalog.layout, catalog) == []
    assert save_tenants(catalog, []) == []


def test_a_tenant_that_is_refused_leaves_nothing(
    catalog: Catalog, make_tenant: MakeTenant, classification_head: ClassificationHead
) -> None:
    save_tenants(catalog, [make_tenant("old")])
    before = stored_files(catalog.layout)
    lower = Adapter({(0, Site.QUERY): LoraBlock(torch.ones(8, 1), torch.ones(1, 8), 1.0)})
    wide_head = ClassificationHead(("a",), torch.ones(1, 9), torch.ones(1), "mean")
    refused: list[tuple[NewTenant, type[Exception]]] = [
        (make_tenant("../x"), InvalidNameError),
        (make_tenant("old"), TenantExistsError),
        (make_tenant("new"), TenantExistsError),
        (make_tenant("x", 0, "nowhere"), UnknownDomainError),
        (NewTenant("x", "general", lower, classification_head), InvalidAdapterError),
        (NewTenant("x", "general", Adapter({}), wide_head), InvalidHeadError),
    ]
    for tenant, expected in refused:
        with pytest.raises(expected):
            save_tenants(catalog, [make_tenant("new"), tenant])
    assert list(catalog.tenants) == ["old"]
    assert stored_files(catalog.layout) == before


def test_domains_are_saved_updated_and_removed(
    catalog: Catalog, general: GeneralInfo, make_table: MakeTable
) -> None:
    root = save_domain(catalog, "general", make_table([], unigrams=True))
    assert (root.id, root.parent, root.rows, root.unigrams) == (1, None, 0, True)
    first = save_domain(catalog, "chemistry", make_table([5, 6]), parent="general", card={"text": "x"})
    assert catalog.domains["chemistry"] == first
    opened = open_plot(catalog.layout.resolve(str(first.file)), general)
    second = save_domain(catalog, "chemistry", make_table([5, 6, 7], seed=1))
    assert (second.id, second.rows, second.parent, second.card) == (first.id, 3, "general", {"text": "x"})
    assert torch.equal(opened.rows, make_table([5, 6]).rows)
    assert stored_files(catalog.layout) == {root.file, first.file, second.file}
    with pytest.raises(DomainExistsError):
        save_domain(catalog, "chemistry", make_table([1]), parent="general")
    with pytest.raises(UnknownDomainError):
        save_domain(catalog, "law", make_table([1]))
    with pytest.raises(InvalidNameError):
        save_domain(catalog, "../x", make_table([1]), parent="general")
    assert remove_domain(catalog, "chemistry") == second
    assert stored_files(catalog.layout) == {root.file}
    assert verify(catalog.layout, catalog) == []


class LineTracer:
    """Counts the lines run of a change's code; before line ``crash_at`` it ends the process."""

    files = ("changes.py", "atomic.py", "database.py", "tensor_file.py")

    def __init__(self, crash_at: int | None = None) -> None:
        self.num_lines = 0
        self.crash_at = crash_at

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.name not in self.files or path.parent.name != "knowledge":
            return None
        if event == "line":
            if self.num_lines == self.crash_at:
                os._exit(CRASHED)
            self.num_lines += 1
        return self

    def run(self, function: Callable[[], object]) -> None:
        sys.settrace(self)
        try:
            function()
        finally:
            sys.settrace(None)


CHANGES: dict[str, Callable[[Catalog, MakeTenant, MakeTable], object]] = {
    "add": lambda catalog, tenant, _: save_tenants(catalog, [tenant("new", 3)]),
    "add many": lambda catalog, tenant, _: save_tenants(catalog, [tenant("new", 3), tenant("new2", 4)]),
    "replace": lambda catalog, tenant, _: save_tenants(catalog, [tenant("old", 3)], replace=True),
    "remove": lambda catalog, *_: remove_tenants(catalog, ["old"]),
    "add domain": lambda catalog, _, table: save_domain(catalog, "law", table([8, 9]), parent="general"),
    "update domain": lambda catalog, _, table: save_domain(catalog, "chemistry", table([8, 9])),
    "remove domain": lambda catalog, *_: remove_domain(catalog, "chemistry"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_crash_at_any_point_leaves_old_or_new(
    catalog: Catalog,
    make_tenant: MakeTenant,
    make_table: MakeTable,
    run_in_child: RunInChild,
    tmp_path: Path,
    change: str,
) -> None:
    """The process dies before one of the change's lines; the store then opens, and at most has orphans."""
    save_tenants(catalog, [make_tenant("old", 1)])
    save_domain(catalog, "chemistry", make_table([5]), parent="general")
    old = contents(catalog)
    catalog.close()

    def run(layout: StoreLayout, tracer: LineTracer) -> None:
        with Catalog.open(layout) as opened:
            tracer.run(lambda: CHANGES[change](opened, make_tenant, make_table))

    complete = LineTracer()
    run(copy_store(catalog.layout, tmp_path / "complete"), complete)
    with Catalog.open(StoreLayout(tmp_path / "complete")) as opened:
        new = contents(opened)
    # Points spread over the whole change, and all points near its commit and the removal of old files.
    points = {*range(0, complete.num_lines, max(complete.num_lines // 10, 1))}
    points |= {*range(complete.num_lines - 9, complete.num_lines)}
    seen = []
    for point in sorted(points):
        layout = copy_store(catalog.layout, tmp_path / str(point))
        assert run_in_child(lambda: run(layout, LineTracer(point))) == CRASHED  # noqa: B023
        with Catalog.open(layout) as opened:
            problems = verify(layout, opened)
            assert {problem.kind for problem in problems} <= {"orphan"}
            repair(layout, opened, problems)
            assert verify(layout, opened) == []
            seen.append(contents(opened))
    assert seen[0] == old != new
    assert seen == [old] * seen.count(old) + [new] * seen.count(new)


def contents(catalog: Catalog) -> tuple[set[tuple[str, Any]], ...]:
    """Names, and what tells old from new: a tenant's seed and a table's number of rows."""
    tenants = {(info.name, info.card["seed"]) for info in catalog.tenants.values()}
    return tenants, {(info.name, info.rows) for info in catalog.domains.values()}


def copy_store(layout: StoreLayout, root: Path) -> StoreLayout:
    shutil.copytree(layout.root, root)
    return StoreLayout(root)


@pytest.mark.parametrize("limit", [0, 100, 700, 900])
def test_a_disk_that_is_full_while_writing_keeps_the_old_state(
    catalog: Catalog, make_tenant: MakeTenant, make_table: MakeTable, run_in_child: RunInChild, limit: int
) -> None:
    """The operating system refuses to let any file grow beyond the limit, as it does on a full disk."""
    layout = catalog.layout
    save_tenants(catalog, [make_tenant("old", 1)])
    save_domain(catalog, "chemistry", make_table([5]), parent="general")
    before = stored_files(layout)
    tables = catalog.tenants["old"], catalog.domains["chemistry"]
    catalog.close()

    def write_with_limit() -> None:
        with Catalog.open(layout) as opened:
            opened.reserve = lambda count=1: range(50, 50 + count)  # type: ignore[method-assign]
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            for change in ("add", "add many", "replace", "add domain", "update domain"):
                with pytest.raises(StoreFullError, match="no room"):
                    CHANGES[change](opened, make_tenant, make_table)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    assert run_in_child(write_with_limit) == 0
    with Catalog.open(layout) as opened:
        assert (opened.tenants["old"], opened.domains["chemistry"]) == tables
        assert stored_files(layout) == before
        assert verify(layout, opened) == []
        save_tenants(opened, [make_tenant("new", 2)])


def test_an_interrupt_after_the_commit_does_not_remove_what_was_committed(
    catalog: Catalog, make_tenant: MakeTenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = catalog.add_tenants

    def add_then_interrupt(*arguments: Any, **options: Any) -> None:
        add(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog, "add_tenants", add_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_tenants(catalog, [make_tenant("new")])
    assert "new" in catalog.tenants
    assert verify(catalog.layout, catalog) == []


def test_an_interrupt_after_the_commit_of_traffic_keeps_its_file(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = catalog.add_traffic

    def add_then_interrupt(traffic: Any) -> None:
        add(traffic)
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog, "add_traffic", add_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_traffic(catalog, "general", TrafficCounts.none())
    assert len(catalog.traffic_files()) == 1
    assert verify(catalog.layout, catalog) == []

    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog, "add_traffic", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_traffic(catalog, "general", TrafficCounts.none())
    assert verify(catalog.layout, catalog) == [], "what was not committed is removed"


def test_files_and_their_folders_are_flushed_once_and_before_the_commit(
    catalog: Catalog, make_tenant: MakeTenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    flush, add = os.fsync, catalog.add_tenants

    def record_flush(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        flushed.append(path.relative_to(catalog.layout.root).as_posix())
        flush(descriptor)

    def record_commit(*arguments: Any, **options: Any) -> object:
        flushed.append("commit")
        return add(*arguments, **options)

    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(catalog, "add_tenants", record_commit)
    infos = save_tenants(catalog, [make_tenant(f"t{seed}", seed) for seed in range(5)])
    folders = {Path(info.file).parent.as_posix() for info in infos}
    assert set(flushed[:5]) == {info.file for info in infos}
    assert set(flushed[5:-1]) == folders | {"tenants", "."}
    assert flushed[-1] == "commit"
    assert len(flushed) == len(set(flushed)) == 5 + len(folders) + 3


def test_a_really_full_disk_keeps_every_tenant_that_was_saved(
    small_disk: Path, general: GeneralInfo, make_tenant: MakeTenant
) -> None:
    layout = StoreLayout(small_disk / "store")
    layout.general.mkdir(parents=True)
    saved = []
    with Catalog.create(layout, general) as catalog:
        with pytest.raises(StoreFullError, match="no room"):
            for seed in range(1000):
                name = f"t{seed:03d}"
                save_tenants(catalog, [make_tenant(name, seed)])
                saved.append(name)
        assert list(catalog.tenants) == saved != []
        assert verify(layout, catalog) == []
    with Catalog.open(layout, read_only=True) as reopened:
        assert list(reopened.tenants) == saved


def test_a_store_on_a_read_only_disk_can_be_read(
    small_disk: Path, general: GeneralInfo, make_tenant: MakeTenant
) -> None:
    layout = StoreLayout(small_disk / "store")
    layout.general.mkdir(parents=True)
    with Catalog.create(layout, general) as catalog:
        save_tenants(catalog, [make_tenant("a")])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with Catalog.open(layout, read_only=True) as reader:
        assert list(reader.tenants) == ["a"]
        assert verify(layout, reader) == []
    with pytest.raises(ReadOnlyStoreError):
        Catalog.open(layout)
