"""Residency where a plain example says more than a random sequence."""

import pytest
import torch
from arena_accounts import GRANULE, assert_nothing_is_lost, names_in

from hmi_engine.errors import (
    EngineClosedError,
    HmiError,
    OverloadedError,
    StoreCorruptError,
    UnknownTenantError,
)
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.tenant_reader import TenantReader


@pytest.fixture
def reads(monkeypatch):
    """How many tenants each call read from files."""
    counts = []
    load = TenantReader.load

    def counted(self, wanted):
        counts.append(len(wanted))
        return load(self, wanted)

    monkeypatch.setattr(TenantReader, "load", counted)
    return counts


def test_a_batch_is_read_by_one_call_and_a_header_once(open_residency, add_tenant, reads):
    infos = [add_tenant(f"t{number}", 8, number) for number in range(6)]
    residency = open_residency(100)
    with residency.holding([*infos, infos[0]]) as residents:
        assert all(isinstance(each, ResidentTenant) for each in residents) and residents[0] is residents[-1]
    assert reads == [6] and residency._reader.headers_read == 6
    assert residency.statistics.misses == residency.statistics.loads == residency.statistics.files_read == 6
    small = open_residency(3)
    for _ in range(3):
        for info in infos:
            with small.holding([info]):
                pass
    assert small.statistics.loads > 12, "they went and came again"
    assert small._reader.headers_read == 6, "and their headers were known"


def test_who_is_needed_next_stays_and_the_last_needed_goes(open_residency, add_tenant):
    infos = [add_tenant(f"t{number}", 64, 0) for number in range(4)]  # equally large
    size = -(-infos[0].bytes // GRANULE)
    residency = open_residency(2 * size)
    for info in infos[:2]:
        with residency.holding([info]):
            pass
    # t0, then t1 are waited for: both stay in the way of t2, so the one needed last goes.
    tickets = residency.expect([[infos[0]], [infos[1]]])
    with residency.holding([infos[2]]):
        assert names_in(residency) == {"t0", "t2"}
    residency.release(tickets[1])
    with residency.holding([infos[3]]):
        assert names_in(residency) == {"t0", "t3"}, "t2, whom nobody waits for, went"
    residency.release(tickets[0])


def test_prefetch_takes_no_room_from_queued_requests(open_residency, add_tenant):
    infos = [add_tenant(f"t{number}", 64, 0) for number in range(4)]
    residency = open_residency(2 * -(-infos[0].bytes // GRANULE))
    with residency.holding(infos[:2]):
        pass
    tickets = residency.expect([[infos[0]], [infos[1]]])
    assert residency.prefetch(infos[2:]) == 0 and names_in(residency) == {"t0", "t1"}
    residency.release(tickets[1])
    assert residency.prefetch(infos[2:]) == 1 and names_in(residency) == {"t0", "t2"}
    residency.release(tickets[0])
    assert residency.prefetch(infos) == 2, "those of one call do not push each other out"


def test_prefetch_says_what_cannot_be(open_residency, add_tenant, store):
    large, good, damaged = add_tenant("large", 128, 1), add_tenant("good", 8), add_tenant("damaged", 8)
    store.layout.resolve(damaged.file).write_bytes(b"")
    residency = open_residency(4)
    with pytest.raises(OverloadedError, match=r"'large' needs \d+ bytes.*host_memory"):
        residency.prefetch([large, good])
    with pytest.raises(StoreCorruptError):
        residency.prefetch([damaged, good])
    assert names_in(residency) == {"good"}


def test_pinned_tenants_stay_and_leave_when_unpinned(open_residency, add_tenant, store):
    infos = [add_tenant(f"t{number}", 64, 0) for number in range(5)]
    size = -(-infos[0].bytes // GRANULE)
    store.pin_tenant("t0")
    residency = open_residency(2 * size)
    residency.load_pinned(store.tenants.pinned())
    assert names_in(residency) == {"t0"} and residency.batch_bytes == size * GRANULE
    for _ in range(3):
        for info in infos[1:]:
            with residency.holding([info]):
                assert "t0" in names_in(residency)
    with residency.holding(infos[1:3]) as (_, second):
        assert isinstance(second, OverloadedError) and f"pinned tenants take {size * GRANULE}" in str(second)
    store.unpin_tenant("t0")
    with residency.holding(infos[1:3]) as residents:
        assert not any(isinstance(each, HmiError) for each in residents)
    assert "t0" not in names_in(residency)


def test_more_pinned_than_memory(open_residency, add_tenant, store):
    for number in range(3):
        add_tenant(f"t{number}", 64, 0)
        store.pin_tenant(f"t{number}")
    needed = 3 * -(-store.tenants["t0"].bytes // GRANULE)
    residency = open_residency(needed - 1)
    with pytest.raises(OverloadedError, match=r"3 pinned tenants need \d+ bytes.*unpin some.*host_memory"):
        residency.load_pinned(store.tenants.pinned())
    assert residency.num_resident == 0
    with pytest.raises(OverloadedError):
        residency.prefetch(store.tenants.pinned())
    open_residency(needed).load_pinned(store.tenants.pinned())


def test_a_damaged_pinned_tenant_keeps_no_engine_from_starting(open_residency, add_tenant, store):
    for name in ("good", "damaged"):
        add_tenant(name, 8)
        store.pin_tenant(name)
    store.layout.resolve(store.tenants["damaged"].file).write_bytes(b"x" * 100)
    residency = open_residency(20)
    residency.load_pinned(store.tenants.pinned())
    assert names_in(residency) == {"good"}


def test_a_large_tenant_fits_between_small_ones_that_stay(open_residency, add_tenant, store):
    """Pinned ones lie apart from each other, until they are moved together."""
    small = [add_tenant(f"s{number}", 0, number) for number in range(6)]
    gaps = [add_tenant(f"g{number}", 64, 0) for number in range(5)]
    size = -(-gaps[0].bytes // GRANULE)
    residency = open_residency(6 + 5 * size)
    for pair in zip(small, gaps, strict=False):
        with residency.holding(pair):
            pass
    with residency.holding([small[5]]):
        pass
    for info in small:
        store.pin_tenant(info.name)
    large = add_tenant("large", 128, 0)
    assert large.bytes > gaps[0].bytes + 2 * GRANULE
    with residency.holding([large]) as (resident,):
        assert isinstance(resident, ResidentTenant)
        assert {info.name for info in small} <= names_in(residency)
    assert residency.statistics.moves > 0 and residency.statistics.bytes_moved > 0


def test_a_tenant_in_use_is_not_moved(open_residency, add_tenant):
    first, middle, last = (add_tenant(name, 64, 0) for name in ("first", "middle", "last"))
    size = -(-first.bytes // GRANULE)
    residency = open_residency(3 * size)
    for info in (first, middle, last):
        with residency.holding([info]):
            pass
    large = add_tenant("large", 128, 0)
    with residency.holding([middle]) as (held,):
        lies = held.parameters.clone()
        with residency.holding([large]) as (outcome,):
            assert isinstance(outcome, OverloadedError), "free memory lies on both sides of it"
        assert torch.equal(held.parameters, lies)
    with residency.holding([large]) as (outcome,):
        assert isinstance(outcome, ResidentTenant)


def test_an_error_on_the_way_leaves_nothing_behind(open_residency, add_tenant, monkeypatch):
    infos = [add_tenant(f"t{number}", 16, number) for number in range(3)]
    residency = open_residency(40)
    with residency.holding(infos[:1]):
        pass
    used = residency.arena.used_bytes

    def fail(self, wanted):
        raise MemoryError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(TenantReader, "load", fail)
        with pytest.raises(MemoryError), residency.holding(infos):
            pass
    assert residency.arena.used_bytes == used and residency.num_resident == 1
    with residency.holding(infos) as residents:
        assert all(isinstance(each, ResidentTenant) for each in residents)
    assert all(placed.users == 0 for placed in residency._placement.all())


def test_an_error_after_some_were_loaded_lets_them_go(open_residency, add_tenant, store, monkeypatch):
    """The room of a damaged tenant is offered to one that found none: its load fails, others had come."""
    damaged, good, late = (add_tenant(name, 64, 0) for name in ("damaged", "good", "late"))
    size = AdapterArena.allocated_bytes(good.bytes // 4) // GRANULE
    residency = open_residency(2 * size)
    residency._reader.layouts([damaged])
    store.layout.resolve(damaged.file).write_bytes(b"")
    load, calls = TenantReader.load, []

    def fail_the_second_time(self, wanted):
        calls.append(len(wanted))
        if len(calls) == 2:
            raise MemoryError("on purpose")
        return load(self, wanted)

    monkeypatch.setattr(TenantReader, "load", fail_the_second_time)
    with pytest.raises(MemoryError):
        residency.holding([damaged, good, late])
    assert calls == [2, 1] and names_in(residency) == {"good"}
    assert_nothing_is_lost(residency)


def test_replaced_while_its_file_is_read(open_residency, add_tenant, contents, monkeypatch):
    """Between the catalog's record and the file's bytes: the new one whole, whatever was known of the old."""
    stale = add_tenant("t", 64, 0)
    residency = open_residency(60)
    residency._reader.layouts([stale])  # its header was read in time
    load, current = TenantReader.load, []

    def replace_first(self, wanted):
        if not current:
            current.append(add_tenant("t", 8, 1))
        return load(self, wanted)

    monkeypatch.setattr(TenantReader, "load", replace_first)
    with residency.holding([stale]) as (resident,):
        assert resident.info == current[0]
        assert torch.equal(resident.parameters, contents(current[0]))
    assert residency.num_resident == 1


def test_replaced_while_in_use_the_old_goes_with_its_last_user(open_residency, add_tenant, contents):
    old = add_tenant("t", 64, 0)
    expected = contents(old)
    residency = open_residency(60)
    (tickets,) = residency.expect([[old]])
    with residency.holding([old]) as (first,):
        new = add_tenant("t", 64, 4)
        with residency.holding([new]) as (second,), residency.holding([old]) as (third,):
            assert first is third and first.slot != second.slot
            assert torch.equal(first.parameters, expected) and torch.equal(second.parameters, contents(new))
            assert residency.num_resident == 2
    assert residency.num_resident == 2, "a queued request still waits for the old one"
    residency.release(tickets)
    assert residency.num_resident == 1 and residency.statistics.retired == 1
    assert residency.arena.used_bytes == residency._placement.all()[0].size
    with residency.holding([old]) as (fourth,):
        assert fourth.info == new, "what is gone is answered by what is there"


def test_removed_while_in_use(open_residency, add_tenant, store, contents):
    info = add_tenant("t", 64, 0)
    expected = contents(info)
    residency = open_residency(60)
    with residency.holding([info]) as (resident,):
        store.remove_tenant("t")
        with residency.holding([]):
            assert torch.equal(resident.parameters, expected)
        assert residency.num_resident == 1
    assert residency.num_resident == 0 and residency.arena.used_bytes == 0
    with residency.holding([info]) as (outcome,):
        assert isinstance(outcome, UnknownTenantError)


def test_two_tiers_read_what_host_memory_lacks(open_residency, add_tenant, contents, reads):
    infos = [add_tenant(f"t{number}", 64, 0) for number in range(4)]
    size = -(-infos[0].bytes // GRANULE)
    residency = open_residency(size, host=5 * size)
    for _ in range(3):
        for info in infos:
            with residency.holding([info]) as (resident,):
                assert torch.equal(resident.parameters, contents(info))
    host, arena = residency.host_statistics, residency.statistics
    assert reads == [1] * 4 and (host.misses, host.hits, host.evictions) == (4, 8, 0)
    assert (arena.misses, arena.loads, arena.evictions, arena.files_read) == (12, 12, 11, 4)
    assert arena.bytes_copied == 3 * arena.bytes_read > 0
    assert host.resident_tenants == 4 and host.resident_bytes <= host.reserved_bytes <= 5 * size * GRANULE


def test_a_batch_larger_than_host_memory_comes_in_waves(open_residency, add_tenant, contents, reads):
    infos = [add_tenant(f"t{number}", 64, 0) for number in range(6)]
    size = -(-infos[0].bytes // GRANULE)
    residency = open_residency(6 * size, host=3 * size)
    with residency.holding(infos) as residents:
        for info, resident in zip(infos, residents, strict=True):
            assert torch.equal(resident.parameters, contents(info))
    assert sum(reads) == 6 and max(reads) < 6
    assert residency.host_statistics.reserved_bytes <= 3 * size * GRANULE


def test_a_tenant_larger_than_host_memory(open_residency, add_tenant):
    large, small = add_tenant("large", 128, 0), add_tenant("small", 8)
    residency = open_residency(60, host=8)
    with residency.holding([large, small]) as (first, second):
        assert isinstance(first, OverloadedError) and "host_memory" in str(first)
        assert isinstance(second, ResidentTenant)
    assert residency.arena.used_bytes == residency._placement.all()[0].size


def test_two_tiers_keep_nothing_of_a_damaged_file(open_residency, add_tenant, store):
    infos = [add_tenant(f"t{number}", 8, number) for number in range(3)]
    path = store.layout.resolve(infos[1].file)
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x80\x7f")  # infinity
    residency = open_residency(60, host=60)
    for _ in range(2):
        with residency.holding(infos) as (first, second, third):
            assert isinstance(second, StoreCorruptError) and str(path) in str(second)
            assert isinstance(first, ResidentTenant) and isinstance(third, ResidentTenant)
    assert residency.host_statistics.resident_tenants == 2


def test_closed(open_residency, add_tenant):
    info = add_tenant("t", 8)
    for residency in (open_residency(20), open_residency(20, host=20)):
        with residency.holding([info]):
            pass
        residency.close()
        residency.close()
        with pytest.raises(EngineClosedError), residency.holding([info]):
            pass
        with pytest.raises(EngineClosedError):
            residency.prefetch([info])
        assert residency.arena.memory.nbytes == 0 and residency.num_resident == 0
