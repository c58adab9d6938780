"""Residency for several threads, and where what goes on is interrupted: who waits, and for whom."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from arena_accounts import GRANULE, assert_nothing_is_lost, lost_bytes, names_in

import hmi_kernels
from hmi_engine.errors import OverloadedError, ReadTimeoutError
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.memory.placement import Holding
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.tenant_reader import TenantReader
from hmi_kernels import PendingRead


class InterruptedReads:
    """Of two reads one has ended when an exception, as Ctrl-C's, ends the wait; the other goes on."""

    def start(self):
        pass

    def wait(self, timeout_seconds):
        if timeout_seconds:
            raise ZeroDivisionError("on purpose")
        return False

    def cancel(self):
        self.is_canceled = True

    def outcomes(self):
        assert self.is_canceled
        return [None, PendingRead(has_begun=True)]


def test_who_has_come_when_a_wait_is_interrupted_can_be_read_again(open_residency, add_tenant, monkeypatch):
    infos = [add_tenant(name, 8) for name in ("ended", "goes-on")]
    residency = open_residency(40)
    residency._reader.layouts(infos)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(hmi_kernels, "prepare_reads", lambda *_, **__: InterruptedReads())
        residency.prefetch(infos)
    with residency.holding(infos) as (first, second):
        assert isinstance(first, ResidentTenant)
        assert isinstance(second, ReadTimeoutError) and "an earlier read of tenant 'goes-on'" in str(second)
    assert lost_bytes(residency) == residency._placement.all()[0].size, "of the one that is still read"


def test_a_tenant_that_waits_for_room_twice_is_loaded_once(open_residency, add_tenant, monkeypatch):
    *others, late = (add_tenant(name, 64, 0) for name in ("first", "second", "late"))
    residency = open_residency(2 * AdapterArena.allocated_bytes(late.bytes // 4) // GRANULE + 1)
    held, wait = residency.holding(others), residency._wait_for_release

    def end_of_another_batch(since):
        held.release()
        return wait(since)

    monkeypatch.setattr(residency, "_wait_for_release", end_of_another_batch)
    with residency.holding([late, late], wait=True) as residents:
        assert len(residents) == 2 and residents[0] is residents[1]
    assert "late" in names_in(residency)
    assert_nothing_is_lost(residency)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_replaced_where_it_waits_for_room(open_residency, add_tenant, contents, monkeypatch, when):
    """Its file is gone when the room is there: the new one is brought, as where there was room at once."""
    there, stale = add_tenant("there", 64, 0), add_tenant("t", 64, 0)
    residency = open_residency(AdapterArena.allocated_bytes(stale.bytes // 4) // GRANULE)
    held, wait, current = residency.holding([there]), residency._wait_for_release, []

    def end_of_another_batch(since):
        if when == "meanwhile":
            current.append(add_tenant("t", 64, 4))
        held.release()
        return wait(since)

    if when == "before":
        current.append(add_tenant("t", 64, 4))
    monkeypatch.setattr(residency, "_wait_for_release", end_of_another_batch)
    with residency.holding([stale], wait=True) as (resident,):
        assert resident.info == current[0]
        assert torch.equal(resident.parameters, contents(current[0]))
    assert_nothing_is_lost(residency)


@pytest.fixture
def hold_up_loads(monkeypatch):
    """From its call on; two events: a load has begun, and it may go on."""

    def hold_up():
        begun, may_go_on, load = threading.Event(), threading.Event(), TenantReader.load

        def held_up(self, wanted):
            begun.set()
            assert may_go_on.wait(10)
            return load(self, wanted)

        monkeypatch.setattr(TenantReader, "load", held_up)
        return begun, may_go_on

    return hold_up


def test_who_is_there_is_held_while_another_is_loaded(open_residency, add_tenant, contents, hold_up_loads):
    """And neither leaves nor moves, though the other's load could use the room."""
    there, other, third = (add_tenant(name, 64, 0) for name in ("there", "other", "third"))
    residency = open_residency(2 * AdapterArena.allocated_bytes(there.bytes // 4) // GRANULE)
    residency.prefetch([there])
    begun, may_go_on = hold_up_loads()
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(residency.prefetch, [other])
        assert begun.wait(10)
        held = residency.holding([there, there])
        assert not loading.done() and held.outcomes[0] is held.outcomes[1]
        may_go_on.set()
        assert loading.result() == 1
    with residency.holding([third]):
        assert names_in(residency) == {"there", "third"}
        assert torch.equal(held.outcomes[0].parameters, contents(there))
    held.release()
    assert_nothing_is_lost(residency)


def test_replaced_while_it_is_loaded_and_others_are_held(open_residency, add_tenant, store, hold_up_loads):
    """Who holds others meanwhile does not take note of it in the place of who knows what is loaded."""
    there, old = add_tenant("there", 8), add_tenant("t", 8, 1)
    residency = open_residency(60)
    residency.prefetch([there])
    begun, may_go_on = hold_up_loads()
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(residency.prefetch, [old])
        assert begun.wait(10)
        file = store.layout.resolve(old.file)
        content = file.read_bytes()
        add_tenant("t", 8, 2)
        file.write_bytes(content)  # as if it had been read just in time
        residency.holding([there]).release()
        assert not loading.done()
        may_go_on.set()
        assert loading.result() == 1 and names_in(residency) == {"there", "t"}
    with residency.holding([]):  # looks at the catalog
        assert names_in(residency) == {"there"}


def test_who_waits_for_room_is_not_overtaken(open_residency, add_tenant, monkeypatch):
    """Else those that hold what lies there, one after another, would keep it for ever."""
    there, late = (add_tenant(name, 64, 0) for name in ("there", "late"))
    residency = open_residency(AdapterArena.allocated_bytes(late.bytes // 4) // GRANULE)
    held, wait_for = residency.holding([there]), residency._released.wait_for
    overtaking = []

    def end_of_another_batch(predicate):
        overtaking.append(residency._hold_residents([there], Holding()))
        held.release()
        return wait_for(predicate)

    monkeypatch.setattr(residency._released, "wait_for", end_of_another_batch)
    with residency.holding([late], wait=True):
        assert names_in(residency) == {"late"} and overtaking == [None]
        residency._hold_residents([late], Holding()).release()  # it has its room
    assert_nothing_is_lost(residency)


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("host", [None, 40])
def test_many_threads(open_residency, add_tenant, contents, host, wait):
    """Each holds, looks at what it holds, and lets go, in memory for two of eight tenants."""
    infos = [add_tenant(f"t{number}", 64, number % 2) for number in range(8)]
    expected = {info.name: contents(info) for info in infos}
    residency = open_residency(40, host=host)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            number = int(torch.randint(0, 8, (), generator=generator))
            with residency.holding([infos[number]] * (1 + number % 2), wait=wait) as outcomes:
                for outcome in outcomes:
                    if isinstance(outcome, OverloadedError):
                        assert not wait
                    elif not torch.equal(outcome.parameters, expected[outcome.info.name]):
                        wrong.append(outcome)
            residency.prefetch([infos[(number + 1) % 8]])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_nothing_is_lost(residency)
    assert residency.statistics.evictions > 10
