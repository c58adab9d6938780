"""Engines of one process that share a budget of host memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmi_engine as hmi
from hmi_engine.errors import InsufficientMemoryError, InvalidSizeError, OverloadedError

ENCODERS = {"host_memory": "4MiB", "overlay_memory": "1MiB", "traffic_memory": "2MiB"}
DECODERS = {
    "host_memory": "1MiB",
    "overlay_memory": "1MiB",
    "traffic_memory": "1MiB",
    "cache_memory": "2MiB",
    "shared_prefix_memory": "1MiB",
}
MIB = 2**20


def test_encoders_and_decoders_beside_each_other(store, mixed_store):
    budget = hmi.MemoryBudget("12MiB")
    with hmi.Engine(store, memory=budget, **ENCODERS):
        assert budget.reserved_bytes == 7 * MIB
        with pytest.raises(InsufficientMemoryError, match=r"7\.0 MiB .*cache_memory 3\.0 MiB.*5\.0 MiB of"):
            hmi.Engine(mixed_store, memory=budget, **(DECODERS | {"cache_memory": "3MiB"}))
        assert budget.available_bytes == 5 * MIB
        with pytest.raises(InsufficientMemoryError):
            hmi.Engine(mixed_store, memory=budget, **DECODERS)
    with hmi.Engine(mixed_store, memory=budget, **DECODERS) as engine:
        assert budget.available_bytes == 6 * MIB
        [answer] = engine.run([hmi.Request("lora", "the", sampling=hmi.Sampling(max_tokens=2))])
        assert answer.error is None
    assert budget.reserved_bytes == 0


def test_two_tiers_and_a_store_that_records_nothing(store):
    budget = hmi.MemoryBudget("64MiB")
    with hmi.Engine(store, memory=budget, device_memory="3MiB", record_traffic=False, **ENCODERS):
        assert budget.reserved_bytes == (3 + 4 + 1) * MIB


def test_no_tables_no_overlay(tiny_bert: Path, tmp_path: Path):
    budget = hmi.MemoryBudget("64MiB")
    with (
        hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=0) as plain,
        hmi.Engine(plain, memory=budget, **ENCODERS),
    ):
        assert budget.reserved_bytes == 4 * MIB


def test_an_engine_that_cannot_be_opened_gives_back_what_it_reserved(store, make_head):
    store.add_tenant(
        "large",
        domain="words",
        adapter=hmi.random_adapter(store.general, "bottleneck", 8, 0),
        head=make_head(store.general),
    )
    store.pin_tenant("large")
    budget = hmi.MemoryBudget("64MiB")
    with pytest.raises(OverloadedError, match="pinned"):
        hmi.Engine(store, memory=budget, **(ENCODERS | {"host_memory": "4KiB"}))
    assert budget.reserved_bytes == 0


def test_a_queue_that_cannot_be_made_gives_back_what_its_engine_reserved(store, mixed_store):
    budget = hmi.MemoryBudget("64MiB")
    for opened, options in ((store, ENCODERS), (mixed_store, DECODERS)):
        with pytest.raises(AttributeError, match="max_queued_requests"):
            hmi.AsyncEngine(opened, memory=budget, queue_limits=5, **options)
        assert budget.reserved_bytes == 0
        assert not opened.catalog.arena_bytes, "the core is closed"


def test_async_engines_give_back_when_they_are_closed(store, mixed_store):
    budget = hmi.MemoryBudget("13MiB")

    async def both() -> int:
        async with (
            hmi.AsyncEngine(store, memory=budget, **ENCODERS),
            hmi.AsyncEngine(mixed_store, memory=budget, **DECODERS),
        ):
            return budget.available_bytes

    assert asyncio.run(both()) == 0
    assert budget.reserved_bytes == 0


def test_no_size():
    with pytest.raises(InvalidSizeError):
        hmi.MemoryBudget("a lot")


def test_one_reservation_an_owner():
    budget = hmi.MemoryBudget(10)
    budget.reserve("a", {"host_memory": 3})
    with pytest.raises(ValueError, match="release it first"):
        budget.reserve("a", {"host_memory": 3})
    budget.release("nobody")
    assert budget.reserved_bytes == 3


@given(st.integers(0, 100), st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 60)), max_size=20))
def test_never_more_than_there_is(total, wishes):
    """Against a plain model: an owner's second wish releases its first."""
    budget, expected = hmi.MemoryBudget(total), {}
    for owner, size in wishes:
        if owner in expected:
            budget.release(owner)
            del expected[owner]
        elif sum(expected.values()) + size <= total:
            budget.reserve(owner, {"host_memory": size})
            expected[owner] = size
        else:
            with pytest.raises(InsufficientMemoryError):
                budget.reserve(owner, {"host_memory": size})
        assert budget.reserved_bytes == sum(expected.values()) <= total
