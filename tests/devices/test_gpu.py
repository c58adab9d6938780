"""The engine on a GPU: ``make gpu-check`` runs these; without a GPU they are skipped."""

from __future__ import annotations

import pytest
import torch

import hmi_engine as hmi
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.memory.device_rows import DeviceRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

TOLERANCE = 2e-3
"""Of probabilities and of elements of embeddings: products are summed in another order, some in TF32."""


@pytest.fixture
def expected(store, mixed_requests):
    """Requests, and what the CPU answers."""
    requests = mixed_requests(120)
    with hmi.Engine(store, device="cpu", record_traffic=False) as engine:
        return requests, engine.run(requests)


def engine_on_gpu(store, **options):
    """In float32 unless the test says otherwise: what the tolerance is for."""
    defaults = {"device": "cuda", "dtype": "float32", "max_batch_tokens": 100, "device_memory": "64MiB"}
    options = defaults | options
    return hmi.Engine(store, record_traffic=False, **options)


def total_bytes(store):
    """Of all tenants in an arena: a device budget whose arena holds half of them."""
    return sum(AdapterArena.allocated_bytes(info.bytes // 4) for info in store.tenants.values())


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_equals_the_cpu_at_every_depth(store, expected, same, depth):
    requests, wanted = expected
    with engine_on_gpu(store, pipeline_depth=depth) as engine:
        for _ in range(3):
            same(engine.run(requests), wanted, TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_are_graphs(store, expected, same, dtype):
    requests, wanted = expected
    with engine_on_gpu(store, dtype=dtype, pipeline_depth=3) as engine:
        for _ in range(4):
            same(engine.run(requests), wanted, TOLERANCE if dtype == "float32" else 3e-2)
        graphs = engine._core.runner._computer._graphs
        assert any(captured.graphs for captured in graphs._captured.values()), "none was refused"


def test_layers_are_launched_where_graphs_are_not_wanted(store, expected, same):
    requests, wanted = expected
    with engine_on_gpu(store, device_graphs=False) as engine:
        same(engine.run(requests), wanted, TOLERANCE)


@pytest.mark.parametrize("depth", [2, 4])
def test_evictions_under_load(store, expected, same, depth):
    requests, wanted = expected
    with engine_on_gpu(store, pipeline_depth=depth, device_memory=total_bytes(store)) as engine:
        for _ in range(20):
            same(engine.run(requests), wanted, TOLERANCE)
        assert engine.stats().adapters["evictions"] > 100


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 3e-2), ("auto", 3e-2)])
@pytest.mark.parametrize("share", [0.4, 2])
def test_16_bits_answer_as_float32_does(store, expected, same, dtype, tolerance, share):
    """With evictions, and ranks that are padded for the kernels."""
    requests, wanted = expected
    with engine_on_gpu(store, dtype=dtype, device_memory=int(2 * share * total_bytes(store))) as engine:
        for _ in range(3):
            same(engine.run(requests), wanted, tolerance)
        assert (engine.stats().adapters["evictions"] > 0) == (share < 1)


@pytest.mark.parametrize("miss", ["exact", "budget"])
def test_missing_windows_are_computed(store, mixed_requests, same, miss):
    requests = mixed_requests(40, seed=4)
    with hmi.Engine(store, device="cpu", miss=miss, record_traffic=False, max_batch_tokens=100) as engine:
        wanted = engine.run(requests)
    with engine_on_gpu(store, miss=miss) as engine:
        same(engine.run(requests), wanted, TOLERANCE)


def test_rows_in_host_memory(store, expected, same, monkeypatch):
    """No table lies on the device."""
    requests, wanted = expected
    monkeypatch.setattr(DeviceRows, "_whole", lambda rows, table: None)
    with engine_on_gpu(store) as engine:
        same(engine.run(requests), wanted, TOLERANCE)


def test_memory_does_not_grow_once_it_is_warm(store, expected):
    requests, _ = expected
    with engine_on_gpu(store, pipeline_depth=3) as engine:
        for _ in range(3):
            engine.run(requests)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["num_device_alloc"]
        for _ in range(3):
            engine.run(requests)
        assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_a_device_that_is_not_there(store):
    with pytest.raises(hmi.errors.DeviceUnavailableError, match="cuda:99"):
        hmi.Engine(store, device="cuda:99")
