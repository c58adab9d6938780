"""Verifying a sound store finds nothing, whatever others change meanwhile."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.changes import NewTenant, remove_domain, save_domain, save_tenants, save_traffic
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.plot_table import PlotTable
from hmi_engine.knowledge.traffic_file import TrafficCounts
from hmi_engine.knowledge.verification import verify

MakeTable = Callable[..., PlotTable]
MakeTenant = Callable[..., NewTenant]
NUM_TENANTS = 60
"""More than are looked at before the first is told of."""


@pytest.fixture
def store(catalog: Catalog, make_tenant: MakeTenant, make_table: MakeTable) -> Catalog:
    save_domain(catalog, "general", make_table([5, 6], unigrams=True))
    save_tenants(catalog, [make_tenant(f"t{number:02d}", number) for number in range(NUM_TENANTS)])
    return catalog


@pytest.fixture
def reader(store: Catalog, layout: StoreLayout) -> Iterator[Catalog]:
    with Catalog.open(layout, read_only=True) as reader:
        yield reader


@pytest.mark.parametrize("deep", [True, False])
def test_tenants_that_are_replaced_and_removed_meanwhile_are_no_problems(
    store: Catalog, reader: Catalog, make_tenant: MakeTenant, deep: bool
) -> None:
    def change(_: str, done: int, __: int | None) -> None:
        if done == 3:
            names = [f"t{number:02d}" for number in range(NUM_TENANTS)]
            save_tenants(store, [make_tenant(name, 1) for name in names[:-5]], replace=True)
            for info in store.remove_tenants(names[-5:]):
                store.layout.resolve(info.file).unlink()

    assert verify(store.layout, reader, deep=deep, progress=change) == []
    assert len(reader.tenants) == NUM_TENANTS - 5


def test_domains_that_are_replaced_and_removed_meanwhile_are_no_problems(
    store: Catalog, reader: Catalog, make_table: MakeTable, counts: TrafficCounts
) -> None:
    for number in range(32):
        save_domain(store, f"d{number:02d}", make_table([5, number + 7]), parent="general")
    save_traffic(store, "d30", counts)

    def change(_: str, done: int, __: int | None) -> None:
        if done == 3:
            for number in range(24, 29):
                for seed in (1, 2):  # twice, so that the former one's file goes too
                    save_domain(store, f"d{number:02d}", make_table([seed]))
            for number in range(29, 32):
                remove_domain(store, f"d{number:02d}")

    assert verify(store.layout, reader, progress=change) == []


@pytest.fixture
def counts() -> TrafficCounts:
    return TrafficCounts(torch.tensor([5, 9]), torch.tensor([1.0, 2.5]).double(), 3.5, 0.0, 7, 6, 2)


def test_what_is_damaged_is_found_beside_a_writer(
    store: Catalog, reader: Catalog, make_tenant: MakeTenant
) -> None:
    damaged = store.layout.resolve(store.tenants["t50"].file)
    damaged.write_bytes(b"")

    def change(_: str, done: int, __: int | None) -> None:
        if done == 3:
            save_tenants(store, [make_tenant("t40", 1)], replace=True)
            store.pin_tenant("t50", True)

    problems = verify(store.layout, reader, progress=change)
    assert [(problem.kind, problem.path) for problem in problems] == [("checksum", damaged)]


def test_a_file_that_waits_for_its_entry_is_no_orphan(
    store: Catalog, reader: Catalog, layout: StoreLayout
) -> None:
    waiting = layout.tenants / "00" / "99.99.safetensors"
    waiting.parent.mkdir(exist_ok=True)
    waiting.write_text("written, and about to be committed")
    assert verify(layout, reader) == [], "the store is open for writing"
    with Catalog.open(layout):
        assert verify(layout, store) == [], "and by another one"
    with ThreadPoolExecutor(1) as pool:
        pool.submit(store.change_lock.acquire).result()
        assert verify(layout, store) == [], "a thread of its own is changing it"
        pool.submit(store.change_lock.release).result()
    orphan = [("orphan", waiting)]
    assert [(problem.kind, problem.path) for problem in verify(layout, store)] == orphan
    store.close()
    assert [(problem.kind, problem.path) for problem in verify(layout, reader)] == orphan


def test_a_file_that_gets_its_entry_while_orphans_are_looked_for_is_none(
    store: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer commits and closes the store between the listing and the look at who is writing."""
    committed, asked = store.files, []

    def files() -> list[str]:
        asked.append(1)
        return committed() if len(asked) > 1 else committed()[1:]

    monkeypatch.setattr(store, "files", files)
    assert verify(store.layout, store) == []
    assert len(asked) == 2


def test_a_file_that_vanishes_between_two_looks_at_it_is_missing(
    store: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.layout.resolve(store.tenants["t07"].file)
    is_file = Path.is_file

    def remove_after(self: Path) -> bool:
        found = is_file(self)
        if self == path:
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", remove_after)
    assert [problem.kind for problem in verify(store.layout, store)] == ["missing"]
