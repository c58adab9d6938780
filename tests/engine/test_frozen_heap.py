"""What is there when an engine opens is none of the garbage collector's business until it closes."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

import hmi_engine as hmi
from hmi_engine.frozen_heap import FrozenHeap


class Ring:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def dropped_ring() -> weakref.ref[Ring]:
    return weakref.ref(Ring())


@pytest.fixture(autouse=True)
def nothing_frozen():
    gc.collect()
    gc.disable()
    assert not gc.get_freeze_count()
    yield
    gc.enable()
    gc.unfreeze()


def test_what_was_there_is_collected_once_all_has_thawed():
    before = dropped_ring()
    first, second = FrozenHeap(), FrozenHeap()
    after = dropped_ring()
    first.thaw()
    first.thaw()
    gc.collect()
    assert before() is not None and after() is None
    second.thaw()
    gc.collect()
    assert before() is None
    assert not gc.get_freeze_count()


def test_what_nobody_refers_to_is_freed_at_once():
    ring = Ring()
    seen = weakref.ref(ring)
    heap = FrozenHeap()
    ring.itself = None
    del ring
    assert seen() is None
    heap.thaw()


def test_what_the_program_has_frozen_stays_so():
    gc.freeze()
    count = gc.get_freeze_count()
    assert count
    FrozenHeap().thaw()
    assert gc.get_freeze_count() >= count


def test_an_engine_freezes_while_it_is_open(store, make_head):
    store.add_tenant("t", domain="words", adapter=hmi.Adapter({}), head=make_head(store.general))

    async def serve():
        async with hmi.AsyncEngine(store) as engine:
            assert gc.get_freeze_count()
            await engine.submit(hmi.Request("t", text="some words"))
            await engine.close()
        assert not gc.get_freeze_count()

    asyncio.run(serve())
