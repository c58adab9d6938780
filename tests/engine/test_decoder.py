"""Decoders end to end: equal to transformers and to the written definition, alone or among others."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch
from conftest import sentences
from reference_hgpt import ReferenceHgpt, generate_greedily
from transformers import GPT2LMHeadModel

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.knowledge.adapters import KINDS
from hmi_engine.knowledge.plot_table import open_plot

END = 0
PROMPTS = sentences(12, seed=9, longest=8)
WHOLE = hmi.Sampling(max_tokens=20, ignore_end=True, logprobs=True)


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()


def make_store(path: Path, base: Path, plot_layers: int, tenants=None, *, window=None) -> hmi.Store:
    """A store of decoders with a domain, and tenants by name: their adapters; by default one without."""
    store = hmi.Store.create(path, general=base, plot_layers=plot_layers, window=window, row_dtype="float32")
    store.add_domain("news", sentences(60, seed=1), plot_bytes="1MiB", min_count=2)
    for name, adapter in (tenants or {"plain": hmi.Adapter({})}).items():
        store.add_tenant(name, domain="news", adapter=adapter, head=hmi.GenerationHead())
    return store


def adapters(store: hmi.Store) -> dict[str, hmi.Adapter]:
    """A tenant of each kind, with blocks at every site of it."""
    return {
        kind: hmi.random_adapter(store.general, kind, 4, seed, sites=KINDS[kind].sites)
        for seed, kind in enumerate(KINDS)
    }


def table_of(store: hmi.Store) -> set[tuple[int, ...]]:
    """The n-grams that have rows in the domain's table."""
    table = open_plot(store.layout.resolve(store.domains["news"].file))
    tokens = hmi_kernels.ngram_tokens(table.row_keys).tolist()
    return {tuple(token for token in ngram if token >= 0) for ngram in tokens}


def check_text(response: hmi.Response, logits_of, prompt_ids: list[int]) -> None:
    """Every token is the likeliest after those before it, and its log-probability what the oracle says."""
    assert response.error is None
    ids = [*prompt_ids, *response.token_ids]
    logits = logits_of(ids).detach().double()
    for place, (token, logprob) in enumerate(
        zip(response.token_ids, response.logprobs, strict=True), len(prompt_ids) - 1
    ):
        expected = logits[place].log_softmax(0)
        assert logprob == pytest.approx(float(expected[token]), abs=2e-4)
        assert float(expected.max() - expected[token]) < 2e-4


def test_without_a_table_it_is_transformers(tiny_gpt2: Path, model: GPT2LMHeadModel, tmp_path: Path) -> None:
    with make_store(tmp_path / "s", tiny_gpt2, 0) as store, hmi.Engine(store) as engine:
        prompts = store.encoder.token_ids(PROMPTS)
        responses = engine.run([hmi.Request("plain", text, sampling=WHOLE) for text in PROMPTS])
    for prompt, response in zip(prompts, responses, strict=True):
        generated = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=END
        )
        assert list(response.token_ids) == generated[0, len(prompt) :].tolist()
        check_text(response, lambda ids: model(torch.tensor([ids])).logits[0], prompt)


def test_a_long_text_equals_transformers_token_for_token(tmp_path: Path) -> None:
    from conftest import write_gpt2

    base = write_gpt2(tmp_path / "base", n_positions=300)
    model = GPT2LMHeadModel.from_pretrained(base).eval()
    sampling = hmi.Sampling(max_tokens=256, ignore_end=True)
    with make_store(tmp_path / "s", base, 0) as store, hmi.Engine(store) as engine:
        (prompt,) = store.encoder.token_ids(["the cell"])
        (response,) = engine.run([hmi.Request("plain", "the cell", sampling=sampling)])
    generated = model.generate(
        torch.tensor([prompt]), max_new_tokens=256, do_sample=False, eos_token_id=None, pad_token_id=END
    )
    assert list(response.token_ids) == generated[0, len(prompt) :].tolist()
    assert response.finish_reason == "length" and response.usage.generated_tokens == 256


@pytest.mark.parametrize("plot_layers", [0, 2])
def test_every_kind_of_adapter_mixed(tiny_gpt2, model, tmp_path: Path, plot_layers: int) -> None:
    with make_store(tmp_path / "s", tiny_gpt2, plot_layers) as store:
        kinds = adapters(store)
        for name, adapter in kinds.items():
            store.add_tenant(name, domain="news", adapter=adapter, head=hmi.GenerationHead())
        requests = [
            hmi.Request(name, text, sampling=WHOLE) for text in PROMPTS[:3] for name in ("plain", *kinds)
        ]
        reference = ReferenceHgpt(model, plot_layers)
        with hmi.Engine(store, miss="exact") as engine:
            for request, response in zip(requests, engine.run(requests), strict=True):
                blocks = kinds[request.tenant].blocks if request.tenant in kinds else {}
                (prompt,) = store.encoder.token_ids([request.text])
                check_text(response, lambda ids, blocks=blocks: reference.logits(ids, blocks), prompt)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("plot_layers", [1, 3])
@pytest.mark.parametrize("miss", ["exact", "backoff"])
def test_looked_up_layers_are_what_the_definition_says(
    tiny_gpt2, model, tmp_path: Path, plot_layers: int, window: int, miss: str
) -> None:
    with make_store(tmp_path / "s", tiny_gpt2, plot_layers, window=window) as store:
        reference = ReferenceHgpt(model, plot_layers, window=window)
        table = table_of(store) if miss == "backoff" else None
        prompts = store.encoder.token_ids(PROMPTS)
        with hmi.Engine(store, miss=miss) as engine:
            responses = engine.run([hmi.Request("plain", text, sampling=WHOLE) for text in PROMPTS])
            plot = engine.stats().plot
        for prompt, response in zip(prompts, responses, strict=True):
            check_text(response, lambda ids: reference.logits(ids, table=table), prompt)
        assert 0 < plot["window_hits"] < plot["windows"]
        assert (plot["windows_computed"] > 0) == (miss == "exact")


def test_a_classifier_reads_the_last_token(tiny_gpt2, model, tmp_path: Path, make_head) -> None:
    with make_store(tmp_path / "s", tiny_gpt2, 2) as store:
        head = make_head(store.general, pooling="last")
        store.add_tenant("judge", domain="news", adapter=hmi.Adapter({}), head=head)
        with hmi.Engine(store, miss="exact") as engine:
            responses = engine.run([hmi.Request("judge", text) for text in PROMPTS])
        for text, response in zip(PROMPTS, responses, strict=True):
            (ids,) = store.encoder.token_ids([text])
            expected = (head.weight @ ReferenceHgpt(model, 2).last_state(ids) + head.bias).softmax(0)
            assert response.scores == pytest.approx(
                dict(zip(head.labels, expected.tolist(), strict=True)), abs=1e-5
            )


def random_batches(store: hmi.Store, count: int) -> None:
    """Texts of 64 requests of all tenants are what each of them gives alone, bit for bit."""
    generator = random.Random(4)
    names = list(store.tenants)
    pool = [
        hmi.Request(
            generator.choice(names),
            text,
            sampling=hmi.Sampling(
                max_tokens=generator.randint(1, 12),
                ignore_end=True,
                logprobs=True,
                **({} if generator.random() < 0.5 else {"temperature": 1.3, "seed": number}),
            ),
        )
        for number, text in enumerate(sentences(96, seed=11, longest=10))
    ]
    with hmi.Engine(store, prefix_cache="off") as engine:
        alone = [engine.run([request])[0] for request in pool]
        for _ in range(count):
            chosen = generator.sample(range(len(pool)), 64)
            responses = engine.run([pool[number] for number in chosen])
            for number, response in zip(chosen, responses, strict=True):
                assert response.token_ids == alone[number].token_ids
                assert response.logprobs == alone[number].logprobs
        assert engine.stats().generation["blocks_held"] == 0


@pytest.fixture
def mixed_store(tiny_gpt2: Path, tmp_path: Path):
    with make_store(tmp_path / "s", tiny_gpt2, 2) as store:
        for name, adapter in adapters(store).items():
            store.add_tenant(name, domain="news", adapter=adapter, head=hmi.GenerationHead())
        yield store


def test_a_text_does_not_depend_on_its_batch(mixed_store: hmi.Store) -> None:
    random_batches(mixed_store, 6)


@pytest.mark.slow
def test_a_text_does_not_depend_on_its_batch_a_thousand_times(mixed_store: hmi.Store) -> None:
    random_batches(mixed_store, 1000)


@pytest.mark.parametrize("options", [{"max_step_tokens": 3}, {"cache_memory": 40_000}, {"block_tokens": 1}])
def test_pieces_of_prompts_and_preemption_change_nothing(mixed_store: hmi.Store, options: dict) -> None:
    requests = [
        hmi.Request(name, text, sampling=WHOLE)
        for name, text in zip(list(mixed_store.tenants) * 3, PROMPTS, strict=False)
    ]
    with hmi.Engine(mixed_store) as engine, hmi.Engine(mixed_store, **options) as other:
        expected, found = engine.run(requests), other.run(requests)
        statistics = other.stats().generation
    assert [response.token_ids for response in found] == [response.token_ids for response in expected]
    assert statistics["blocks_held"] == 0
    if "cache_memory" in options:
        assert statistics["preemptions"] > 0


def test_prompts_that_begin_alike_share_blocks_and_give_the_same(mixed_store: hmi.Store) -> None:
    start = " ".join(PROMPTS)[:120]
    requests = [hmi.Request("lora", f"{start} {end}", sampling=WHOLE) for end in ("cell", "drug", "of")]
    with hmi.Engine(mixed_store, prefix_cache="off") as engine:
        expected = engine.run(requests)
    with hmi.Engine(mixed_store) as engine:
        found = [engine.run([request])[0] for request in requests]
        other = engine.run([hmi.Request("ia3", requests[0].text, sampling=WHOLE)])[0]
    assert [response.token_ids for response in found] == [response.token_ids for response in expected]
    assert [response.logprobs for response in found] == [response.logprobs for response in expected]
    assert found[0].usage.reused_tokens == 0 < found[1].usage.reused_tokens <= found[2].usage.reused_tokens
    assert other.usage.reused_tokens == 0, "another tenant's weights"


def test_equal_weights_share_blocks_unless_tenants_are_kept_apart(tiny_gpt2, tmp_path: Path) -> None:
    prompt = " ".join(PROMPTS)[:120]
    with make_store(tmp_path / "s", tiny_gpt2, 2) as store:
        store.add_tenant("twin", domain="news", adapter=hmi.Adapter({}), head=hmi.GenerationHead())
        for prefix_cache, is_shared in (("shared", True), ("tenant", False), ("off", False)):
            with hmi.Engine(store, prefix_cache=prefix_cache) as engine:
                engine.run([hmi.Request("plain", prompt, sampling=WHOLE)])
                (twin,) = engine.run([hmi.Request("twin", prompt, sampling=WHOLE)])
            assert (twin.usage.reused_tokens > 0) == is_shared


def test_stop_strings_and_the_end_token(tiny_gpt2, model, tmp_path: Path) -> None:
    with make_store(tmp_path / "s", tiny_gpt2, 0) as store, hmi.Engine(store) as engine:
        (whole,) = engine.run([hmi.Request("plain", PROMPTS[0], sampling=WHOLE)])
        stop = whole.text[5:8]
        (cut,) = engine.run(
            [
                hmi.Request(
                    "plain", PROMPTS[0], sampling=hmi.Sampling(max_tokens=20, ignore_end=True, stop=(stop,))
                )
            ]
        )
        assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
        sampling = hmi.Sampling(max_tokens=60)
        responses = engine.run([hmi.Request("plain", text, sampling=sampling) for text in PROMPTS])
        prompts = store.encoder.token_ids(PROMPTS)
    for prompt, response in zip(prompts, responses, strict=True):
        room = min(60, 96 - len(prompt))
        expected = generate_greedily(lambda ids: model(torch.tensor([ids])).logits[0, -1], prompt, room, END)
        assert list(response.token_ids) == expected
        assert response.finish_reason == ("stop" if expected[-1] == END else "length")


BAD = [
    ({"text": " ".join(["cell"] * 200)}, hmi.errors.TextTooLongError),
    ({"input_ids": []}, hmi.errors.InvalidRequestError),
    ({"input_ids": [5, 10_000]}, hmi.errors.InvalidRequestError),
    ({"text": "a", "sampling": hmi.Sampling(top_k=3)}, hmi.errors.InvalidRequestError),
    ({"text": "a", "sampling": hmi.Sampling(max_tokens=0)}, hmi.errors.InvalidRequestError),
]


@pytest.mark.parametrize(("given", "error"), BAD)
def test_bad_requests_fail_alone(mixed_store: hmi.Store, given: dict, error: type[hmi.HmiError]) -> None:
    with hmi.Engine(mixed_store) as engine:
        bad, good = engine.run([hmi.Request("lora", **given), hmi.Request("lora", "the cell")])
    assert isinstance(bad.error, error) and good.error is None and good.text


def test_a_request_that_the_cache_cannot_hold_is_refused_at_once(mixed_store: hmi.Store) -> None:
    with hmi.Engine(mixed_store, cache_memory=20_000) as engine:
        large, small = engine.run(
            [
                hmi.Request("lora", "the cell", sampling=hmi.Sampling(max_tokens=90)),
                hmi.Request("lora", "the cell", sampling=hmi.Sampling(max_tokens=3)),
            ]
        )
    assert isinstance(large.error, hmi.errors.OverloadedError) and "cache_memory" in str(large.error)
    assert small.error is None


def test_what_a_base_cannot_do_is_refused(tiny_gpt2, tiny_bert, tmp_path: Path, make_head) -> None:
    with make_store(tmp_path / "s", tiny_gpt2, 2) as store:
        for pooling in ("cls", "pooler", "mean"):
            with pytest.raises(hmi.errors.InvalidHeadError, match="last"):
                head = make_head(store.general, pooling=pooling)
                store.add_tenant("x", domain="news", adapter=hmi.Adapter({}), head=head)
        with pytest.raises(hmi.errors.UnsupportedModelError, match="encoders"):
            _ = store.model
        with pytest.raises(hmi.errors.DeviceUnavailableError):
            hmi.Engine(store, device="cuda")
        with pytest.raises(hmi.errors.UnsupportedModelError, match="encoders"):
            store.distill(["a text"])
        with pytest.raises(hmi.errors.UnsupportedModelError, match="encoders"):
            examples = [hmi.Example("a", "x"), hmi.Example("b", "y")] * 20
            store.train_tenant("x", examples, domain="news")
        with pytest.raises(hmi.errors.UnsupportedModelError, match="Ray"):
            store.add_domain("other", ["a text"], ray="auto")
    with hmi.Store.create(tmp_path / "b", general=tiny_bert, plot_layers=0) as store:
        with pytest.raises(hmi.errors.InvalidHeadError, match="encoder"):
            store.add_tenant("x", domain="general", adapter=hmi.Adapter({}), head=hmi.GenerationHead())
        with pytest.raises(hmi.errors.InvalidHeadError, match="last"):
            head = make_head(store.general, pooling="last")
            store.add_tenant("x", domain="general", adapter=hmi.Adapter({}), head=head)


async def collect(engine: hmi.AsyncEngine, request: hmi.Request, most: int | None = None):
    pieces, response = [], None
    async for piece in engine.stream(request):
        if isinstance(piece, hmi.Response):
            response = piece
        else:
            pieces.append(piece)
            if most is not None and len(pieces) >= most:
                break
    return pieces, response


def test_streams_are_what_run_gives(mixed_store: hmi.Store) -> None:
    names = list(mixed_store.tenants)
    requests = [
        hmi.Request(names[number % len(names)], text, sampling=WHOLE) for number, text in enumerate(PROMPTS)
    ]
    with hmi.Engine(mixed_store) as engine:
        expected = engine.run(requests)

    async def stream_all():
        async with hmi.AsyncEngine(mixed_store) as engine:
            return await asyncio.gather(*(collect(engine, request) for request in requests))

    for (pieces, response), whole in zip(asyncio.run(stream_all()), expected, strict=True):
        assert "".join(piece.text for piece in pieces) == response.text == whole.text
        assert tuple(piece.token_id for piece in pieces) == response.token_ids == whole.token_ids


def test_who_leaves_in_mid_stream_frees_its_blocks(mixed_store: hmi.Store) -> None:
    async def leave() -> dict:
        async with hmi.AsyncEngine(mixed_store) as engine:
            long = hmi.Request("lora", "the cell", sampling=hmi.Sampling(max_tokens=80, ignore_end=True))
            stream = engine.stream(long)
            async for _ in stream:
                break
            await stream.aclose()
            response = await engine.submit(hmi.Request("ia3", "the drug", sampling=WHOLE))
            assert response.error is None
            return engine.stats().generation

    statistics = asyncio.run(leave())
    assert statistics["blocks_held"] == 0 and statistics["running"] == 0
    assert statistics["generated_tokens"] < 80


def test_a_tenant_that_is_removed_or_replaced_while_it_generates(mixed_store: hmi.Store) -> None:
    async def change() -> list[hmi.Response]:
        async with hmi.AsyncEngine(mixed_store) as engine:
            long = hmi.Sampling(max_tokens=60, ignore_end=True)
            streams = [
                engine.stream(hmi.Request(name, "the cell", sampling=long)) for name in ("lora", "ia3")
            ]
            for stream in streams:
                await anext(stream)
            mixed_store.remove_tenant("lora")
            other = hmi.random_adapter(mixed_store.general, "lora", 2, 99)
            mixed_store.add_tenant(
                "ia3", domain="news", adapter=other, head=hmi.GenerationHead(), replace=True
            )
            found = []
            for stream in streams:
                async for piece in stream:
                    last = piece
                found.append(last)
            gone = await engine.submit(hmi.Request("lora", "the cell"))
            assert isinstance(gone.error, hmi.errors.UnknownTenantError)
            return found

    with hmi.Engine(mixed_store) as engine:
        long = hmi.Sampling(max_tokens=60, ignore_end=True)
        expected = engine.run([hmi.Request(name, "the cell", sampling=long) for name in ("lora", "ia3")])
    for response, before in zip(asyncio.run(change()), expected, strict=True):
        assert response.error is None and response.token_ids == before.token_ids, (
            "what began goes on as it was"
        )


def test_a_queue_that_is_full_refuses_at_once(mixed_store: hmi.Store) -> None:
    async def flood() -> int:
        limits = hmi.QueueLimits(max_queued_requests=4)
        async with hmi.AsyncEngine(mixed_store, queue_limits=limits, max_running=1) as engine:
            requests = [hmi.Request("lora", "the cell", sampling=WHOLE) for _ in range(40)]
            results = await asyncio.gather(*map(engine.submit, requests), return_exceptions=True)
            refused = [each for each in results if isinstance(each, hmi.errors.OverloadedError)]
            assert all(
                isinstance(each, hmi.Response) and each.error is None
                for each in results
                if each not in refused
            )
            return len(refused)

    assert 0 < asyncio.run(flood()) < 40


def test_closing_fails_what_runs_and_hangs_nobody(mixed_store: hmi.Store) -> None:
    async def close() -> list:
        engine = hmi.AsyncEngine(mixed_store)
        long = hmi.Sampling(max_tokens=90, ignore_end=True)
        tasks = [
            asyncio.create_task(engine.submit(hmi.Request("lora", "the", sampling=long))) for _ in range(50)
        ]
        await asyncio.sleep(0.05)
        await engine.close(finish=False)
        return await asyncio.gather(*tasks, return_exceptions=True)

    for result in asyncio.run(close()):
        error = result.error if isinstance(result, hmi.Response) else result
        assert error is None or isinstance(error, hmi.errors.EngineClosedError)


async def come_and_go(store: hmi.Store, count: int) -> dict:
    """Random requests, of which many leave at a random moment; what the engine holds in the end."""
    draw = random.Random(3)
    names = [*store.tenants, "nobody"]
    options = {"cache_memory": 60_000, "max_running": 24, "max_step_tokens": 48}
    async with hmi.AsyncEngine(store, **options) as engine:

        async def one(number: int) -> None:
            sampling = hmi.Sampling(max_tokens=draw.randint(1, 12), temperature=1.0, seed=number)
            request = hmi.Request(draw.choice(names), draw.choice(PROMPTS), sampling=sampling)
            timeout = draw.choice([None, None, 0.0, 0.01])
            task = asyncio.create_task(engine.submit(request, timeout=timeout))
            if draw.random() < 0.4:
                await asyncio.sleep(draw.random() * 0.05)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        for start in range(0, count, 100):
            await asyncio.gather(*(one(start + number) for number in range(min(100, count - start))))
        await engine.drain()
        while engine.stats().generation["running"]:
            await asyncio.sleep(0.001)
        assert not engine._core.residency._queue._waiting, "nobody waits for a tenant any more"
        return engine.stats().generation


def test_requests_that_come_and_go_leave_nothing(mixed_store: hmi.Store) -> None:
    statistics = asyncio.run(come_and_go(mixed_store, 300))
    assert (statistics["blocks_held"], statistics["waiting"]) == (0, 0)
    assert statistics["preemptions"] > 0


@pytest.mark.slow
def test_ten_thousand_requests_that_come_and_go_leave_nothing(mixed_store: hmi.Store) -> None:
    statistics = asyncio.run(come_and_go(mixed_store, 10_000))
    assert (statistics["blocks_held"], statistics["waiting"]) == (0, 0)
