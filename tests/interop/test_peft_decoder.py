"""Decoders' folders saved by PEFT, read by HMI: the same logits and scores, and clear refusals."""

import json

import pytest
import torch
from conftest import sentences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig
from peft.tuners.lora import LoraLayer
from reference_hgpt import ReferenceHgpt

import hmi_engine as hmi
from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop import read_peft
from hmi_engine.knowledge.adapters import BiasBlock, Site

SITES = {
    "attn.c_attn": (Site.QUERY, Site.KEY, Site.VALUE),
    "attn.c_proj": (Site.ATTENTION_OUTPUT,),
    "mlp.c_fc": (Site.FFN_UP,),
    "mlp.c_proj": (Site.FFN_DOWN,),
}
MATTERS = 1e-2
"""An adapter that changes logits by less than that would prove nothing."""

IDS = [5, 300, 17, 42, 8, 8, 111, 260, 3, 77, 5, 9]


@torch.no_grad()
def logits(model, ids=IDS):
    return model(torch.tensor([ids])).logits[0]


LORA_CASES = {
    "by default": {},
    "fan_in_fan_out is false": {"fan_in_fan_out": False},
    "rslora": {"use_rslora": True, "target_modules": ["c_attn", "c_proj"]},
    "only the feed-forward network's c_proj": {"target_modules": ["mlp.c_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["c_attn", "c_proj", "c_fc"],
        "rank_pattern": {"attn.c_proj": 2, r"h\.[01]\.mlp\.c_proj": 7},
        "alpha_pattern": {"c_proj": 3, "^transformer.h.2.*": 11},
    },
    "some layers": {"target_modules": ["c_attn"], "layers_to_transform": [1, 3]},
    "biases of LoRA": {"target_modules": "all-linear", "lora_bias": True},
    "trained biases": {"target_modules": ["c_attn", "mlp.c_fc"], "bias": "lora_only"},
    "both biases": {"target_modules": ["c_attn"], "bias": "lora_only", "lora_bias": True},
}
IA3_CASES = {
    "by default": {},
    "all outputs": {"target_modules": ["c_attn", "c_proj", "c_fc"], "feedforward_modules": []},
    "inputs": {"target_modules": ["c_attn", "c_proj", "c_fc"], "feedforward_modules": ["c_proj", "c_fc"]},
}


@pytest.mark.parametrize(
    ("kind", "config"),
    [*((LoraConfig, c) for c in LORA_CASES.values()), *((IA3Config, c) for c in IA3_CASES.values())],
    ids=[*(f"lora {name}" for name in LORA_CASES), *(f"ia3 {name}" for name in IA3_CASES)],
)
def test_logits_equal_those_of_peft(
    save_gpt2, load_gpt2, make_gpt2_general, gpt2, gpt2_tensors, kind, config
):
    """The blocks, in the written definition of their places, against PEFT."""
    _, folder = save_gpt2(kind=kind, **config)
    imported = read_peft(folder, make_gpt2_general(), base=gpt2_tensors)
    expected = logits(load_gpt2(folder))
    torch.testing.assert_close(
        ReferenceHgpt(gpt2, 0).logits(IDS, imported.adapter.blocks), expected, atol=1e-4, rtol=0
    )
    assert (expected - logits(gpt2)).abs().max() > MATTERS
    assert imported.head == hmi.GenerationHead()
    assert imported.dropped == imported.warnings == ()


def test_fan_in_fan_out_changes_nothing_in_the_files(save_gpt2, make_gpt2_general):
    """PEFT goes by the layers' class; a folder may say either."""
    _, folder = save_gpt2()
    blocks = read_peft(folder, make_gpt2_general()).adapter.blocks
    change_config(folder, fan_in_fan_out=False)
    again = read_peft(folder, make_gpt2_general()).adapter.blocks
    assert all(torch.equal(block.b, again[place].b) for place, block in blocks.items())


def updates_of_peft(model):
    """What PEFT adds to each weight matrix [in, out], by layer and module: its own get_delta_weight."""
    return {
        (int(name.split(".h.")[1].split(".")[0]), ".".join(name.split(".")[-2:])): module.get_delta_weight(
            "default"
        ).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


patterns = st.dictionaries(
    st.sampled_from(["c_attn", "c_proj", "attn.c_proj", r"h\.[02]\..*"]), st.integers(1, 9)
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    targets=st.sets(st.sampled_from(["c_attn", "c_proj", "attn.c_proj", "c_fc"]), min_size=1),
    layers=st.none() | st.sets(st.integers(0, 3), min_size=1).map(sorted),
    rank=st.integers(1, 8),
    alpha=st.integers(1, 32),
    use_rslora=st.booleans(),
    ranks=patterns,
    alphas=patterns,
)
def test_updates_equal_those_of_peft_or_both_refuse(
    save_gpt2, load_gpt2, make_gpt2_general, targets, layers, rank, alpha, use_rslora, ranks, alphas
):
    """Patterns that overlap can lose their order in the folder, and then ranks contradict the tensors."""
    _, folder = save_gpt2(
        target_modules=list(targets),
        layers_to_transform=layers,
        r=rank,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    try:
        model = load_gpt2(folder)
    except RuntimeError as error:
        assert "size mismatch" in str(error)
        with pytest.raises(InvalidAdapterError, match=r"has rank .*, but adapter_config\.json says"):
            read_peft(folder, make_gpt2_general())
        return
    blocks = dict(read_peft(folder, make_gpt2_general()).adapter.blocks)
    for (layer, module), expected in updates_of_peft(model).items():
        own = [blocks.pop((layer, site)) for site in SITES[module]]
        found = torch.cat([block.scale * block.a @ block.b for block in own], dim=1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not blocks


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_scores_equal_those_of_peft(save_gpt2, make_gpt2_general, gpt2, gpt2_tensors, bias):
    """With bias='all' the last LayerNorm's bias was trained too, and is the head's then."""
    model, folder = save_gpt2("SEQ_CLS", bias=bias, target_modules=["c_attn", "c_fc"])
    imported = read_peft(folder, make_gpt2_general(), base=gpt2_tensors, labels=["a", "b", "c"])
    head = imported.head
    assert (head.kind, head.pooling, head.labels) == ("classification", "last", ("a", "b", "c"))
    assert bool(head.bias.any()) == (bias == "all")
    state = ReferenceHgpt(gpt2, 0).last_state(IDS, imported.adapter.blocks)
    torch.testing.assert_close(head.weight @ state + head.bias, logits(model), atol=1e-4, rtol=0)


def test_default_labels_and_problem_types(save_gpt2, make_gpt2_general):
    _, folder = save_gpt2("SEQ_CLS")
    imported = read_peft(folder, make_gpt2_general())
    assert imported.head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert any("LABEL_0" in warning for warning in imported.warnings)
    multi = read_peft(folder, make_gpt2_general(), problem_type="multi_label_classification").head
    assert multi.multi_label
    assert read_peft(folder, make_gpt2_general(), problem_type="regression").head.kind == "regression"
    with pytest.raises(InvalidHeadError, match="2 labels were given, the classifier has 3"):
        read_peft(folder, make_gpt2_general(), labels=["a", "b"])


def test_a_given_head_goes_before_the_folders(save_gpt2, make_gpt2_general):
    given = hmi.EmbeddingHead("last")
    for task_type in ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"):
        assert read_peft(save_gpt2(task_type)[1], make_gpt2_general(), head=given).head is given
    none = read_peft(save_gpt2("FEATURE_EXTRACTION")[1], make_gpt2_general())
    assert none.head is None
    assert any("no score" in warning for warning in none.warnings)
    with pytest.raises(InvalidHeadError, match="pooling 'cls' is none that"):
        read_peft(save_gpt2()[1], make_gpt2_general(), head=hmi.EmbeddingHead("cls"))
    with pytest.raises(InvalidHeadError, match="language head has no classes"):
        read_peft(save_gpt2()[1], make_gpt2_general(), labels=["a"])


def test_the_class_of_the_model_stands_in_for_a_task_type(save_gpt2, make_gpt2_general):
    _, folder = save_gpt2()
    change_config(folder, task_type=None)
    assert read_peft(folder, make_gpt2_general()).head is None
    change_config(folder, auto_mapping={"base_model_class": "GPT2LMHeadModel"})
    assert read_peft(folder, make_gpt2_general()).head == hmi.GenerationHead()


def test_lower_layers_are_refused_or_dropped(save_gpt2, make_gpt2_general):
    _, folder = save_gpt2()
    with pytest.raises(InvalidAdapterError, match=r"layer 0.*lower_layers='drop'"):
        read_peft(folder, make_gpt2_general(2))
    imported = read_peft(folder, make_gpt2_general(2), lower_layers="drop")
    assert imported.dropped == tuple(
        f"layer {layer}, {site}" for layer in (0, 1) for site in ("key", "query", "value")
    )
    assert imported.adapter.layers == (2, 3)
    with pytest.raises(ValueError, match="lower_layers"):
        read_peft(folder, make_gpt2_general(2), lower_layers="keep")


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_biases_that_were_not_trained_are_no_blocks(save_gpt2, make_gpt2_general, gpt2, gpt2_tensors):
    def reset(model):
        own = dict(gpt2.named_parameters())
        for name, parameter in model.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if plain in own and plain.endswith(".bias"):
                parameter.data = own[plain].detach().clone()

    imported = read_peft(save_gpt2(bias="all", touch=reset)[1], make_gpt2_general(), base=gpt2_tensors)
    assert not any(isinstance(block, BiasBlock) for block in imported.adapter.blocks.values())


@torch.no_grad()
def test_the_engine_answers_as_peft_does(save_gpt2, tiny_gpt2, tmp_path):
    """LoRA, IA3, biases and a classifier as tenants of one store, in one batch."""
    models = {
        "lora": save_gpt2(target_modules="all-linear", bias="lora_only"),
        "ia3": save_gpt2(kind=IA3Config),
        "judge": save_gpt2("SEQ_CLS", bias="all"),
    }
    texts = sentences(4, seed=9, longest=8)
    sampling = hmi.Sampling(max_tokens=8, ignore_end=True, logprobs=True)
    with hmi.Store.create(tmp_path / "store", general=tiny_gpt2, plot_layers=0) as store:
        for name, (_, folder) in models.items():
            store.import_adapter(folder, tenant=name)
        requests = [
            hmi.Request(name, text) if name == "judge" else hmi.Request(name, text, sampling=sampling)
            for text in texts
            for name in models
        ]
        with hmi.Engine(store) as engine:
            responses = engine.run(requests)
        prompts = dict(zip(texts, store.encoder.token_ids(texts), strict=True))
    for request, response in zip(requests, responses, strict=True):
        assert response.error is None
        prompt, model = prompts[request.text], models[request.tenant][0]
        if request.tenant == "judge":
            expected = logits(model, prompt).softmax(0).tolist()
            assert list(response.scores.values()) == pytest.approx(expected, abs=1e-4)
            continue
        found = logits(model, [*prompt, *response.token_ids])[len(prompt) - 1 : -1].log_softmax(1)
        chosen = found.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
        assert list(response.logprobs) == pytest.approx(chosen.tolist(), abs=1e-4)
        assert (found.max(1).values - chosen).max() < 1e-4
