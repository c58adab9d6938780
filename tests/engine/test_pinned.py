"""Tenants that are pinned and in memory run beside each other, however little room they leave."""

import pytest

import hmi_engine as hmi
from hmi_engine.memory.arena import AdapterArena

NAMES = [f"t{number}" for number in range(8)]


def pinned_bytes(store):
    """What the tenants, equally large, take of memory when they are pinned, as all of them are then."""
    for name in NAMES:
        store.pin_tenant(name)
    return len(NAMES) * AdapterArena.allocated_bytes(store.tenants["t0"].bytes // 4)


@pytest.fixture
def equal_tenants(store, make_head):
    for name in NAMES:
        adapter = hmi.random_adapter(store.general, "lora", 8, 0)
        store.add_tenant(name, domain="words", adapter=adapter, head=make_head(store.general))
    store.add_tenant("other", domain="words", adapter=adapter, head=make_head(store.general))


@pytest.mark.parametrize("more_tenants", [0, 1])
def test_all_of_them_are_one_batch(store, equal_tenants, more_tenants):
    memory = pinned_bytes(store) * (len(NAMES) + more_tenants) // len(NAMES)
    names = NAMES + ["other"] * more_tenants
    with hmi.Engine(store, host_memory=memory, pipeline_depth=1) as engine:
        responses = engine.run([hmi.Request(name, text="the cell binds") for name in names])
        assert [response.error for response in responses] == [None] * len(names)
        assert engine.stats().batches == 1 and engine.stats().adapters["evictions"] == 0


def test_their_texts_are_generated_at_the_same_time(mixed_store):
    adapter = hmi.random_adapter(mixed_store.general, "lora", 4, 0)
    for name in NAMES:
        mixed_store.add_tenant(name, domain="news", adapter=adapter, head=hmi.GenerationHead())
    sampling = hmi.Sampling(max_tokens=10, ignore_end=True)
    requests = [hmi.Request(name, text="the cell binds", sampling=sampling) for name in NAMES]
    with hmi.Engine(mixed_store, host_memory=pinned_bytes(mixed_store)) as engine:
        assert [response.error for response in engine.run(requests)] == [None] * len(NAMES)
        assert engine.stats().generation["steps"] == 10
