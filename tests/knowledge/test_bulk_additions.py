"""Adding many tenants: what stays of them whatever ends the addition, and that it is really on the disk."""

import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace as replace_fields
from itertools import count
from pathlib import Path

import pytest
import torch

from hmi_engine.errors import (
    InvalidAdapterError,
    InvalidNameError,
    StoreFullError,
    TenantExistsError,
    UnknownDomainError,
)
from hmi_engine.knowledge import changes
from hmi_engine.knowledge.adapters import random_adapter
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.changes import NewTenant, save_in_batches, save_tenants
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.tenant_file import load_tenant
from hmi_engine.knowledge.verification import collect_garbage, verify

MakeTenant = Callable[..., NewTenant]
RunInChild = Callable[[Callable[[], object]], int]
BATCH = 4


def name(number: int) -> str:
    return f"t{number:04d}"


def check_holds(catalog: Catalog, names: Sequence[str], make_tenant: MakeTenant) -> None:
    """The store holds these tenants with their own weights, their files, and nothing else."""
    assert list(catalog.tenants) == sorted(names)
    assert verify(catalog.layout, catalog) == []  # checksums, and no orphan
    for info in catalog.tenants.values():
        adapter, _ = load_tenant(catalog.layout.resolve(info.file), catalog.general)
        expected = make_tenant(info.name, info.card["seed"]).adapter
        for key, block in expected.blocks.items():
            for tensor_name, tensor in block.tensors().items():
                assert torch.equal(adapter.blocks[key].tensors()[tensor_name], tensor)


def test_each_batch_is_in_the_store_before_the_next_is_drawn(
    catalog: Catalog, layout: StoreLayout, make_tenant: MakeTenant
) -> None:
    seen: list[int] = []
    steps: list[tuple[int, int | None]] = []
    with Catalog.open(layout, read_only=True) as reader:

        def tenants() -> Iterator[NewTenant]:
            for number in range(11):
                seen.append(len(reader.tenants))
                yield make_tenant(name(number), number)

        count = save_in_batches(
            catalog, tenants(), batch=BATCH, progress=lambda _, done, total: steps.append((done, total))
        )
    assert count == 11
    assert seen == [0] * 4 + [4] * 4 + [8] * 3
    assert steps == [(4, None), (8, None), (11, None)]
    check_holds(catalog, [name(number) for number in range(11)], make_tenant)
    total: list[int | None] = []
    given = [make_tenant(f"x{number}", number) for number in range(2)]
    save_in_batches(catalog, given, progress=lambda *arguments: total.append(arguments[2]))
    assert total == [2]
    assert save_in_batches(catalog, []) == 0


@pytest.mark.parametrize("batch", [1, 3, 10, None])
def test_batches_of_any_size_hold_the_same(
    catalog: Catalog, make_tenant: MakeTenant, batch: int | None
) -> None:
    given = (make_tenant(name(number), number) for number in range(7))
    assert save_in_batches(catalog, given, batch=batch) == 7
    check_holds(catalog, [name(number) for number in range(7)], make_tenant)


def test_a_batch_holds_at_least_one(catalog: Catalog, make_tenant: MakeTenant) -> None:
    with pytest.raises(ValueError, match="batch is 0"):
        save_in_batches(catalog, [make_tenant("a")], batch=0)


@pytest.mark.parametrize("error", [RuntimeError("the disk they come from is gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 1, 3, 4, 6, 8])
def test_what_the_tenants_raise_passes_through_and_whole_batches_stay(
    catalog: Catalog, make_tenant: MakeTenant, error: BaseException, at: int
) -> None:
    def tenants() -> Iterator[NewTenant]:
        for number in range(9):
            if number == at:
                raise error
            yield make_tenant(name(number), number)

    with pytest.raises(type(error)) as caught:
        save_in_batches(catalog, tenants(), batch=BATCH)
    assert caught.value is error
    check_holds(catalog, [name(number) for number in range(at // BATCH * BATCH)], make_tenant)


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_while_files_are_written_leaves_none_of_them(
    catalog: Catalog, make_tenant: MakeTenant, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Ctrl-C reaches the thread that writes tenants while others flush those before."""
    write, numbers = changes._write_tenant, iter(range(100))

    def interrupted(*arguments: object) -> object:
        written = write(*arguments)  # type: ignore[arg-type]
        if next(numbers) == BATCH + at:
            raise KeyboardInterrupt
        return written

    monkeypatch.setattr(changes, "_write_tenant", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_in_batches(catalog, (make_tenant(name(number), number) for number in range(12)), batch=BATCH)
    check_holds(catalog, [name(number) for number in range(BATCH)], make_tenant)


def test_an_interrupt_between_batches_keeps_them(catalog: Catalog, make_tenant: MakeTenant) -> None:
    def interrupt(_: str, done: int, __: int | None) -> None:
        if done == 2 * BATCH:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        given = (make_tenant(name(number), number) for number in range(20))
        save_in_batches(catalog, given, batch=BATCH, progress=interrupt)
    check_holds(catalog, [name(number) for number in range(2 * BATCH)], make_tenant)


def test_a_refused_tenant_keeps_the_batches_before_and_the_message_says_how_many(
    catalog: Catalog, general: GeneralInfo, make_tenant: MakeTenant
) -> None:
    save_tenants(catalog, [make_tenant("old", 50)])
    large = replace_fields(make_tenant("large"), adapter=random_adapter(general, "lora", 8, 1))
    limit = catalog.tenants["old"].bytes
    refused: list[tuple[NewTenant, type[Exception], str]] = [
        (make_tenant(name(1), 9), TenantExistsError, "given twice"),  # across batches
        (make_tenant(name(5), 9), TenantExistsError, "given twice"),  # within one
        (make_tenant("old", 9), TenantExistsError, "replace=True"),
        (make_tenant("../x", 9), InvalidNameError, "name"),
        (make_tenant("x", 9, "nowhere"), UnknownDomainError, "nowhere"),
        (large, InvalidAdapterError, f"more than max_bytes={limit}"),
    ]
    for tenant, expected, message in refused:
        given = [make_tenant(name(number), number) for number in range(7)] + [tenant]
        with pytest.raises(expected, match=message) as caught:
            save_in_batches(catalog, given, batch=BATCH, max_bytes=limit)
        assert "The 4 tenants given before this batch are in the store" in str(caught.value)
        assert "of this batch of 4, none is" in str(caught.value)
        check_holds(catalog, ["old", *(name(number) for number in range(4))], make_tenant)
        catalog_remove(catalog, 4)
        with pytest.raises(expected, match=r"None is in the store|\(None is"):
            save_in_batches(catalog, given, batch=None, max_bytes=limit)
        check_holds(catalog, ["old"], make_tenant)


def catalog_remove(catalog: Catalog, count: int) -> None:
    changes.remove_tenants(catalog, [name(number) for number in range(count)])


def test_a_file_of_exactly_the_limit_is_taken(catalog: Catalog, make_tenant: MakeTenant) -> None:
    (info,) = save_tenants(catalog, [make_tenant("a", 1)])
    save_in_batches(catalog, [make_tenant("b", 1)], max_bytes=info.bytes)
    with pytest.raises(InvalidAdapterError, match="max_bytes"):
        save_in_batches(catalog, [make_tenant("c", 1)], max_bytes=info.bytes - 1)
    check_holds(catalog, ["a", "b"], make_tenant)


def test_replacing_many_removes_the_old_files_and_keeps_pins(
    catalog: Catalog, make_tenant: MakeTenant
) -> None:
    names = [name(number) for number in range(10)]
    save_in_batches(catalog, (make_tenant(each, 1) for each in names), batch=BATCH)
    before = [info.id for info in catalog.tenants.values()]
    catalog.pin_tenant(names[2], True)
    save_in_batches(catalog, (make_tenant(each, 2) for each in names), batch=BATCH, replace=True)
    assert [info.card["seed"] for info in catalog.tenants.values()] == [2] * 10
    assert not {info.id for info in catalog.tenants.values()} & set(before)
    assert [info.name for info in catalog.tenants.values() if info.pinned] == [names[2]]
    check_holds(catalog, names, make_tenant)
    (info,) = save_tenants(catalog, [make_tenant(names[2], 3)], replace=True)
    assert info.pinned and catalog.tenants[names[2]] == info


def test_removing_many_is_all_or_nothing(catalog: Catalog, make_tenant: MakeTenant) -> None:
    save_tenants(catalog, [make_tenant(name(number), number) for number in range(5)])
    with pytest.raises(Exception, match="no tenant 'gone'"):
        changes.remove_tenants(catalog, [name(0), "gone"])
    check_holds(catalog, [name(number) for number in range(5)], make_tenant)
    removed = changes.remove_tenants(catalog, (name(number) for number in (0, 3)))
    assert [info.name for info in removed] == [name(0), name(3)]
    check_holds(catalog, [name(number) for number in (1, 2, 4)], make_tenant)


def fail_at(number: int, killed: list[int]) -> Callable[[int], None]:
    """An ``os.fsync`` whose call of this number does not return: the machine is off."""
    flush = os.fsync

    def flush_or_die(descriptor: int) -> None:
        killed[0] += 1
        if killed[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    return flush_or_die


@pytest.mark.parametrize("point", [1, 3, 6, 9, 12, 16, 20, 25, 30])
def test_a_process_killed_at_any_flush_leaves_whole_batches(
    catalog: Catalog, make_tenant: MakeTenant, run_in_child: RunInChild, point: int
) -> None:
    layout = catalog.layout
    catalog.close()

    def add_and_die() -> None:
        os.fsync = fail_at(point, [0])  # type: ignore[assignment]
        with Catalog.open(layout) as opened:
            given = (make_tenant(name(number), number) for number in range(40))
            save_in_batches(opened, given, batch=BATCH)

    assert run_in_child(add_and_die) == -signal.SIGKILL
    with Catalog.open(layout) as opened:
        kept = list(opened.tenants)
        assert len(kept) % BATCH == 0
        assert {problem.kind for problem in verify(layout, opened)} <= {"orphan"}
        orphans = {problem.path for problem in verify(layout, opened)}
        assert {done.path for done in collect_garbage(layout, opened)} == orphans
        check_holds(opened, [name(number) for number in range(len(kept))], make_tenant)
        rest = (make_tenant(name(number), number) for number in range(len(kept), 12))
        save_in_batches(opened, rest, batch=BATCH)
        check_holds(opened, [name(number) for number in range(max(12, len(kept)))], make_tenant)


def test_killed_batches_are_among_the_points(
    catalog: Catalog, make_tenant: MakeTenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The points of the test above lie before, between and behind commits: each batch has some of its own."""
    counts: list[int] = []
    called = [0]
    monkeypatch.setattr(os, "fsync", fail_at(0, called))
    given = (make_tenant(name(number), number) for number in range(12))
    save_in_batches(catalog, given, batch=BATCH, progress=lambda *_: counts.append(called[0]))
    assert len(counts) == 3 and counts[0] > 6 and counts[1] > counts[0] + 3 and counts[2] < 40


@pytest.mark.parametrize("limit", [100, 700])
def test_a_disk_that_fills_in_the_middle_keeps_the_batches_before(
    catalog: Catalog, make_tenant: MakeTenant, run_in_child: RunInChild, limit: int
) -> None:
    """From the ninth tenant on the operating system lets no file grow beyond the limit."""
    layout = catalog.layout
    catalog.close()

    def write_until_full() -> None:
        with Catalog.open(layout) as opened:
            # The catalog's own growth would hit the limit first, and this is about the tenants' files.
            numbers = count(1000, 100)
            opened.reserve = lambda amount=1: range(first := next(numbers), first + amount)  # type: ignore[method-assign]

            def tenants() -> Iterator[NewTenant]:
                for number in range(20):
                    if number == 2 * BATCH:
                        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                    yield make_tenant(name(number), number)

            with pytest.raises(StoreFullError, match=r"no room.*The 8 tenants given before"):
                save_in_batches(opened, tenants(), batch=BATCH)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            check_holds(opened, [name(number) for number in range(8)], make_tenant)

    assert run_in_child(write_until_full) == 0
    with Catalog.open(layout) as opened:
        check_holds(opened, [name(number) for number in range(8)], make_tenant)
        save_in_batches(opened, [make_tenant("later", 1)])


def test_a_really_full_disk_keeps_every_whole_batch(
    small_disk: Path, general: GeneralInfo, make_tenant: MakeTenant
) -> None:
    layout = StoreLayout(small_disk / "store")
    layout.general.mkdir(parents=True)
    done: list[int] = []
    with Catalog.create(layout, general) as catalog:
        with pytest.raises(StoreFullError, match="no room") as caught:
            given = (make_tenant(name(number), number) for number in range(5000))
            save_in_batches(catalog, given, batch=20, progress=lambda _, added, __: done.append(added))
        assert done and f"The {done[-1]} tenants given before" in str(caught.value)
        assert "as it was before" not in str(caught.value)
        check_holds(catalog, [name(number) for number in range(done[-1])], make_tenant)
    with Catalog.open(layout, read_only=True) as reopened:
        assert len(reopened.tenants) == done[-1]
