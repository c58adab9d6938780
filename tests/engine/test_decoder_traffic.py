"""Decoders count the n-grams of their texts, and domains learn from them."""

from __future__ import annotations

import asyncio
import random
import time
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from decoder_stores import PROMPTS, WHOLE, make_store
from hypothesis import given
from hypothesis import strategies as st

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.knowledge.plot_table import open_plot
from hmi_engine.knowledge.traffic_file import TrafficCounts, read_traffic
from hmi_engine.models.packing import PackedSequences, causal_windows

DEADLINE_SECONDS = 30


@pytest.fixture(params=[3, 2])
def store(request: pytest.FixtureRequest, tiny_gpt2: Path, tmp_path: Path):
    with make_store(tmp_path / "s", tiny_gpt2, 2, window=request.param) as made:
        yield made


def requests() -> list[hmi.Request]:
    return [hmi.Request("plain", text, sampling=WHOLE) for text in PROMPTS]


def texts_of(store: hmi.Store, responses: list[hmi.Response]) -> list[list[int]]:
    """Every token whose row was asked for: prompts, and what was generated but for the last one."""
    prompts = store.encoder.token_ids(PROMPTS)
    return [[*prompt, *each.token_ids[:-1]] for prompt, each in zip(prompts, responses, strict=True)]


def ngrams(texts: list[list[int]], window: int) -> Counter[tuple[int, ...]]:
    counts = Counter((a, b, -1) for text in texts for a, b in pairwise(text))
    if window == 3:
        counts += Counter(triple for text in texts for triple in zip(text, text[1:], text[2:], strict=False))
    return counts


def saved(store: hmi.Store) -> list[TrafficCounts]:
    files = store.catalog.traffic_files()
    return [read_traffic(store.layout.resolve(file.file)) for file in files]


def by_ngram(counts: TrafficCounts) -> dict[tuple[int, ...], float]:
    ngrams = map(tuple, hmi_kernels.ngram_tokens(counts.keys).tolist())
    return dict(zip(ngrams, counts.weights.tolist(), strict=True))


def held(store: hmi.Store) -> set[tuple[int, ...]]:
    files = [info.file for info in store.domains.values() if info.file]
    tables = [open_plot(store.layout.resolve(file), store.general) for file in files]
    return {tuple(row) for table in tables for row in hmi_kernels.ngram_tokens(table.row_keys).tolist()}


def whole_windows(texts: list[list[int]], window: int) -> list[tuple[int, ...]]:
    """Of every token behind a first one; the second one has but one before it."""
    found = []
    for text in texts:
        for end in range(2, len(text) + 1):
            tokens = text[max(0, end - window) : end]
            found.append((*tokens, *[-1] * (3 - len(tokens))))
    return found


@given(
    texts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5),
    window=st.sampled_from([2, 3]),
)
def test_windows_of_packed_texts(texts: list[list[int]], window: int) -> None:
    expected = []
    for text in texts:
        for end in range(1, len(text) + 1):
            tokens = text[max(0, end - window) : end]
            expected.append(tokens + [-1] * (3 - len(tokens)))
    assert causal_windows(PackedSequences.pack(texts), window).tolist() == expected


@pytest.mark.parametrize("miss", ["backoff", "exact"])
def test_what_was_asked_for_is_saved_when_the_engine_closes(store: hmi.Store, miss: str) -> None:
    window, known = store.general.window, held(store)
    with hmi.Engine(store, miss=miss) as engine:
        # In one call: what is counted first is counted whole. What the cache holds of the texts that come
        # again, or the overlay of their windows, was asked for all the same.
        responses = engine.run([*requests(), *requests()])
    texts = texts_of(store, responses[: len(PROMPTS)])
    (counts,) = saved(store)
    assert by_ngram(counts) == {ngram: 2 * count for ngram, count in ngrams(texts, window).items()}
    windows = whole_windows(texts, window)
    assert counts.tokens == 2 * sum(map(len, texts))
    assert counts.windows == 2 * len(windows)
    assert counts.hits == 2 * sum(ngram in known for ngram in windows)
    assert 0 < counts.hits < counts.windows


def test_a_domain_learns_from_generated_texts(store: hmi.Store) -> None:
    window = store.general.window
    with hmi.Engine(store) as engine:
        texts = texts_of(store, engine.run(requests()))
        before = engine.stats().plot["window_hits"]
    update = store.update_domain("news")
    assert update.traffic_tokens == sum(map(len, texts))
    frequent = {ngram for ngram, count in ngrams(texts, window).items() if count >= 2}
    assert frequent <= held(store)
    with hmi.Engine(store, record_traffic=False, prefix_cache="off") as engine:
        engine.run(requests())
        assert engine.stats().plot["window_hits"] > before
        assert engine.stats().traffic is None
    assert saved(store) == []


def test_an_engine_updates_its_domains(store: hmi.Store) -> None:
    known = held(store)

    async def serve() -> None:
        async with hmi.AsyncEngine(store, traffic_interval=0, update_domains_every=0.05) as engine:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while not known < held(store):  # which texts are counted depends on how busy the machine is
                assert time.monotonic() < deadline, engine.stats().updates
                responses = await asyncio.gather(*map(engine.submit, requests()))
                assert all(response.error is None for response in responses)
            while not engine.stats().updates["traffic_tokens"]:  # counted after its rows can be seen
                assert time.monotonic() < deadline, engine.stats().updates
                await asyncio.sleep(0.01)

    asyncio.run(serve())


def test_a_domain_removed_meanwhile_is_forgotten_quietly(store: hmi.Store) -> None:
    store.add_domain("gone", ["a drug"], min_count=1)
    store.add_tenant("g", domain="gone", adapter=hmi.Adapter({}), head=hmi.GenerationHead())
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        async def serve() -> None:
            async with hmi.AsyncEngine(store) as engine:
                gone = await engine.submit(hmi.Request("g", PROMPTS[0], sampling=WHOLE))
                store.remove_tenant("g")
                store.remove_domain("gone")
                kept = await engine.submit(hmi.Request("plain", PROMPTS[0], sampling=WHOLE))
                assert gone.error is None and kept.error is None

        asyncio.run(serve())
    (file,) = store.catalog.traffic_files()
    assert file.domain_id == store.domains["news"].id


def unknown_windows(store: hmi.Store, count: int) -> list[int]:
    """Token ids whose whole windows, behind the first one's, differ and have no rows."""
    known = held(store)
    for seed in range(100):
        ids = random.Random(seed).sample(range(1, store.general.vocab_size), count)
        if not known & set(whole_windows([ids], store.general.window)):
            return ids
    raise AssertionError("the table has nearly all windows")


def test_a_budget_counts_what_it_leaves(store: hmi.Store) -> None:
    ids = unknown_windows(store, 9)
    once = hmi.Sampling(max_tokens=1, ignore_end=True)
    with hmi.Engine(store, miss="budget", exact_budget=3.01 / 9, overlay_memory=0) as engine:
        engine.run([hmi.Request("plain", input_ids=ids, sampling=once)])
        plot = engine.stats().plot
    assert (plot["windows"], plot["window_hits"]) == (8, 0)
    assert (plot["windows_computed"], plot["budget_skipped"]) == (3, 5)
    with hmi.Engine(store, miss="exact") as engine:
        engine.run([hmi.Request("plain", input_ids=ids, sampling=once)])
        assert engine.stats().plot["budget_skipped"] == 0


def test_a_budget_is_for_single_tokens_too(store: hmi.Store) -> None:
    """Steps of one text save up for a window together."""
    sampling = hmi.Sampling(max_tokens=20, ignore_end=True)
    with hmi.Engine(store, miss="budget", exact_budget=0.25, overlay_memory=0) as engine:
        engine.run([hmi.Request("plain", input_ids=[5], sampling=sampling)])
        plot = engine.stats().plot
    assert plot["tokens"] == 20 and plot["windows"] - plot["window_hits"] >= 10
    assert 2 <= plot["windows_computed"] <= 5


@pytest.mark.parametrize("place", [3, 5, 7])
def test_a_budget_goes_to_what_traffic_asks_for(store: hmi.Store, place: int) -> None:
    """Each window of the text is in it once, and one of them was asked for before."""
    ids = unknown_windows(store, 9)
    wanted = ids[place + 1 - store.general.window : place + 1]
    once = hmi.Sampling(max_tokens=1, ignore_end=True)
    computed, compute = [], store.decoder.window_states

    def window_states(tokens: torch.Tensor) -> torch.Tensor:
        computed.extend(tokens.tolist())
        return compute(tokens)

    store.decoder.window_states = window_states
    with hmi.Engine(store, miss="budget", exact_budget=1.01 / 9, overlay_memory=0) as engine:
        engine.run([hmi.Request("plain", input_ids=wanted, sampling=once)] * 3)
        computed.clear()
        engine.run([hmi.Request("plain", input_ids=ids, sampling=once)])
    assert computed == [[*wanted, *[-1] * (3 - len(wanted))]]


def test_what_was_never_begun_was_not_asked_for(store: hmi.Store) -> None:
    async def serve() -> None:
        async with hmi.AsyncEngine(store) as engine:
            future = engine.submit_nowait(hmi.Request("nobody", PROMPTS[0], sampling=WHOLE))
            assert (await asyncio.wrap_future(future)).error is not None

    asyncio.run(serve())
    assert saved(store) == []


def test_read_only_stores_record_nothing(store: hmi.Store) -> None:
    with hmi.Store.open(store.layout.root, read_only=True) as opened:
        with hmi.Engine(opened) as engine:
            engine.run(requests())
            assert engine.stats().traffic is None
        with pytest.raises(hmi.errors.ReadOnlyStoreError):
            hmi.Engine(opened, update_domains_every=1)
    assert store.catalog.traffic_files() == []
