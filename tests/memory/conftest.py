"""Tenants of many sizes in a store, and what their files hold."""

import pytest
import torch

import hmi_engine as hmi
from hmi_engine.knowledge.tenant_file import read_into, read_layout


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
