"""Faults of memory that peers shipped, each by the peer's issue, in one tier and in two.

Those of batches, names and neighbours are in ``test_isolation.py``.
"""

import threading
from dataclasses import replace

import pytest
import torch

import hmi_engine as hmi
from hmi_engine.errors import UnknownTenantError
from hmi_engine.knowledge.adapter_kinds import KINDS
from hmi_engine.knowledge.adapters import random_adapter
from hmi_engine.knowledge.tenant_file import read_layout
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.pipeline.step import BatchRunner

TEXTS = ["the cell binds a protein", "results show an increase", "parse the file", "a drug in the model"]


@pytest.fixture(params=["one tier", "two tiers"])
def open_engine(request, store):
    """Opens an engine with room for about so many bytes of tenants."""
    opened = []

    def build(room="1MiB", **options):
        if request.param == "two tiers":
            options |= {"device_memory": room, "host_memory": "1MiB"}
        else:
            options["host_memory"] = room
        opened.append(hmi.Engine(store, **options))
        return opened[-1]

    yield build
    for engine in opened:
        engine.close()


@pytest.fixture
def add(store, make_head):
    """Adds or replaces a tenant, with weights large enough to be seen and a head of its own."""

    def build(name, kind, seed, rank=8, *, sites=None):
        adapter = hmi.Adapter({})
        if kind is not None:
            adapter = random_adapter(store.general, kind, rank, seed, sites=sites or KINDS[kind].sites)
        head = make_head(store.general, seed=seed, pooling="cls")
        head = replace(head, weight=head.weight / 5)  # probabilities near 0 and 1 would hide differences
        return store.add_tenant(name, domain="words", adapter=adapter, head=head, replace=True)

    return build


def scores(responses):
    assert [response.error for response in responses] == [None] * len(responses)
    return torch.tensor([list(response.scores.values()) for response in responses])


def ask(name):
    return [hmi.Request(name, text=text) for text in TEXTS]


def arena_bytes(store, name):
    """What a tenant takes of an arena."""
    layout = read_layout(store.layout.resolve(store.tenants[name].file))
    return AdapterArena.allocated_bytes(layout.num_elements)


def answer(store, name):
    """What an engine that never saw another tenant says."""
    with hmi.Engine(store) as engine:
        return scores(engine.run(ask(name)))


class Pause:
    """Stops batches between their tenants' loading and their computation, until it is told to go on."""

    def __init__(self, monkeypatch):
        self.reached, self.go_on = threading.Event(), threading.Event()
        compute = BatchRunner._compute

        def paused(runner, *arguments):
            self.reached.set()
            assert self.go_on.wait(60)
            return compute(runner, *arguments)

        monkeypatch.setattr(BatchRunner, "_compute", paused)


def run_beside(engine, requests, pause):
    """Starts requests in a thread of their own; returns, once they are paused, what waits for the result."""
    results = []
    thread = threading.Thread(target=lambda: results.extend(engine.run(requests)))
    thread.start()
    assert pause.reached.wait(60)

    def finish():
        pause.go_on.set()
        thread.join(60)
        return results

    return finish


def test_a_slot_is_not_reused_while_a_request_reads_it_vllm_47724(store, open_engine, add, monkeypatch):
    """Loads beside a running batch fill all memory there is, and take none of that batch's."""
    add("running", "lora", 0)
    for number in range(6):
        add(f"other{number}", "lora", 1 + number)
    expected = answer(store, "running")
    engine = open_engine(2 * arena_bytes(store, "running"))
    engine.prefetch(["running"])
    pause = Pause(monkeypatch)
    finish = run_beside(engine, ask("running"), pause)
    slot_before = next(p.slot for p in engine._core.residency._placement.all() if p.info.name == "running")
    for number in range(6):
        engine.prefetch([f"other{number}"])
    resident = {p.info.name: p.slot for p in engine._core.residency._placement.all()}
    assert resident["running"] == slot_before and len(resident) == 2
    assert list(resident.values()).count(slot_before) == 1
    assert engine._core.residency.statistics.evictions >= 4, "the others pushed each other out"
    torch.testing.assert_close(scores(finish()), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_nothing_of_the_evicted_adapter_is_left_in_its_slot_sglang_8103(store, open_engine, add, kind):
    """The one before had blocks at every site of every kind; who follows has one kind's, or none."""
    loud = {
        place: block
        for name, each in KINDS.items()
        for place, block in random_adapter(store.general, name, 8, 1, sites=each.sites).blocks.items()
    }
    head = store.load_tenant(add("quiet", kind, 5, rank=2).name)[1]
    store.add_tenant("loud", domain="words", adapter=hmi.Adapter(loud), head=head)
    expected = answer(store, "quiet")
    engine = open_engine(arena_bytes(store, "loud"))
    for _ in range(2):
        engine.run(ask("loud"))
        torch.testing.assert_close(scores(engine.run(ask("quiet"))), expected, atol=1e-6, rtol=0)
    assert engine.stats().adapters["evictions"] >= 2


def test_a_reloaded_name_is_not_served_from_memory_vllm_42125(store, open_engine, add):
    """The same name with other weights: not from the arena, nor from host memory, nor by an old header."""
    engine = open_engine()
    for seed, kind in enumerate((*KINDS, None, *KINDS)):
        add("t", kind, seed, rank=1 + seed)
        found = scores(engine.run(ask("t")))
        torch.testing.assert_close(found, answer(store, "t"), atol=1e-6, rtol=0)
    statistics = engine.stats()
    assert statistics.resident_tenants == 1, "of those before nothing is kept"
    assert statistics.host_adapters is None or statistics.host_adapters["resident_tenants"] == 1
    store.remove_tenant("t")
    add("t", "lora", 77)
    torch.testing.assert_close(scores(engine.run(ask("t"))), answer(store, "t"), atol=1e-6, rtol=0)


def test_unload_while_a_request_runs_sglang_9084(store, open_engine, add, monkeypatch):
    """What runs is finished with the removed tenant's weights; then its memory is free."""
    add("t", "lora", 3)
    add("stays", "bottleneck", 4)
    expected = answer(store, "t")
    engine = open_engine()
    pause = Pause(monkeypatch)
    finish = run_beside(engine, ask("t"), pause)
    store.remove_tenant("t")
    engine.prefetch(["stays"])  # has the engine look at the catalog
    torch.testing.assert_close(scores(finish()), expected, atol=1e-6, rtol=0)
    assert engine.stats().resident_tenants == 1
    (gone,) = engine.run(ask("t")[:1])
    assert isinstance(gone.error, UnknownTenantError)


def test_a_scale_is_applied_once_after_eviction(store, open_engine, add, make_head):
    """LoRA's scale, a bottleneck's and IA3's, after leaving and coming back, and after being moved."""
    adapter = random_adapter(store.general, "lora", 8, 0, sites=KINDS["lora"].sites)
    blocks = {place: replace(block, scale=3.5) for place, block in adapter.blocks.items()}
    beside = random_adapter(store.general, "bottleneck", 8, 1, sites=KINDS["bottleneck"].sites)
    blocks |= {place: replace(block, scale=-2.0) for place, block in beside.blocks.items()}
    blocks |= random_adapter(store.general, "ia3", 0, 2).blocks
    head = replace(make_head(store.general, pooling="cls"), weight=make_head(store.general).weight / 5)
    store.add_tenant("scaled", domain="words", adapter=hmi.Adapter(blocks), head=head)
    for number in range(3):
        add(f"other{number}", "lora", number, rank=8 + 8 * number)
    expected = answer(store, "scaled")
    engine = open_engine(max(arena_bytes(store, name) for name in store.tenants))
    for number in (0, 1, 2, 0):
        torch.testing.assert_close(scores(engine.run(ask("scaled"))), expected, atol=1e-6, rtol=0)
        engine.run(ask(f"other{number}"))
    torch.testing.assert_close(scores(engine.run(ask("scaled"))), expected, atol=1e-6, rtol=0)
    assert engine.stats().adapters["evictions"] >= 4


def test_a_moved_tenant_answers_as_before(store, open_engine, add):
    """Free memory is brought together under tenants that nobody uses at the moment."""
    names = [add(f"t{number}", "lora", number, rank=(2, 8)[number % 2]).name for number in range(8)]
    large = add("large", "lora", 50, rank=14)
    expected = {name: answer(store, name) for name in names}
    engine = open_engine(sum(arena_bytes(store, name) for name in names))
    for name in names:
        engine.prefetch([name])
    for _ in range(3):
        assert engine.prefetch([large.name]) == 1
        for name in names:
            torch.testing.assert_close(scores(engine.run(ask(name))), expected[name], atol=1e-6, rtol=0)
    assert engine.stats().adapters["moves"] > 0
