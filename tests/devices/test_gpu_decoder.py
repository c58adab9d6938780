"""Decoders on a GPU: ``make gpu-check`` runs these; without a GPU they are skipped."""

from __future__ import annotations

import pytest
import torch
from conftest import classification_head, write_gpt2
from decoder_stores import PROMPTS, adapters, make_store

import hmi_engine as hmi
from hmi_engine.memory.arena import AdapterArena

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

OPTIONS = {"record_traffic": False, "cache_memory": "64MiB", "max_step_tokens": 64}
GREEDY = hmi.Sampling(max_tokens=24, ignore_end=True, logprobs=True)
DRAWN = hmi.Sampling(max_tokens=12, temperature=0.7, seed=3, ignore_end=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Of a width that the kernels take, with tenants of every kind of adapter and a classifier."""
    folder = tmp_path_factory.mktemp("decoders")
    base = write_gpt2(folder / "base", n_embd=256, n_head=4)
    with make_store(folder / "store", base, 2) as opened:
        kinds = adapters(opened)
        for name, adapter in kinds.items():
            opened.add_tenant(name, domain="news", adapter=adapter, head=hmi.GenerationHead())
        head = classification_head(opened.general, pooling="last")
        opened.add_tenant("judge", domain="news", adapter=kinds["lora"], head=head)
        yield opened


def on_gpu(store, **options):
    """In float32 unless the test says otherwise: then texts are the CPU's, but for near ties."""
    defaults = {"device": "cuda", "dtype": "float32", "device_memory": "256MiB"}
    return hmi.Engine(store, **OPTIONS | defaults | options)


@pytest.fixture(scope="module")
def expected(store):
    """Requests, and what the CPU answers."""
    names = list(store.tenants)
    requests = [
        hmi.Request(names[n % len(names)], PROMPTS[n % len(PROMPTS)], sampling=GREEDY) for n in range(40)
    ]
    with hmi.Engine(store, device="cpu", **OPTIONS) as engine:
        return requests, engine.run(requests)


def check(responses, wanted, tolerance):
    """Equal to the first token that rounding may decide, which is where the log-probabilities part."""
    for response, other in zip(responses, wanted, strict=True):
        assert response.error is None, response.error
        if other.kind == "generation":
            same = next(
                (
                    n
                    for n, (a, b) in enumerate(zip(response.token_ids, other.token_ids, strict=True))
                    if a != b
                ),
                len(other.token_ids),
            )
            # Where another token was taken, it was as likely.
            compared = min(same + 1, len(other.token_ids))
            assert response.logprobs[:compared] == pytest.approx(other.logprobs[:compared], abs=tolerance)
        else:
            assert response.scores == pytest.approx(other.scores, abs=tolerance)


@pytest.mark.parametrize(("share", "device_graphs"), [(0.6, True), (4, True), (4, False)])
def test_writes_the_texts_of_the_cpu(store, expected, share, device_graphs):
    requests, wanted = expected
    total = sum(AdapterArena.allocated_bytes(info.bytes // 4) for info in store.tenants.values())
    options = {"device_memory": int(2 * share * total), "device_graphs": device_graphs}
    with on_gpu(store, **options) as engine:
        for _ in range(3):
            responses = engine.run(requests)
            check(responses, wanted, 1e-2)
        equal = sum(
            response.token_ids == other.token_ids for response, other in zip(responses, wanted, strict=True)
        )
        assert equal >= 0.9 * len(requests)
        assert engine.stats().generation["blocks_held"] == 0
        assert (engine.stats().adapters["evictions"] > 0) == (share < 1)
        graphs = engine._core.runner._computer._graphs
        assert graphs is None if not device_graphs else graphs._sizes, "none was refused"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-2), ("bfloat16", 0.4)])
def test_16_bits(store, expected, dtype, tolerance):
    """The first token's log-probability, of -1 to -10."""
    requests, wanted = expected
    with on_gpu(store, dtype=dtype) as engine:
        for response, other in zip(engine.run(requests), wanted, strict=True):
            assert response.error is None, response.error
            if other.kind == "generation" and response.token_ids[0] == other.token_ids[0]:
                assert response.logprobs[0] == pytest.approx(other.logprobs[0], abs=tolerance)
            if other.kind != "generation":
                assert response.scores == pytest.approx(other.scores, abs=tolerance)


@pytest.mark.parametrize("miss", ["exact", "budget"])
def test_missing_windows_are_computed(store, miss):
    requests = [hmi.Request("lora", text, sampling=GREEDY) for text in PROMPTS]
    with hmi.Engine(store, device="cpu", miss=miss, **OPTIONS) as engine:
        wanted = engine.run(requests)
    with on_gpu(store, miss=miss) as engine:
        check(engine.run(requests), wanted, 1e-2)


def test_draws_depend_on_the_seed_alone(store):
    requests = [hmi.Request("plain", text, sampling=DRAWN) for text in PROMPTS]
    with on_gpu(store) as engine:
        together = engine.run(requests)
        alone = [engine.run([request])[0] for request in requests]
    same = [one.token_ids == other.token_ids for one, other in zip(alone, together, strict=True)]
    # torch's products of other sizes may round otherwise, which seldom changes a draw.
    assert sum(same) >= len(same) - 1


def test_memory_does_not_grow_once_it_is_warm(store, expected):
    requests, _ = expected
    with on_gpu(store) as engine:
        for _ in range(3):
            engine.run(requests)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["num_device_alloc"]
        for _ in range(3):
            engine.run(requests)
        assert torch.cuda.memory_stats()["num_device_alloc"] == before
