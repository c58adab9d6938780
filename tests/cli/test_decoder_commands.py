"""A store of decoders by the command line alone."""

import json

import pytest
from cli.command_line import hmi
from conftest import sentences, write_jsonl
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel


@pytest.fixture(scope="module")
def made(tiny_gpt2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    store = folder / "store"
    created = hmi("init", store, "--general", tiny_gpt2, "--plot-layers", 2, "--json")
    assert created.returncode == 0, created.stderr
    general = json.loads(created.stdout)["general"]
    assert (general["family"], general["window"]) == ("gpt2", 3)
    corpus = write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in sentences(60, seed=1)])
    added = hmi("domain", "add", store, "news", "--corpus", corpus, "--json")
    assert added.returncode == 0, added.stderr
    config = LoraConfig(
        r=4, target_modules=["c_attn"], layers_to_transform=[2, 3], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    get_peft_model(GPT2LMHeadModel.from_pretrained(tiny_gpt2), config).save_pretrained(folder / "adapter")
    imported = hmi(
        "tenant", "import", store, "acme/news", "--adapter", folder / "adapter", "--domain", "news", "--json"
    )
    assert imported.returncode == 0, imported.stderr
    return store


def test_run_generates(made):
    request = {"tenant": "acme/news", "text": "the cell", "sampling": {"max_tokens": 5, "ignore_end": True}}
    lines = [
        request | {"id": 1},
        request | {"sampling": {"max_tokens": 5, "ignore_end": True, "logprobs": True, "stop": "zzz"}},
        request | {"sampling": {"maximum": 5}},
        request | {"sampling": {"top_k": 5}},
        request | {"sampling": [5]},
    ]
    done = hmi("run", made, text="\n".join(map(json.dumps, lines)))
    assert done.returncode == 0
    first, second, *bad = map(json.loads, done.stdout.splitlines())
    assert first["kind"] == "generation" and first["finish_reason"] == "length" and first["id"] == 1
    assert first["usage"]["generated_tokens"] == 5
    assert second["text"] == first["text"] and len(second["logprobs"]) == len(second["token_ids"]) == 5
    for answer, word in zip(bad, ("maximum", "top_k", "sampling"), strict=True):
        assert answer["error"]["type"] == "InvalidRequestError" and word in answer["error"]["message"]


def test_what_is_for_encoders_alone_says_so(made, tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", [{"text": t, "label": t[0]} for t in sentences(40)])
    sample = tmp_path / "sample.txt"
    sample.write_text("the cell\n")
    for command in (
        ("tenant", "train", made, "x", "--data", data, "--domain", "news"),
        ("domain", "show", made, "news", "--sample", sample),
        ("distill", made, "--corpus", sample, "--work", tmp_path / "work"),
    ):
        done = hmi(*command)
        assert done.returncode == 2 and "decoders" in done.stderr, (command, done.stderr)


def test_lists_and_verifies(made):
    (tenant,) = json.loads(hmi("tenant", "list", made, "--json").stdout)
    assert tenant["head_kind"] == "generation" and tenant["kind"] == "lora"
    assert hmi("tenant", "list", made).returncode == hmi("domain", "list", made).returncode == 0
    assert json.loads(hmi("verify", made, "--json").stdout)["problems"] == []
