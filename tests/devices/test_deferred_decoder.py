"""A decoder on a device writes the CPU's texts, in whatever order the device's streams come to run."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import pytest
import torch
from conftest import classification_head, sentences
from decoder_stores import PROMPTS, adapters, make_store

import hmi_engine as hmi
from devices.deferred_engines import forget_layers, memory_for, note_reservations
from devices.deferred_streams import DeferredStreams, ForgottenEvent
from hmi_engine.generation.decode_graphs import DecodeGraphs
from hmi_engine.generation.device_steps import DeviceSteps
from hmi_engine.memory.device_rows import DeviceRows
from hmi_engine.models.gpt2 import HierarchicalGpt2

pytestmark = pytest.mark.usefixtures("plain_products")

SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))]
OPTIONS = {"record_traffic": False, "cache_memory": "4MiB", "max_step_tokens": 24}
SAMPLINGS = (
    hmi.Sampling(max_tokens=6, ignore_end=True),
    hmi.Sampling(max_tokens=6, ignore_end=True, logprobs=True),
    hmi.Sampling(max_tokens=6, temperature=0.8, top_k=20, seed=7, ignore_end=True),
    hmi.Sampling(max_tokens=6, repetition_penalty=1.3, ignore_end=True),
)


@pytest.fixture(scope="module")
def store(tiny_gpt2, tmp_path_factory):
    """Tenants of every kind of adapter, and one whose head reads the prompt."""
    path = tmp_path_factory.mktemp("decoders") / "store"
    with make_store(path, tiny_gpt2, 2) as opened:
        for name, adapter in adapters(opened).items():
            opened.add_tenant(name, domain="news", adapter=adapter, head=hmi.GenerationHead())
        lora = adapters(opened)["lora"]
        head = classification_head(opened.general, pooling="last")
        opened.add_tenant("judge", domain="news", adapter=lora, head=head)
        yield opened


@pytest.fixture
def deferred_engine(store, monkeypatch):
    """A function: an engine on deferred streams of a seed."""

    @contextmanager
    def opened(seed, served=store, **options):
        streams = DeferredStreams(seed)
        monkeypatch.setattr("hmi_engine.generation.core.open_streams", lambda name: streams)
        with hmi.Engine(served, **OPTIONS | options) as engine:
            yield engine
        assert streams.num_run, "the device was used"
        assert bool(streams.num_replays) == options.get("device_graphs", True)

    return opened


def requests_of(store, count=14, seed=9):
    """Tenants in turn; texts by every way of choosing tokens."""
    names, texts = list(store.tenants), sentences(count, seed=seed, longest=10)
    return [
        hmi.Request(names[n % len(names)], text, sampling=SAMPLINGS[n % len(SAMPLINGS)])
        for n, text in enumerate(texts)
    ]


@pytest.fixture
def expected(store):
    """Requests, and what the CPU answers."""
    requests = requests_of(store)
    with hmi.Engine(store, **OPTIONS) as engine:
        return requests, engine.run(requests)


def same(responses, expected, tolerance=1e-4):
    """Equal tokens, and equal numbers to the tolerance."""
    for response, wanted in zip(responses, expected, strict=True):
        assert response.error is None, response.error
        assert (response.kind, response.token_ids) == (wanted.kind, wanted.token_ids)
        assert response.logprobs == pytest.approx(wanted.logprobs, abs=tolerance)
        if wanted.scores is not None:
            assert response.scores == pytest.approx(wanted.scores, abs=tolerance)


@pytest.mark.parametrize("share", [0.6, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_order_gives_the_same_texts(store, expected, deferred_engine, seed, share):
    requests, wanted = expected
    with deferred_engine(seed, device_memory=memory_for(store, share), max_running=5) as engine:
        same(engine.run(requests), wanted)
        same(engine.run(requests[::-1]), wanted[::-1])
        statistics = engine.stats()
    assert statistics.generation["blocks_held"] == 0
    assert (statistics.adapters["evictions"] > 0) == (share < 1)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_without_graphs(expected, deferred_engine, seed):
    requests, wanted = expected
    with deferred_engine(seed, device_memory="64MiB", device_graphs=False) as engine:
        same(engine.run(requests), wanted)


def test_graphs_follow_what_tenants_bring(store, expected, deferred_engine, monkeypatch):
    """Kinds of adapters come one after another, each at places where there was nothing before."""
    requests, wanted = expected
    captures, capture = [], DecodeGraphs._capture

    def noting(graphs, number, *arguments):
        captures.append(number)
        return capture(graphs, number, *arguments)

    monkeypatch.setattr(DecodeGraphs, "_capture", noting)
    with deferred_engine(0, device_memory="64MiB") as engine:
        for request, answer in zip(requests, wanted, strict=True):
            same(engine.run([request]), [answer])
        assert 1 < len(captures) <= len(store.tenants) and set(captures) == {1}
        captures.clear()
        for request, answer in zip(requests, wanted, strict=True):
            same(engine.run([request]), [answer])
        assert not captures
        same(engine.run(requests), wanted)
        assert len(captures) == len(set(captures)) > 1


def test_where_steps_cannot_be_captured_they_are_launched(expected, deferred_engine, monkeypatch, caplog):
    requests, wanted = expected

    def refuse(streams, stream, work):
        raise RuntimeError("operation not permitted when stream is capturing")

    with deferred_engine(0, device_memory="64MiB", device_graphs=False) as engine:
        computer = engine._core.runner._computer
        computer._graphs = DecodeGraphs(
            computer._general, computer._model, computer._streams, computer._cache
        )
        monkeypatch.setattr(DeferredStreams, "capture", refuse)
        same(engine.run(requests), wanted)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        same(engine.run(requests), wanted)
    assert "not permitted" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("miss", ["exact", "budget"])
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_windows_that_are_missing_are_computed_too(store, deferred_engine, miss, seed):
    requests = requests_of(store, seed=4)
    with hmi.Engine(store, miss=miss, **OPTIONS) as engine:
        wanted = engine.run(requests)
    with deferred_engine(seed, miss=miss, device_memory="64MiB") as engine:
        same(engine.run(requests), wanted)
        assert engine.stats().plot["windows_computed"] > 0


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_rows_that_do_not_fit_are_sent_for_each_step(expected, deferred_engine, seed, monkeypatch):
    requests, wanted = expected
    monkeypatch.setattr(DeviceRows, "_whole", lambda self, table: None)
    with deferred_engine(seed, device_memory="64MiB") as engine:
        same(engine.run(requests), wanted)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_without_layers_that_are_looked_up(tiny_gpt2, tmp_path, deferred_engine, seed, monkeypatch):
    streams = DeferredStreams(seed)
    requests = [hmi.Request("plain", text, sampling=SAMPLINGS[1]) for text in PROMPTS]
    with make_store(tmp_path / "s", tiny_gpt2, 0) as plain:
        with hmi.Engine(plain, **OPTIONS) as engine:
            wanted = engine.run(requests)
        monkeypatch.setattr("hmi_engine.generation.core.open_streams", lambda name: streams)
        with hmi.Engine(plain, device_memory="64MiB", **OPTIONS) as engine:
            same(engine.run(requests), wanted)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_prompts_share_the_layers_below_their_tenants_first(tiny_gpt2, tmp_path, deferred_engine, seed):
    """Known tokens enter later than others, among prompts that are new and texts under way."""
    with make_store(tmp_path / "s", tiny_gpt2, 1) as late:
        names = [(kind, first, letter) for kind in ("lora", "ia3") for first in (1, 2, 3) for letter in "ab"]
        for number, (kind, first, letter) in enumerate(names):
            adapter = hmi.random_adapter(late.general, kind, 4, number, layers=range(first, 4))
            name = f"{kind}-{first}-{letter}"
            late.add_tenant(name, domain="news", adapter=adapter, head=hmi.GenerationHead())
        start, options = " ".join(PROMPTS)[:90], {"block_tokens": 4, "max_step_tokens": 96}
        requests = [
            hmi.Request(name, f"{start} {text}", sampling=SAMPLINGS[1])
            for name, text in zip(list(late.tenants)[1:], PROMPTS, strict=False)
        ]
        with hmi.Engine(late, prefix_cache="off", **OPTIONS) as engine:
            wanted = engine.run(requests)
        with deferred_engine(seed, served=late, max_running=5, device_memory="64MiB", **options) as engine:
            same(engine.run(requests), wanted)
            assert engine.stats().generation["shared_tokens"] > 50


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-2), ("bfloat16", 0.15)])
def test_16_bits_say_what_float32_says(store, deferred_engine, dtype, tolerance):
    """Of the first token: later ones depend on it. The log-probabilities are of -1 to -10."""
    names = [name for name in store.tenants if name != "judge"]
    sampling = hmi.Sampling(max_tokens=1, ignore_end=True, logprobs=True)
    requests = [
        hmi.Request(name, text, sampling=sampling) for name, text in zip(names, PROMPTS, strict=False)
    ]
    judged = [hmi.Request("judge", text) for text in PROMPTS]
    with hmi.Engine(store, **OPTIONS) as engine:
        wanted, judgements = engine.run(requests), engine.run(judged)
    with deferred_engine(1, dtype=dtype, device_memory="64MiB", device_graphs=False) as engine:
        for response, expected in zip(engine.run(requests), wanted, strict=True):
            assert response.logprobs == pytest.approx(expected.logprobs, abs=tolerance)
        for response, expected in zip(engine.run(judged), judgements, strict=True):
            assert response.scores == pytest.approx(expected.scores, abs=tolerance / 2)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_nothing_is_allocated_once_it_is_warm(expected, deferred_engine, monkeypatch, seed):
    requests, _ = expected
    with deferred_engine(seed, device_memory="64MiB") as engine:
        engine.run(requests)
        reserved = note_reservations(monkeypatch)
        engine.run(requests)
    assert reserved and all(reserved)


def test_a_step_that_fails_leaves_the_next_ones_alone(store, expected, deferred_engine, monkeypatch):
    requests, wanted = expected
    run_layers, calls = HierarchicalGpt2.run_layers, []

    def third_fails(model, *arguments, **options):
        result = run_layers(model, *arguments, **options)
        calls.append(None)
        if len(calls) == 3:
            raise ZeroDivisionError("on purpose")
        return result

    with deferred_engine(1, device_memory="64MiB", max_running=4) as engine:
        monkeypatch.setattr(HierarchicalGpt2, "run_layers", third_fails)
        responses = engine.run(requests)
        failed = [response for response in responses if response.error is not None]
        assert 0 < len(failed) < len(responses) / 2
        good = [n for n, response in enumerate(responses) if response.error is None]
        same([responses[n] for n in good], [wanted[n] for n in good])
        assert not engine._core.residency._users
        same(engine.run(requests), wanted)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_many_callers_are_answered(store, expected, monkeypatch, seed):
    requests, wanted = expected
    streams = DeferredStreams(seed)
    monkeypatch.setattr("hmi_engine.generation.core.open_streams", lambda name: streams)

    async def ask():
        async with hmi.AsyncEngine(store, device_memory=memory_for(store, 0.6), **OPTIONS) as engine:
            return await asyncio.gather(*(engine.submit(request) for request in requests))

    same(asyncio.run(ask()), wanted)


def forget_inputs(monkeypatch):
    """The first layer does not wait for token ids and the merge."""
    wait = DeferredStreams.wait

    def impatient(streams, stream, event):
        # The first wait of a step is for its inputs.
        if stream == "compute" and streams.step_begins:
            streams.step_begins = False
            return
        wait(streams, stream, event)

    run = DeviceSteps.run

    def begin(computer, step):
        computer._streams.step_begins = True
        return run(computer, step)

    monkeypatch.setattr(DeferredStreams, "wait", impatient)
    monkeypatch.setattr(DeviceSteps, "run", begin)


def forget_results(monkeypatch):
    """The host reads results without waiting for them."""
    record = DeferredStreams.record

    def forgotten(streams, stream):
        event = record(streams, stream)
        return ForgottenEvent() if stream == "compute" else event

    monkeypatch.setattr(DeferredStreams, "record", forgotten)


def keep_segments(monkeypatch):
    """A graph reads the segments of the texts that it was captured with."""
    send = DecodeGraphs.send

    def once(graphs, tables, adapters):
        for size in graphs._sizes.values():
            size.adapters = adapters if size.captured is not None else None
        return send(graphs, tables, adapters)

    monkeypatch.setattr(DecodeGraphs, "send", once)


@pytest.mark.parametrize("mistake", [forget_layers, forget_inputs, forget_results, keep_segments])
def test_each_mistake_is_seen(store, expected, deferred_engine, monkeypatch, mistake):
    """What the tests above hold, they hold because a missing event gives wrong answers here."""
    requests, wanted = expected
    mistake(monkeypatch)
    for seed in (3, 2, *range(12)):  # the first two mostly show it
        try:
            with deferred_engine(seed, device_memory=memory_for(store, 0.6), max_running=5) as engine:
                same(engine.run(requests), wanted)
        except (AssertionError, ValueError, IndexError, RuntimeError):
            return
    pytest.fail(f"nobody noticed: {mistake.__doc__}")


def test_auto_is_the_cpu_where_there_is_no_gpu(store):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with hmi.Engine(store, **OPTIONS) as engine:
        assert not engine._core.streams.is_asynchronous
    with pytest.raises(hmi.errors.DeviceUnavailableError, match="cuda"):
        hmi.Engine(store, device="cuda", **OPTIONS)
