"""Decoders end to end: equal to transformers and to the written definition, alone or among others."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import sentences
from decoder_stores import END, PROMPTS, WHOLE, adapters, make_store
from reference_hgpt import ReferenceHgpt, generate_greedily
from transformers import GPT2LMHeadModel

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.knowledge.plot_table import open_plot


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()


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


@pytest.mark.parametrize("place", ["config", "generation", "both", "null"])
def test_a_text_ends_where_that_of_transformers_does(
    tiny_gpt2: Path, model: GPT2LMHeadModel, tmp_path: Path, place: str
) -> None:
    prompt = torch.tensor([[5, 9, 70]])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": END}
    unending = model.generate(prompt, eos_token_id=None, **settings)[0, 3:].tolist()
    early, late = unending[3], unending[8]
    ends = {
        "config": {"config": [late, early]},
        "generation": {"config": END, "generation_config": [late, early]},
        "both": {"config": early, "generation_config": late},
        "null": {"config": early, "generation_config": None},
    }
    base = Path(shutil.copytree(tiny_gpt2, tmp_path / "base"))
    (base / "generation_config.json").unlink()
    for name, tokens in ends[place].items():
        file = base / f"{name}.json"
        fields = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(fields | {"eos_token_id": tokens}))
    expected = GPT2LMHeadModel.from_pretrained(base).generate(prompt, **settings)[0, 3:].tolist()
    with hmi.Store.create(tmp_path / "s", general=base, plot_layers=0) as store:
        store.add_tenant("plain", domain="general", adapter=hmi.Adapter({}), head=hmi.GenerationHead())
        with hmi.Engine(store) as engine:
            sampling = hmi.Sampling(max_tokens=12)
            (response,) = engine.run([hmi.Request("plain", input_ids=prompt[0].tolist(), sampling=sampling)])
    assert list(response.token_ids) == expected
    assert (response.finish_reason == "stop") == (len(expected) < 12)


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
