"""Tenants of many sizes in a store, and what their files hold."""

import pytest
import torch
from arena_accounts import GRANULE

import hmi_engine as hmi
from hmi_engine.knowledge.tenant_file import read_into, read_layout
from hmi_engine.memory.residency import AdapterResidency


@pytest.fixture
def add_tenant(store, make_head):
    """Adds a tenant, or replaces it: kinds alternate and ``rank`` decides the size; 0 is a head alone."""

    def add(name, rank, seed=0, domain="words"):
        kind = ("bottleneck", "lora", "ia3", "bitfit")[seed % 4] if rank else None
        adapter = hmi.random_adapter(store.general, kind, rank, seed) if kind else hmi.Adapter({})
        head = make_head(store.general, seed=seed)
        return store.add_tenant(name, domain=domain, adapter=adapter, head=head, replace=True)

    return add


@pytest.fixture
def contents(store):
    """The float32 data section of a tenant's file, read by itself."""

    def read(info):
        path = store.layout.resolve(info.file)
        layout = read_layout(path)
        data = torch.empty(layout.num_elements)
        read_into(path, layout, data)
        return data

    return read


@pytest.fixture
def open_residency(store):
    """Opens residencies of so many granules, of one tier or with one of ``host`` granules before it."""
    opened = []

    def build(granules, host=None):
        host_bytes = None if host is None else host * GRANULE
        opened.append(
            AdapterResidency(
                store.layout, store.catalog, store.general, granules * GRANULE, host_bytes=host_bytes
            )
        )
        return opened[-1]

    yield build
    for residency in opened:
        residency.close()
