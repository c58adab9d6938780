"""Engines on the CPU whose products with the base are in bfloat16 say what those in float32 say, nearly."""

from __future__ import annotations

import pytest
import torch
from decoder_stores import PROMPTS, adapters, make_store
from transformers import BertModel

import hmi_engine as hmi
from hmi_engine import serving_core
from hmi_engine.models import linear

TOLERANCE = 3e-2
"""Of probabilities and of elements of embeddings; bfloat16 has 8 bits for a number's digits."""


@pytest.fixture(autouse=True)
def any_processor(monkeypatch):
    """Without the instructions it is slow, and as right."""
    monkeypatch.setattr(serving_core, "has_bfloat16_products", lambda: True)


@pytest.fixture
def products(monkeypatch):
    """The dtypes of the products that are computed."""
    product, dtypes = linear.SharedLinear._product, []

    def noting(layer, x, gelu):
        dtypes.append(x.dtype)
        return product(layer, x, gelu)

    monkeypatch.setattr(linear.SharedLinear, "_product", noting)
    return dtypes


@pytest.mark.parametrize("miss", ["backoff", "exact"])
def test_encoders(store, make_head, make_sentences, products, miss):
    for number in range(6):
        adapter = hmi.random_adapter(store.general, ("bottleneck", "lora")[number % 2], 4, number)
        head = make_head(store.general, pooling=("pooler", "cls", "mean")[number % 3], seed=number)
        store.add_tenant(f"t{number}", domain="words", adapter=adapter, head=head)
    requests = [hmi.Request(f"t{n % 6}", text=text) for n, text in enumerate(make_sentences(30, seed=2))]
    with hmi.Engine(store, device="cpu", miss=miss) as engine:
        wanted = engine.run(requests)
    assert torch.bfloat16 not in products
    with hmi.Engine(store, device="cpu", dtype="bfloat16", miss=miss) as engine:
        found = engine.run(requests)
    assert torch.bfloat16 in products
    for response, expected in zip(found, wanted, strict=True):
        assert response.scores == pytest.approx(expected.scores, abs=TOLERANCE)


def test_without_tables_it_is_what_transformers_computes(tiny_bert, tmp_path, make_sentences):
    texts = make_sentences(10, seed=5)
    with hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=0) as store:
        store.add_domain("words", texts, plot_bytes=0)
        store.add_tenant("t", domain="words", adapter=hmi.Adapter({}), head=hmi.EmbeddingHead(pooling="mean"))
        ids = store.encoder.token_ids(texts)
        with hmi.Engine(store, device="cpu", dtype="bfloat16") as engine:
            found = engine.run([hmi.Request("t", text=text) for text in texts])
    model = BertModel.from_pretrained(tiny_bert).eval()
    for response, tokens in zip(found, ids, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([tokens])).last_hidden_state[0].mean(0)
        wanted = torch.nn.functional.normalize(states, dim=0)
        torch.testing.assert_close(torch.tensor(response.embedding), wanted, atol=TOLERANCE, rtol=0)


def test_decoders(tiny_gpt2, tmp_path, products):
    """Of the first token: later ones depend on it. The log-probabilities are of -1 to -10."""
    sampling = hmi.Sampling(max_tokens=1, ignore_end=True, logprobs=True)
    with make_store(tmp_path / "store", tiny_gpt2, 2) as store:
        for name, adapter in adapters(store).items():
            store.add_tenant(name, domain="news", adapter=adapter, head=hmi.GenerationHead())
        requests = [
            hmi.Request(n, text, sampling=sampling) for n, text in zip(store.tenants, PROMPTS, strict=False)
        ]
        with hmi.Engine(store, device="cpu", cache_memory="4MiB") as engine:
            wanted = engine.run(requests)
        assert torch.bfloat16 not in products
        with hmi.Engine(store, device="cpu", dtype="bfloat16", cache_memory="4MiB") as engine:
            found = engine.run(requests)
    assert torch.bfloat16 in products
    for response, expected in zip(found, wanted, strict=True):
        assert response.logprobs == pytest.approx(expected.logprobs, abs=0.15)


def test_what_the_processor_cannot_is_refused(store, monkeypatch):
    monkeypatch.setattr(serving_core, "has_bfloat16_products", lambda: False)
    with pytest.raises(ValueError, match="no instructions"):
        hmi.Engine(store, device="cpu", dtype="bfloat16")
    with pytest.raises(ValueError, match="on the CPU"):
        hmi.Engine(store, device="cpu", dtype="float16")
