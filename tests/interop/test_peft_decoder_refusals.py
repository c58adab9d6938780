"""Decoders' folders that HMI refuses, each by the name of what it does not compute."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config
from safetensors.torch import load_file, save_file

import hmi_engine as hmi
from hmi_engine.errors import HmiError, InvalidAdapterError, InvalidHeadError
from hmi_engine.interop import read_peft

from .mutations import copy_folder, mutate


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, r"lora_A\.weight \(peft_type IA3.*has no place"),
        ({"peft_type": "ADALORA"}, "AdaLoRA.*LORA or IA3"),
        ({"peft_type": "PREFIX_TUNING"}, "prefix tuning.*in front of the text"),
        ({"use_dora": True}, "DoRA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"bias": "all"}, r"bias is 'all', but h\.0\.attn\.c_attn\.bias is not in the file"),
        ({"bias": "lora_only"}, r"bias is 'lora_only', but h\.0\.attn\.c_attn\.bias"),
        ({"lora_bias": True}, r"has no lora_B\.bias"),
        ({"rank_pattern": {"c_attn": 5}}, "has rank 4, but adapter_config.json says 5"),
        ({"target_modules": ["c_attn", "c_fc"]}, r"mlp\.c_fc has no lora_A"),
        ({"target_modules": ["c_fc"]}, r"c_attn has a lora_A.*target_modules .* does not name it"),
        ({"layers_to_transform": [0, 1, 2]}, r"h\.3\.attn\.c_attn.*does not name it"),
    ],
)
def test_refused_settings(save_gpt2, make_gpt2_general, fields, message):
    _, folder = save_gpt2()
    change_config(folder, **fields)
    with pytest.raises(InvalidAdapterError, match=message):
        read_peft(folder, make_gpt2_general())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["c_attn", "wte"]}, r"wte.*has no place"),
        ({"target_modules": ["c_attn", "lm_head"]}, r"lm_head.*has no place"),
        ({"modules_to_save": ["ln_f"]}, r"transformer\.ln_f\.(bias|weight).*has no place"),
        ({"modules_to_save": ["mlp"]}, r"mlp\.c_fc.*has no place"),
        ({"task_type": "TOKEN_CLS"}, r"classifier\.(bias|weight).*'TOKEN_CLS'.*has no place"),
        ({"kind": IA3Config, "target_modules": ["c_attn"], "feedforward_modules": ["c_attn"]},
         r"c_attn is one of feedforward_modules: HMI scales what query gives"),
    ],
)  # fmt: skip
def test_refused_folders(save_gpt2, make_gpt2_general, gpt2_tensors, config, message):
    _, folder = save_gpt2(**config)
    with pytest.raises(InvalidAdapterError, match=message):
        read_peft(folder, make_gpt2_general(), base=gpt2_tensors)


@pytest.mark.parametrize("module", ["wte", "wpe", "lm_head"])
def test_shared_weights_must_be_the_bases(save_gpt2, make_gpt2_general, gpt2_tensors, module):
    def train(model):
        for name, parameter in model.named_parameters():
            if f"{module}.modules_to_save" in name:
                parameter.data += 0.01

    imported = read_peft(save_gpt2(modules_to_save=[module])[1], make_gpt2_general(), base=gpt2_tensors)
    assert any(f"{module}.weight equals the base" in warning for warning in imported.warnings)
    _, folder = save_gpt2(modules_to_save=[module], touch=train)
    with pytest.raises(InvalidAdapterError, match=rf"{module}\.weight .*trained or resized.*tenants share"):
        read_peft(folder, make_gpt2_general(), base=gpt2_tensors)
    with pytest.raises(InvalidAdapterError, match="pass `base`"):
        read_peft(folder, make_gpt2_general())


def test_a_trained_last_bias_needs_a_score(save_gpt2, make_gpt2_general, gpt2_tensors):
    _, folder = save_gpt2(bias="all")
    with pytest.raises(InvalidAdapterError, match=r"ln_f\.bias was trained.*lora_only"):
        read_peft(folder, make_gpt2_general(), base=gpt2_tensors)
    with pytest.raises(InvalidAdapterError, match="pass `base`"):
        read_peft(folder, make_gpt2_general())
    _, folder = save_gpt2("SEQ_CLS", bias="all")
    with pytest.raises(InvalidAdapterError, match=r"ln_f\.bias was trained"):
        read_peft(folder, make_gpt2_general(), base=gpt2_tensors, head=hmi.EmbeddingHead("last"))


MODULE = "base_model.model.transformer.h.1.attn.c_attn"
BEYOND = "base_model.model.transformer.h.9.attn.c_attn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{MODULE}.lora_A.weight": torch.zeros(4, 31)}), "layer 1, query, a: shape"),
        (lambda t: t.update({f"{MODULE}.lora_B.weight": torch.zeros(95, 4)}), "for 95 outputs, expected 96"),
        (lambda t: t.update({f"{MODULE}.lora_B.weight": torch.zeros(96, 3)}), "layer 1, query, b: shape"),
        (lambda t: t.update({f"{MODULE}.lora_B.weight": torch.full((96, 4), torch.nan)}), "query, b.*NaN"),
        (lambda t: t.pop(f"{MODULE}.lora_B.weight"), r"has no lora_B\.weight"),
        (lambda t: t.update({f"{BEYOND}.lora_A.weight": torch.zeros(4, 32)}),
         r"no tensor .*h\.9\.attn\.c_attn\.lora_B"),
        (lambda t: t.update({"base_model.model.transformer.h.0.crossattention.c_attn.lora_A.weight":
                             torch.zeros(4, 32)}), "crossattention.*has no place"),
        (lambda t: t.update({f"{BEYOND}.lora_A.weight": torch.zeros(4, 32),
                             f"{BEYOND}.lora_B.weight": torch.zeros(96, 4)}), "layer 9, but tests/tiny has"),
        (lambda t: t.update({"base_model.model.score.weight": torch.zeros(3, 32)}), "score.*has no place"),
    ],
)  # fmt: skip
def test_refused_tensors(save_gpt2, make_gpt2_general, change, message):
    _, folder = save_gpt2()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(InvalidAdapterError, match=message) as caught:
        read_peft(folder, make_gpt2_general())
    assert str(folder) in str(caught.value)


@pytest.fixture(scope="module")
def sound(save_gpt2):
    """A sound folder of each sort."""
    return [
        save_gpt2(target_modules="all-linear", bias="lora_only", lora_bias=True)[1],
        save_gpt2(kind=IA3Config)[1],
        save_gpt2("SEQ_CLS", bias="all", modules_to_save=["score", "wpe"])[1],
    ]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_mutated_folders(sound, make_gpt2_general, gpt2_tensors, tmp_path_factory, random):
    """Whatever was changed, it is refused by name, or what it gives fits the base model."""
    folder = copy_folder(random.choice(sound), tmp_path_factory.getbasetemp() / "fuzzed-gpt2")
    mutate(folder, random)
    try:
        imported = read_peft(folder, make_gpt2_general(), base=gpt2_tensors)
    except HmiError as error:
        assert str(folder) in str(error)
        assert str(error).isprintable()
    else:
        imported.adapter.validate(make_gpt2_general())


def test_a_store_of_decoders_refuses_what_is_for_encoders(save_gpt2, tiny_gpt2, tmp_path):
    with hmi.Store.create(tmp_path / "store", general=tiny_gpt2, plot_layers=0) as store:
        store.import_peft(save_gpt2()[1], tenant="writer")
        with pytest.raises(InvalidHeadError, match=r"has no score: .*modules_to_save=\['score'\]"):
            store.import_peft(save_gpt2("FEATURE_EXTRACTION")[1], tenant="other")
        with pytest.raises(InvalidAdapterError, match=r"for encoders.*import_peft"):
            store.import_adapterhub(tmp_path, tenant="other")
        for export in (store.export_peft, store.export_adapterhub):
            with pytest.raises(InvalidAdapterError, match=r"for encoders.*is a decoder"):
                export("writer", tmp_path / "out")
