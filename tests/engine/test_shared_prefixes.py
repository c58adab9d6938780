"""Prompts that begin alike share the layers below their tenants' first adapted one; no answer changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from decoder_stores import PROMPTS, WHOLE, make_store
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_hgpt import ReferenceHgpt
from transformers import GPT2LMHeadModel

import hmi_engine as hmi
from hmi_engine.knowledge.adapters import KINDS

OPTIONS = {"record_traffic": False, "block_tokens": 4, "miss": "exact"}
START = " ".join(PROMPTS)[:150]


def add_tenant(store: hmi.Store, name: str, kind: str, seed: int, first_layer: int, domain: str = "news"):
    """A tenant that adapts the layers from ``first_layer`` on, at every site of a kind."""
    layers = range(first_layer, store.general.num_layers)
    adapter = hmi.random_adapter(store.general, kind, 4, seed, layers=layers, sites=KINDS[kind].sites)
    store.add_tenant(name, domain=domain, adapter=adapter, head=hmi.GenerationHead())
    return adapter


@pytest.fixture(scope="module")
def store(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory):
    """One layer of four looked up; two tenants for each kind of adapter and first layer: ``lora-2-a``."""
    path = tmp_path_factory.mktemp("shared") / "store"
    with make_store(path, tiny_gpt2, 1) as opened:
        for number, kind in enumerate(KINDS):
            for first_layer in (1, 2, 3):
                for place, letter in enumerate("ab"):
                    add_tenant(
                        opened, f"{kind}-{first_layer}-{letter}", kind, 2 * number + place, first_layer
                    )
        yield opened


def shared_tokens(engine: hmi.Engine) -> int:
    return engine.stats().generation["shared_tokens"]


def alone(store: hmi.Store, requests: list[hmi.Request], **options: object) -> list[hmi.Response]:
    """What each request is answered by an engine that keeps nothing of prompts."""
    with hmi.Engine(store, **OPTIONS | {"prefix_cache": "off"} | options) as engine:
        return [engine.run([request])[0] for request in requests]


def assert_same(found: list[hmi.Response], expected: list[hmi.Response]) -> None:
    """Bit for bit."""
    for response, wanted in zip(found, expected, strict=True):
        assert response.error is None, response.error
        assert (response.token_ids, response.logprobs) == (wanted.token_ids, wanted.logprobs)


@pytest.mark.parametrize("kind", KINDS)
def test_other_tenants_enter_at_their_first_layer(store: hmi.Store, kind: str) -> None:
    def requests(first_layer: int) -> list[hmi.Request]:
        names = [f"{kind}-{first_layer}-a", f"{kind}-{first_layer}-b"]
        return [hmi.Request(name, f"{START} {name[-1]}", sampling=WHOLE) for name in names]

    for first_layer in (1, 2, 3):
        with hmi.Engine(store, **OPTIONS) as engine:
            found = [engine.run([request])[0] for request in requests(first_layer)]
            assert (shared_tokens(engine) > 20) == (first_layer > 1)
        assert found[1].usage.reused_tokens == 0, "the layers above are the tenant's own"
        assert_same(found, alone(store, requests(first_layer)))


def test_what_enters_late_is_what_the_definition_says(
    store: hmi.Store, tiny_gpt2: Path, tmp_path: Path
) -> None:
    reference = ReferenceHgpt(GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval(), 1)
    with make_store(tmp_path / "s", tiny_gpt2, 1) as opened:
        adapters = {name: add_tenant(opened, name, "lora", seed, 2) for seed, name in enumerate("ab")}
        with hmi.Engine(opened, **OPTIONS) as engine:
            for name, adapter in adapters.items():
                [response] = engine.run([hmi.Request(name, START, sampling=WHOLE)])
                [prompt] = opened.encoder.token_ids([START])
                ids = [*prompt, *response.token_ids]
                logits = reference.logits(ids, adapter.blocks).double()
                for place, logprob in enumerate(response.logprobs, len(prompt) - 1):
                    expected = logits[place].log_softmax(0)[ids[place + 1]]
                    assert logprob == pytest.approx(float(expected), abs=2e-4)
            assert shared_tokens(engine) > 20


@settings(deadline=None, max_examples=10)
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from(sorted(KINDS)),
            st.sampled_from([1, 2, 3]),
            st.sampled_from("ab"),
            st.sampled_from([0, 9, 40, 80, 150]),
            st.sampled_from(PROMPTS[:3]),
        ),
        min_size=4,
        max_size=8,
    ),
    max_step_tokens=st.sampled_from([5, 13, 512]),
    cache_memory=st.sampled_from(["1MiB", 80_000]),
    shared_prefix_memory=st.sampled_from(["1MiB", 9_000]),
)
def test_no_answer_changes(store: hmi.Store, asked, max_step_tokens, cache_memory, shared_prefix_memory):
    """Whoever else asks, in pieces of any size, when blocks are given up and kept ones make way."""
    requests = [
        hmi.Request(f"{kind}-{layer}-{letter}", f"{START[:length]} {end}", sampling=WHOLE)
        for kind, layer, letter, length, end in asked
    ]
    options = {
        "max_step_tokens": max_step_tokens,
        "cache_memory": cache_memory,
        "shared_prefix_memory": shared_prefix_memory,
    }
    with hmi.Engine(store, **OPTIONS | options) as engine:
        found = engine.run(requests) + engine.run(requests[::-1])[::-1]
        shared = engine._core.shared
        assert sum(block.num_bytes for block in shared._blocks.values()) == shared._used_bytes
        assert shared._used_bytes <= (9_000 if shared_prefix_memory == 9_000 else 2**20)
        assert engine.stats().generation["blocks_held"] == 0
    assert_same(found, alone(store, requests) * 2)


def test_a_prompt_in_pieces_is_shared_by_pieces(store: hmi.Store) -> None:
    requests = [hmi.Request(f"lora-3-{letter}", START, sampling=WHOLE) for letter in "ab"]
    with hmi.Engine(store, **OPTIONS | {"max_step_tokens": 14}) as engine:
        found = [engine.run([request])[0] for request in requests]
        # Pieces of 12 tokens, of each of which the last block is computed.
        assert shared_tokens(engine) > len(store.encoder.token_ids([START])[0]) / 2
    assert_same(found, alone(store, requests))


@pytest.mark.parametrize(
    "options", [{"prefix_cache": "tenant"}, {"prefix_cache": "off"}, {"shared_prefix_memory": 0}]
)
def test_nothing_is_shared_where_it_is_not_wanted(store: hmi.Store, options: dict) -> None:
    with hmi.Engine(store, **OPTIONS | options) as engine:
        engine.run([hmi.Request(f"lora-3-{letter}", START, sampling=WHOLE) for letter in "ab"])
        [again] = engine.run([hmi.Request("lora-3-b", START, sampling=WHOLE)])
        assert shared_tokens(engine) == 0 and again.error is None


def test_other_tables_are_another_beginning(tiny_gpt2: Path, tmp_path: Path) -> None:
    with make_store(tmp_path / "s", tiny_gpt2, 2) as store:
        store.add_domain("other", PROMPTS, plot_bytes="1MiB", min_count=1)
        for seed, (name, domain) in enumerate((("a", "news"), ("b", "other"), ("c", "other"))):
            add_tenant(store, name, "lora", seed, 3, domain)
        with hmi.Engine(store, **OPTIONS | {"miss": "backoff"}) as engine:
            shared = []
            for name in "abc":
                [response] = engine.run([hmi.Request(name, START, sampling=WHOLE)])
                assert response.error is None
                shared.append(shared_tokens(engine))
        assert shared[0] == shared[1] == 0 < shared[2]
