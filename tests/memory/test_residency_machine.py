"""Any sequence of use, eviction, replacement, removal and damage keeps what residency promises."""

import itertools
from contextlib import ExitStack

import pytest
import torch
from arena_accounts import GRANULE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hmi_engine.errors import HmiError, OverloadedError, StoreCorruptError, UnknownTenantError
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.memory.residency import AdapterResidency
from hmi_engine.memory.tenant_reader import digest_of

NAMES = st.sampled_from([f"t{number}" for number in range(8)])
BATCHES = st.lists(NAMES, min_size=1, max_size=4)
RANKS = (0, 8, 32, 64, 128)
ARENA_GRANULES = 40  # a tenant takes 1 to 17
HOST_GRANULES = 60


class ResidencyMachine(RuleBasedStateMachine):
    """What is in memory is looked at from the side; what should be there is known from the files."""

    def __init__(self, store, add_tenant, contents, two_tiers):
        super().__init__()
        self.store, self.add_tenant, self.contents = store, add_tenant, contents
        for name in list(store.tenants):
            store.remove_tenant(name)
        self.residency = AdapterResidency(
            store.layout,
            store.catalog,
            store.general,
            ARENA_GRANULES * GRANULE,
            host_bytes=HOST_GRANULES * GRANULE if two_tiers else None,
        )
        self.seeds = itertools.count()
        self.data = {}  # what files held when they were written, by digest
        self.damaged = set()
        self.holds = []  # ExitStack, and what it gave
        self.queues = []  # tickets, and the digests they stand for
        self.before = {}
        for number, rank in enumerate((0, 128, 8, 64, 128, 32, 0, 128)):
            self._add(f"t{number}", rank)

    def teardown(self):
        for stack, _ in self.holds:
            stack.close()
        self.residency.release(*(tickets for tickets, _ in self.queues))
        self.check_memory()
        with self.residency.holding([]):  # looks at the catalog
            assert not self.residency._departures._retired
        assert not self.residency._queue._waiting
        assert all(placed.users == 0 for placed in self.residency._placement.all())
        self.residency.close()
        assert self.residency.num_resident == 0 and self.residency.arena.memory.numel() == 0

    def _add(self, name, rank):
        info = self.add_tenant(name, rank, next(self.seeds))
        self.data[digest_of(info)] = self.contents(info)

    def _infos(self, names):
        return [self.store.tenants[name] for name in names if name in self.store.tenants]

    def _resident(self):
        return {placed.digest: placed for placed in self.residency._placement.all()}

    def _needed(self):
        return {digest for _, digests in self.queues for digest in digests}

    def _watch(self, wanted):
        """Before something is brought in: who is there, who may leave."""
        living = self.store.catalog.tenants.existing_ids(digest[0] for digest in self.data)
        pinned = {digest_of(info) for info in self.store.tenants.pinned()}
        resident = self._resident()
        idle = {digest for digest, placed in resident.items() if not placed.users}
        return resident, idle, living, pinned, {digest_of(info) for info in wanted}

    def _check_who_left(self, watched, *, spare_needed=False):
        resident, idle, living, pinned, wanted = watched
        left = {digest for digest in resident.keys() - self._resident().keys() if digest[0] in living}
        assert left <= idle, "who is in use stays"
        assert not left & pinned, "who is pinned stays"
        assert not left & wanted, "who is wanted now stays"
        if left & self._needed():
            assert not spare_needed
            could_go = (idle & self._resident().keys()) - pinned - wanted - self._needed()
            assert not {digest for digest in could_go if digest[0] in living}, "others could have gone"

    @rule(names=BATCHES)
    def hold(self, names):
        infos = self._infos(names)
        watched = self._watch(infos)
        stack = ExitStack()
        outcomes = stack.enter_context(self.residency.holding(infos))
        self.holds.append((stack, [each for each in outcomes if not isinstance(each, HmiError)]))
        self._check_who_left(watched)
        for info, outcome in zip(infos, outcomes, strict=True):
            if isinstance(outcome, HmiError):
                self._check_error(info, outcome)
            else:
                assert outcome.info.name == info.name and digest_of(outcome.info) == digest_of(info)

    def _check_error(self, info, error):
        if isinstance(error, OverloadedError):
            # What is held now includes what was loaded by the same call.
            staying = sum(each.size for each in self._resident().values() if each.users or each.is_pinned)
            needed = AdapterArena.allocated_bytes(len(self.data[digest_of(info)]))
            scattered = bool(self.holds[:-1])  # what earlier calls hold cannot be moved
            assert staying + needed > ARENA_GRANULES * GRANULE or scattered
        else:
            assert isinstance(error, StoreCorruptError) and digest_of(info) in self.damaged

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def let_go(self, data):
        stack, _ = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        stack.close()

    @rule(names=BATCHES)
    def prefetch(self, names):
        infos = self._infos(names)
        watched = self._watch(infos)
        try:
            count = self.residency.prefetch(infos)
        except StoreCorruptError:
            assert {digest_of(info) for info in infos} & self.damaged
        except OverloadedError:
            assert any(info.pinned for info in infos)
        else:
            assert count == len({digest_of(info) for info in infos} & self._resident().keys())
        self._check_who_left(watched, spare_needed=True)

    @rule(batches=st.lists(BATCHES, max_size=3))
    def expect(self, batches):
        infos = [self._infos(names) for names in batches]
        tickets = self.residency.expect(infos)
        self.queues += zip(tickets, [[digest_of(info) for info in batch] for batch in infos], strict=True)

    @precondition(lambda self: self.queues)
    @rule(data=st.data())
    def release(self, data):
        tickets, _ = self.queues.pop(data.draw(st.integers(0, len(self.queues) - 1)))
        self.residency.release(tickets)

    @rule(name=NAMES, rank=st.sampled_from(RANKS))
    def replace(self, name, rank):
        self._add(name, rank)

    @rule(name=NAMES)
    def remove(self, name):
        if name in self.store.tenants:
            self.store.remove_tenant(name)

    @rule(name=NAMES, how=st.sampled_from(["cut", "nan", "gone"]))
    def damage(self, name, how):
        for info in self._infos([name]):
            path = self.store.layout.resolve(info.file)
            if not path.exists() or digest_of(info) in self.damaged:
                continue
            self.damaged.add(digest_of(info))
            whole = path.read_bytes()
            if how == "gone":
                path.unlink()
            else:
                path.write_bytes(whole[:-4] + (b"\x00\x00\xc0\x7f" if how == "nan" else b""))

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name, pinned):
        others = [info for info in self.store.tenants.pinned() if info.name != name]
        if name in self.store.tenants and len(others) < 2:
            self.store.catalog.pin_tenant(name, pinned)

    @invariant()
    def check_memory(self):
        placed = list(self._resident().values())
        ranges = sorted((each.offset, each.offset + each.size // 4) for each in placed)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
        assert ranges == [] or ranges[-1][1] <= self.residency.arena.memory.numel()
        assert self.residency.arena.used_bytes == sum(each.size for each in placed)
        assert self.residency.arena.memory.nbytes == ARENA_GRANULES * GRANULE
        assert len({each.slot for each in placed}) == len(placed)
        for each in placed:
            lies = self.residency.arena.memory[each.offset : each.offset + each.size // 4]
            expected = self.data[each.digest]
            assert torch.equal(lies[: len(expected)], expected), each.info.name
            assert not lies[len(expected) :].any()
            self._check_tables(each)
        if (host := self.residency.host_statistics) is not None:
            assert host.resident_bytes <= host.reserved_bytes <= HOST_GRANULES * GRANULE
            for digest, block in self.residency._host._blocks.items():
                assert torch.equal(block, self.data[digest])

    def _check_tables(self, placed):
        """The tables have the tenant's blocks, and nothing else in its slot."""
        slots = self.residency.slots
        blocks = {(block.layer, block.site): block for block in placed.layout.blocks}
        for layer, site in slots._rows:
            block, table = blocks.get((layer, site)), slots.at(layer, site)
            offset = -1 if block is None else placed.offset + block.offset_elements
            rank, scale = (0, 0.0) if block is None else (block.rank, block.settings.get("scale", 1.0))
            assert int(table.offsets[placed.slot]) == offset
            assert int(table.ranks[placed.slot]) == rank
            assert float(table.scales[placed.slot]) == pytest.approx(scale)

    @invariant()
    def what_is_held_stays(self):
        for _, residents in self.holds:
            for resident in residents:
                assert torch.equal(resident.parameters, self.data[digest_of(resident.info)])
                placed = self._resident()[digest_of(resident.info)]
                assert (placed.slot, placed.offset) == (resident.slot, resident.arena_offset)

    @invariant()
    def nothing_stays_of_whom_nobody_uses_and_nobody_will(self):
        if not self.holds:
            with self.residency.holding([]):  # looks at the catalog
                pass
            living = self.store.catalog.tenants.existing_ids(digest[0] for digest in self.data)
            for digest in {*self._resident(), *self.residency._source.digests()}:
                assert digest[0] in living or digest in self._needed()


@pytest.mark.parametrize("two_tiers", [False, True], ids=["one_tier", "two_tiers"])
def test_any_sequence(store, add_tenant, contents, two_tiers):
    run_state_machine_as_test(
        lambda: ResidencyMachine(store, add_tenant, contents, two_tiers),
        settings=settings(
            max_examples=15,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


def test_sizes_are_mixed_as_the_machine_needs(store, add_tenant):
    """Else the machine would test little: no eviction by size, no sliding."""
    sizes = {rank: add_tenant("t", rank).bytes // GRANULE for rank in RANKS}
    assert len(set(sizes.values())) >= 4
    assert 2 * max(sizes.values()) < ARENA_GRANULES < 4 * max(sizes.values())


def test_removed_before_it_was_loaded(store, add_tenant):
    info = add_tenant("t", 8)
    residency = AdapterResidency(store.layout, store.catalog, store.general, 1 << 20)
    store.remove_tenant("t")
    with residency.holding([info]) as (outcome,):
        assert isinstance(outcome, UnknownTenantError) and "removed" in str(outcome)
