"""Fixtures of the engine's tests."""

from dataclasses import replace
from pathlib import Path

import pytest
from decoder_stores import adapters, make_store

import hmi_engine as hmi
from hmi_engine.knowledge.adapter_kinds import KINDS
from hmi_engine.knowledge.adapters import random_adapter


@pytest.fixture
def mixed_store(tiny_gpt2: Path, tmp_path: Path):
    with make_store(tmp_path / "s", tiny_gpt2, 2) as store:
        for name, adapter in adapters(store).items():
            store.add_tenant(name, domain="news", adapter=adapter, head=hmi.GenerationHead())
        yield store


@pytest.fixture
def encoder_store(store, make_head):
    """With a tenant "a"."""
    head = make_head(store.general, seed=1, pooling="cls")
    store.add_tenant("a", domain="words", adapter=hmi.Adapter({}), head=head)
    return store


@pytest.fixture
def decoder_store(mixed_store):
    """With a tenant "a"."""
    mixed_store.add_tenant("a", domain="news", adapter=hmi.Adapter({}), head=hmi.GenerationHead())
    return mixed_store


@pytest.fixture
def fleet(store, make_head):
    """Twelve tenants of all kinds."""

    def tenant(number):
        kind = list(KINDS)[number % len(KINDS)]
        adapter = random_adapter(store.general, kind, 1 + 5 * number % 16, number)
        head = make_head(store.general, seed=number, pooling="cls")
        return hmi.NewTenant(f"t{number}", "words", adapter, replace(head, weight=head.weight / 5))

    store.add_tenants(map(tenant, range(12)))
    return [f"t{number}" for number in range(12)]


@pytest.fixture
def requests(fleet, make_sentences):
    """Sixty requests that all differ, numbered by their ids."""
    texts = make_sentences(60, seed=5)
    return [hmi.Request(fleet[7 * n % 12], text=text, id=n) for n, text in enumerate(texts)]


@pytest.fixture
def expected(store, requests):
    """What the plain engine answers, one by one."""
    with hmi.Engine(store, pipeline_depth=1) as engine:
        return {request.id: engine.run([request])[0].scores for request in requests}
