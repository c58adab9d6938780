"""Fixtures of the engine's tests."""

from pathlib import Path

import pytest
from decoder_stores import adapters, make_store

import hmi_engine as hmi


@pytest.fixture
def mixed_store(tiny_gpt2: Path, tmp_path: Path):
    with make_store(tmp_path / "s", tiny_gpt2, 2) as store:
        for name, adapter in adapters(store).items():
            store.add_tenant(name, domain="news", adapter=adapter, head=hmi.GenerationHead())
        yield store
