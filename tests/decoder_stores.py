"""Stores of decoders with tenants of every kind, and what is asked of them."""

from __future__ import annotations

from pathlib import Path

from conftest import sentences

import hmi_engine as hmi
from hmi_engine.knowledge.adapters import KINDS

END = 0
PROMPTS = sentences(12, seed=9, longest=8)
WHOLE = hmi.Sampling(max_tokens=20, ignore_end=True, logprobs=True)


def make_store(path: Path, base: Path, plot_layers: int, tenants=None, *, window=None) -> hmi.Store:
    """A store of decoders with a domain, and tenants by name: their adapters; by default one without."""
    store = hmi.Store.create(path, general=base, plot_layers=plot_layers, window=window, row_dtype="float32")
    store.add_domain("news", sentences(60, seed=1), plot_bytes="1MiB", min_count=2)
    for name, adapter in (tenants or {"plain": hmi.Adapter({})}).items():
        store.add_tenant(name, domain="news", adapter=adapter, head=hmi.GenerationHead())
    return store


def adapters(store: hmi.Store) -> dict[str, hmi.Adapter]:
    """A tenant of each kind, with blocks at every site of it."""
    return {
        kind: hmi.random_adapter(store.general, kind, 4, seed, sites=KINDS[kind].sites)
        for seed, kind in enumerate(KINDS)
    }
