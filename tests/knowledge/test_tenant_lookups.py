"""Looking tenants up: what is kept in memory is never older than the catalog, whoever changed it."""

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from knowledge.test_catalog import add_domains, tenant

from hmi_engine.errors import StoreCorruptError, UnknownTenantError
from hmi_engine.knowledge import catalog_views
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.records import TenantInfo


@pytest.fixture
def other(catalog: Catalog, layout: StoreLayout) -> Iterator[Catalog]:
    """Another connection to the same store, as another process has."""
    with Catalog.open(layout) as opened:
        yield opened


@pytest.fixture
def count_queries(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Tells how many queries the catalog has made since the last call."""
    made: list[str] = []
    query = catalog._database.query

    def counted(statement: str, parameters: tuple[object, ...] = ()) -> list[Any]:
        made.append(statement)
        return query(statement, parameters)

    monkeypatch.setattr(catalog._database, "query", counted)

    def count() -> int:
        number = len(made)
        made.clear()
        return number

    return count


def add(catalog: Catalog, *names: str, replace: bool = False) -> list[TenantInfo]:
    infos = [tenant(name, number) for name, number in zip(names, catalog.reserve(len(names)), strict=True)]
    catalog.add_tenants(infos, replace=replace)
    return infos


def test_what_was_looked_up_is_kept_until_something_changes(
    catalog: Catalog, count_queries: Callable[[], int]
) -> None:
    first, second = add(catalog, "a", "b")
    assert catalog.tenants["a"] == first and "a" in catalog.tenants and len(catalog.tenants) == 2
    count_queries()
    for _ in range(3):
        assert catalog.tenants["a"] == first and "a" in catalog.tenants and len(catalog.tenants) == 2
    assert count_queries() == 0
    assert catalog.tenants.find(["a", "b"]) == {"a": first, "b": second}
    assert count_queries() == 1
    assert catalog.tenants.find(["b", "a", "b"]) == {"b": second, "a": first}
    assert count_queries() == 0


@pytest.mark.parametrize("by_other", [False, True])
def test_changes_are_seen_at_once(catalog: Catalog, other: Catalog, by_other: bool) -> None:
    changer = other if by_other else catalog
    (old,) = add(changer, "a")
    assert catalog.tenants["a"] == old and len(catalog.tenants) == 1
    (new,) = add(changer, "a", replace=True)
    assert catalog.tenants["a"] == new and catalog.tenants.find(["a"]) == {"a": new}
    add(changer, "b")
    assert len(catalog.tenants) == 2 and "b" in catalog.tenants
    changer.pin_tenant("a", True)
    assert catalog.tenants["a"].pinned
    changer.remove_tenants(["a"])
    assert "a" not in catalog.tenants and len(catalog.tenants) == 1 and catalog.tenants.find(["a"]) == {}
    with pytest.raises(UnknownTenantError):
        _ = catalog.tenants["a"]


def test_what_a_transaction_takes_back_is_never_served(catalog: Catalog) -> None:
    (old,) = add(catalog, "a")
    (number,) = catalog.reserve()
    with pytest.raises(RuntimeError), catalog._database.transaction() as connection:
        connection.execute("UPDATE tenants SET rank = 99")
        assert catalog.tenants["a"].rank == 99 and catalog.tenants.find(["a"])["a"].rank == 99
        connection.execute("DELETE FROM tenants")
        assert len(catalog.tenants) == 0 and "a" not in catalog.tenants
        raise RuntimeError
    assert catalog.tenants["a"] == old and len(catalog.tenants) == 1 and "a" in catalog.tenants
    # One transaction that replaces the same name twice, and then fails.
    newer = [tenant("a", number), tenant("a", number + 1), tenant("x", number + 2, "gone", 99)]
    with pytest.raises(Exception, match="'gone'"):
        catalog.add_tenants(newer, replace=True)
    assert catalog.tenants["a"] == old


def test_any_history_of_two_connections_reads_like_a_dictionary(catalog: Catalog, other: Catalog) -> None:
    dice = random.Random(6)
    names = [f"{folder}/{letter}" for folder in ("acme", "acme2", "beta") for letter in "abcd"]
    expected: dict[str, TenantInfo] = {}
    for _ in range(250):
        changer, reader = dice.sample([catalog, other], 2)
        name = dice.choice(names)
        match dice.choice(["add", "remove", "pin", "read", "read"]):
            case "add":
                pinned = name in expected and expected[name].pinned
                (info,) = add(changer, name, replace=True)
                expected[name] = info.model_copy(update={"pinned": pinned})
            case "remove" if name in expected:
                assert changer.remove_tenants([name]) == [expected.pop(name)]
            case "pin" if name in expected:
                pinned = dice.random() < 0.5
                expected[name] = expected[name].model_copy(update={"pinned": pinned})
                assert changer.pin_tenant(name, pinned) == expected[name]
        for view in (reader.tenants, changer.tenants):
            wanted = dice.sample(names, 5)
            assert view.find(wanted) == {each: expected[each] for each in wanted if each in expected}
            assert view.get(name) == expected.get(name)
            assert (name in view, len(view), list(view)) == (
                name in expected,
                len(expected),
                sorted(expected),
            )
            assert view.pinned() == [expected[each] for each in sorted(expected) if expected[each].pinned]
            prefix = dice.choice(["", "a", "acme", "acme/", "acme2/c", "z", "beta/d"])
            chosen = [expected[each] for each in sorted(expected) if each.startswith(prefix)]
            assert list(view.iterate_infos(prefix)) == chosen and view.count(prefix) == len(chosen)


def test_readers_in_threads_never_see_less_than_was_committed_before_they_asked(
    catalog: Catalog, other: Catalog
) -> None:
    committed = [add(other, "a")[0].generation]
    done = threading.Event()
    faults: list[object] = []
    reads = [0, 0, 0]

    def read(reader: int) -> None:
        while not done.is_set():
            before = committed[0]
            found = catalog.tenants["a"] if reader else catalog.tenants.find(["a"])["a"]
            if found.generation < before:
                faults.append((found.generation, before))
            reads[reader] += 1

    threads = [threading.Thread(target=read, args=(reader,)) for reader in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(150):
        committed[0] = add(other, "a", replace=True)[0].generation
    done.set()
    for thread in threads:
        thread.join()
    assert faults == [] and min(reads) > 0


def test_memory_is_bounded_and_every_answer_right(
    catalog: Catalog, count_queries: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"t{number:03d}" for number in range(200)]
    infos = dict(zip(names, add(catalog, *names), strict=True))
    size = catalog_views._BYTES_OF_INFO
    monkeypatch.setattr(catalog_views, "MAX_KEPT_BYTES", 50 * size)
    for _ in range(2):
        assert all(catalog.tenants[name] == info for name, info in infos.items())
        assert len(catalog.tenants._known.infos) < 50
    assert catalog.tenants.find(names) == infos
    assert len(catalog.tenants._known.infos) < 50
    assert catalog.tenants[names[7]] == infos[names[7]]
    count_queries()
    assert catalog.tenants[names[7]] == infos[names[7]]
    assert count_queries() == 0, "the last ones are kept"
    (large,) = catalog.reserve()
    card = {"text": "x" * 50 * size}
    catalog.add_tenants([tenant("large", large).model_copy(update={"card": card})])
    assert catalog.tenants["large"].card == card and "large" not in catalog.tenants._known.infos


def test_a_damaged_entry_hides_no_other(catalog: Catalog) -> None:
    (_, sound) = add(catalog, "damaged", "sound")
    with catalog._database.transaction() as connection:
        connection.execute("UPDATE tenants SET labels = '[1' WHERE name = 'damaged'")
    assert catalog.tenants.find(["damaged", "sound"]) == {"sound": sound}
    with pytest.raises(StoreCorruptError, match="'damaged' is damaged"):
        _ = catalog.tenants["damaged"]


@pytest.mark.parametrize("name", ["\ud800", "a\x00b", "", "acme/%", "a" * 100_000, "'; DROP TABLE tenants"])
def test_names_that_no_tenant_can_have_are_unknown(catalog: Catalog, name: str) -> None:
    (info,) = add(catalog, "a")
    assert name not in catalog.tenants
    assert catalog.tenants.find([name, "a"]) == {"a": info}
    assert catalog.tenants.get(name) is None
    with pytest.raises(UnknownTenantError):
        _ = catalog.tenants[name]
    if name:
        assert list(catalog.tenants.iterate_infos(name)) == [] and catalog.tenants.count(name) == 0


def test_domains_of_tenants_are_those_of_now(catalog: Catalog, other: Catalog) -> None:
    (domain,) = add_domains(catalog, "chemistry")
    info = tenant("a", *catalog.reserve(), "chemistry", domain.id)
    catalog.add_tenants([info])
    assert catalog.tenants["a"].domain == "chemistry"
    with other._database.transaction() as connection:
        connection.execute("UPDATE domains SET name = 'physics' WHERE id = ?", (domain.id,))
    assert catalog.tenants["a"].domain == catalog.tenants.find(["a"])["a"].domain == "physics"
