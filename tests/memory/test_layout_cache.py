"""Layouts are remembered within a budget that is true of Python's memory."""

import dataclasses
import gc
import tracemalloc

import pytest

import hmi_engine as hmi
from hmi_engine.knowledge.tenant_file import read_layout
from hmi_engine.memory.layout_cache import LayoutCache


@pytest.fixture
def layout(store, make_head):
    adapter = hmi.random_adapter(store.general, "lora", 4, 0)
    info = store.add_tenant("t", domain="words", adapter=adapter, head=make_head(store.general))
    return read_layout(store.layout.resolve(info.file))


def other(layout, number):
    """A layout of its own, as of another file: nothing shared."""
    blocks = [dataclasses.replace(block, settings={"scale": 1 / (number + 1)}) for block in layout.blocks]
    tensors = {f"{name}": dataclasses.replace(place) for name, place in layout.head.tensors.items()}
    record = layout.head.record.model_copy(update={"labels": tuple(f"{number}-{i}" for i in range(3))})
    head = dataclasses.replace(layout.head, record=record, tensors=tensors)
    return dataclasses.replace(layout, blocks=tuple(blocks), head=head)


def test_equal_layouts_are_one(layout):
    cache = LayoutCache(1 << 20)
    first = cache.put("a", layout)
    bytes_of_one = cache.num_bytes
    assert cache.put("b", other(layout, 0)) is not first
    equal = dataclasses.replace(layout, blocks=tuple(map(dataclasses.replace, layout.blocks)))
    assert equal is not layout and cache.put("c", equal) is first
    assert cache.get("a") is cache.get("c") is first and cache.get("d") is None
    assert bytes_of_one < cache.num_bytes < 3 * bytes_of_one
    assert cache.put("a", other(layout, 1)) is first, "a digest stands for one content"


def test_the_oldest_go_and_the_budget_is_kept(layout):
    cache = LayoutCache(100_000)
    for number in range(200):
        cache.put(str(number), other(layout, number))
        assert cache.num_bytes <= 100_000
        assert cache.get("0") is not None, "what is asked for stays"
    kept = len(cache)
    assert 5 < kept < 100
    assert all(cache.get(str(number)) for number in range(201 - kept, 200))
    assert cache.get("1") is None


def test_the_budget_is_about_what_python_takes(layout):
    cache = LayoutCache(4 << 20)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(2000):
            cache.put(f"{number:064d}", other(layout, number))
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.4 * cache.num_bytes < taken < 1.1 * cache.num_bytes, (taken, cache.num_bytes, len(cache))


def test_a_budget_too_small_for_one(layout):
    cache = LayoutCache(10)
    assert cache.put("a", layout) is layout
    assert cache.get("a") is None and len(cache) == cache.num_bytes == 0
