"""Folders saved by PEFT, read by HMI: the same updates, the same classifier, and clear refusals."""

import json
import re
import shutil

import pytest
import torch
from peft import IA3Config
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop import read_peft
from hmi_engine.interop.module_patterns import compile_pattern, matches_end
from hmi_engine.knowledge.adapters import Site
from hmi_engine.knowledge.heads import EmbeddingHead

MODULES = {
    "attention.self.query": Site.QUERY,
    "attention.self.key": Site.KEY,
    "attention.self.value": Site.VALUE,
    "attention.output.dense": Site.ATTENTION_OUTPUT,
    "intermediate.dense": Site.FFN_UP,
    "output.dense": Site.FFN_DOWN,
}
ALL_LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def updates_of_peft(model):
    """What PEFT adds to each weight matrix, by layer and site: its own get_delta_weight."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer, _, rest = name.split("encoder.layer.")[1].partition(".")
            found[int(layer), MODULES[rest]] = module.get_delta_weight("default")
    return found


def assert_same_updates(adapter, model):
    expected = updates_of_peft(model)
    assert set(adapter.blocks) == set(expected)
    for place, block in adapter.blocks.items():
        torch.testing.assert_close(block.scale * (block.a @ block.b).T, expected[place], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ALL_LINEAR},
        {"rank_pattern": {"value": 7}, "alpha_pattern": {"value": 5, "query": 3}},
        {"rank_pattern": {r"encoder.layer.[01].attention.self.query": 2}, "use_rslora": True},
        {"rank_pattern": {"layer.1.attention.self.value": 3, "value": 5}, "alpha_pattern": {"^bert.*": 11}},
        {"layers_to_transform": [1, 2]},
    ],
    ids=["plain", "rslora", "all-linear", "patterns", "regex", "first-match-wins", "some-layers"],
)
def test_updates_equal_those_of_peft(save_lora, make_general, settings):
    model, folder = save_lora(**settings)
    imported = read_peft(folder, make_general())
    assert_same_updates(imported.adapter, model)
    assert imported.dropped == ()


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_classifier(save_lora, make_general, task_type):
    model, folder = save_lora(task_type)
    head = read_peft(folder, make_general(), labels=["a", "b", "c"]).head
    assert head.kind == {"SEQ_CLS": "classification", "TOKEN_CLS": "token_classification"}[task_type]
    classifier = model.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(head.weight, classifier.weight)
    assert torch.equal(head.bias, classifier.bias)
    assert head.labels == ("a", "b", "c")
    assert head.pooling == {"SEQ_CLS": "pooler", "TOKEN_CLS": None}[task_type]


def test_default_labels_are_said_to_be_a_guess(save_lora, make_general):
    imported = read_peft(save_lora()[1], make_general())
    assert imported.head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert any("LABEL_0" in warning for warning in imported.warnings)


def test_no_classifier(save_lora, make_general):
    model, folder = save_lora("FEATURE_EXTRACTION")
    imported = read_peft(folder, make_general())
    assert imported.head is None
    assert any("no classifier" in warning for warning in imported.warnings)
    assert_same_updates(imported.adapter, model)


def test_multi_label(save_lora, make_general):
    assert read_peft(
        save_lora()[1], make_general(), problem_type="multi_label_classification"
    ).head.multi_label


def test_lower_layers_are_refused_or_dropped(save_lora, make_general):
    _, folder = save_lora()
    with pytest.raises(InvalidAdapterError, match=r"layer 0.*lower_layers='drop'"):
        read_peft(folder, make_general(2))
    imported = read_peft(folder, make_general(2), lower_layers="drop")
    assert imported.dropped == ("layer 0, query", "layer 0, value", "layer 1, query", "layer 1, value")
    assert imported.adapter.layers == (2,)
    assert any("dropped" in warning for warning in imported.warnings)
    with pytest.raises(ValueError, match="lower_layers"):
        read_peft(folder, make_general(2), lower_layers="keep")


def test_wrong_number_of_labels(save_lora, make_general):
    with pytest.raises(InvalidHeadError, match=r"2 labels .* 3 classes"):
        read_peft(save_lora()[1], make_general(), labels=["a", "b"])


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, r"lora_A\.weight \(peft_type IA3.*has no place"),
        ({"peft_type": None}, "peft_type is None"),
        ({"peft_type": "ADALORA"}, "AdaLoRA.*LORA or IA3"),
        ({"peft_type": "PREFIX_TUNING"}, "prefix tuning.*in front of the text"),
        ({"peft_type": "P_TUNING"}, "p-tuning"),
        ({"peft_type": "VERA"}, "VeRA"),
        ({"peft_type": "NEW_THING"}, "peft_type is 'NEW_THING'"),
        ({"bias": "all"}, r"bias is 'all', but encoder\.layer\.0\..*not in the file"),
        ({"bias": "some"}, "bias: .*some"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, r"has no lora_B\.bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 0}, r"adapter_config.json: r: .* 0"),
        ({"r": "four"}, r"adapter_config.json: r: .*four"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"rank_pattern": {"(": 4, ")": 4}}, "no regular expression"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\.query: .*greater than or equal to 1"),
        ({"rank_pattern": {"query": 5}}, "has rank 4, but adapter_config.json says 5"),
        ({"lora_alpha": float("nan")}, "NaN is no JSON number"),
        ({"lora_alpha": "8"}, "lora_alpha: .*valid number"),
        ({"lora_alpha": 1e40}, r"query: scale is 2\.5e\+39, must be a finite number in float32"),
        ({"rank_pattern": {"(a+)+": 4}}, "repeats a group"),
        (
            {"rank_pattern": {f"x{i}": 8 for i in range(1001)}},
            "rank_pattern has 1001 .* at most 1000",
        ),
        ({"alpha_pattern": {f"x{i}": 8 for i in range(1001)}}, "alpha_pattern has 1001 entries"),
        ({"target_modules": ["query", "value"] * 501}, "target_modules has 1002 entries"),
        ({"exclude_modules": ["key"] * 1001}, "exclude_modules has 1001 entries"),
        (
            {"rank_pattern": {f"x{i}.a.*b.*c": 8 for i in range(1000)}},
            "very many ways, .*with those before",
        ),
        ({"target_modules": "(a|b)" * 40}, "in very many ways"),
        ({"target_modules": "(?=x)"}, "uses"),
        ({"target_modules": ["query"]}, r"value has a lora_A.*target_modules .* does not name it"),
        ({"target_modules": ["query", "value", "key"]}, r"self\.key has no lora_A"),
        ({"layers_to_transform": [0, 1]}, r"layer\.2\.attention\.self\.query.*does not name it"),
        ({"exclude_modules": ["query"]}, r"self\.query has a lora_A"),
    ],
)
def test_refused_settings(save_lora, make_general, fields, message):
    _, folder = save_lora()
    change_config(folder, **fields)
    with pytest.raises(InvalidAdapterError, match=message):
        read_peft(folder, make_general())


def test_real_dora_folder_is_refused(save_lora, make_general):
    _, folder = save_lora(use_dora=True)
    with pytest.raises(InvalidAdapterError, match="DoRA"):
        read_peft(folder, make_general())


def test_unknown_settings_are_reported(save_lora, make_general):
    _, folder = save_lora()
    change_config(folder, brand_new_feature=3, another_one=None, fan_in_fan_out=True)
    warnings = " ".join(read_peft(folder, make_general()).warnings)
    assert "brand_new_feature" in warnings
    assert "another_one" not in warnings
    assert "fan_in_fan_out" in warnings


def test_a_trained_pooler_needs_the_base_and_a_head(save_lora, make_general, make_base):
    """With both it becomes a layer of the head, which test_parity.py compares with PEFT's answers."""
    _, folder = save_lora(target_modules="all-linear")
    with pytest.raises(InvalidAdapterError, match=r"pooler\.dense\.weight.*pass `base`"):
        read_peft(folder, make_general())
    base = make_base("FEATURE_EXTRACTION").state_dict
    _, folder = save_lora("FEATURE_EXTRACTION", target_modules="all-linear")
    with pytest.raises(InvalidAdapterError, match="pooler was trained, but there is no head"):
        read_peft(folder, make_general(), base=base)
    embedding = read_peft(folder, make_general(), base=base, head=EmbeddingHead("pooler")).head
    assert (embedding.pooling, embedding.projection.activation) == ("cls", "tanh")
    imported = read_peft(folder, make_general(), base=base, head=EmbeddingHead("mean"))
    assert imported.head.projection is None
    assert any("pooler was left out" in warning for warning in imported.warnings)


def test_a_trained_bias_of_the_embeddings_is_refused_or_dropped(save_lora, make_general, make_base):
    _, folder = save_lora(bias="all")
    base = make_base("FEATURE_EXTRACTION").state_dict()
    base["embeddings.LayerNorm.bias"] += 1  # as if the folder's had been trained away from it
    with pytest.raises(InvalidAdapterError, match=r"embeddings\.LayerNorm\.bias was trained.*drop"):
        read_peft(folder, make_general(), base=lambda: base)
    imported = read_peft(folder, make_general(), base=lambda: base, lower_layers="drop")
    assert imported.dropped == ("embeddings.LayerNorm.bias",)
    assert imported.adapter.kind == "lora"  # biases that equal the base's are no blocks


def test_ia3_scales_of_an_input_have_a_place_behind_attention_only(save_lora, make_general):
    _, folder = save_lora(config_class=IA3Config, target_modules=["query"], feedforward_modules=["query"])
    with pytest.raises(InvalidAdapterError, match="query is one of feedforward_modules"):
        read_peft(folder, make_general())
    change_config(folder, feedforward_modules=[])
    with pytest.raises(InvalidAdapterError, match=r"ia3_l has shape \[1, 32\], expected \[32, 1\]"):
        read_peft(folder, make_general())


def test_the_class_of_the_model_stands_in_for_a_task_type(save_lora, make_general):
    _, folder = save_lora()
    change_config(folder, task_type=None)
    with pytest.raises(InvalidAdapterError, match=r"classifier.*task_type None"):
        read_peft(folder, make_general())
    change_config(folder, auto_mapping={"base_model_class": "BertForTokenClassification"})
    assert read_peft(folder, make_general()).head.kind == "token_classification"


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("query", "bert.encoder.layer.1.attention.self.query", True),
        ("uery", "bert.encoder.layer.1.attention.self.query", False),
        (r"layer\.(0|1)\..*query", "bert.encoder.layer.1.attention.self.query", True),
        (r"layer\.[023]\..*query", "bert.encoder.layer.1.attention.self.query", False),
        ("^bert.*", "bert.encoder.layer.1.attention.self.query", True),
        ("^encoder.*", "bert.encoder.layer.1.attention.self.query", False),
        ("value|query", "bert.encoder.layer.1.attention.self.query", True),
    ],
)
def test_patterns_match_as_in_peft(pattern, module, matches):
    assert matches_end(compile_pattern(pattern), module) == matches
    assert (get_pattern_key([pattern], module) == pattern) == matches


def test_patterns_are_compiled_once_for_all_modules(save_lora, make_general, monkeypatch):
    _, folder = save_lora()
    patterns = {rf"nowhere{number}\..*": 8 for number in range(999)}
    change_config(folder, rank_pattern=patterns, alpha_pattern={"value": 3, **patterns})
    expected, compiled = re.compile, []
    monkeypatch.setattr(re, "compile", lambda pattern, *flags: compiled.append(pattern) or expected(pattern))
    blocks = read_peft(folder, make_general()).adapter.blocks
    assert {block.scale for (_, site), block in blocks.items() if site is Site.VALUE} == {3 / 4}
    assert {block.scale for (_, site), block in blocks.items() if site is Site.QUERY} == {6 / 4}
    assert len(compiled) == len(patterns) * 2 + 1


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(4, 31)}), r"layer 1, query, a: shape"),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(128)}), "expected a matrix"),
        (lambda t: t.update({f"{QUERY}.lora_B.weight": torch.full((32, 4), torch.nan)}), "query, b.*NaN"),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(4, 32).int()}), "dtype"),
        (lambda t: t.pop(f"{QUERY}.lora_B.weight"), r"query has no lora_B\.weight"),
        (lambda t: t.update({"base_model.model.score.weight": torch.zeros(1)}), r"score\.weight"),
        (lambda t: t.update({QUERY.replace("1", "9") + ".lora_A.weight": torch.zeros(4, 32),
                             QUERY.replace("1", "9") + ".lora_B.weight": torch.zeros(32, 4)}), "layer 9"),
    ],
    ids=["shape", "vector", "nan", "dtype", "half a pair", "unknown tensor", "no such layer"],
)  # fmt: skip
def test_refused_tensors(save_lora, make_general, change, message):
    _, folder = save_lora()
    change_tensors(folder, change)
    with pytest.raises(InvalidAdapterError, match=message):
        read_peft(folder, make_general())


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("base_model.model.classifier.bias"),
        lambda t: t.update({"base_model.model.classifier.weight": torch.zeros(3)}),
        lambda t: t.update({"base_model.model.classifier.weight": torch.zeros(3, 30)}),
        lambda t: t.update({"base_model.model.classifier.bias": torch.full((3,), torch.inf)}),
    ],
)
def test_refused_classifier(save_lora, make_general, change):
    _, folder = save_lora()
    change_tensors(folder, change)
    with pytest.raises(InvalidHeadError):
        read_peft(folder, make_general())


def test_folders_that_are_none(save_lora, make_general, tmp_path):
    with pytest.raises(InvalidAdapterError, match=r"no adapter_config\.json"):
        read_peft(tmp_path / "missing", make_general())
    _, folder = save_lora()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InvalidAdapterError, match=r"adapter_model\.safetensors: unreadable"):
        read_peft(folder, make_general())
    weights.unlink()
    with pytest.raises(InvalidAdapterError, match=r"no adapter_model\.safetensors"):
        read_peft(folder, make_general())
    for text in ("{", "[]", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(InvalidAdapterError, match=r"adapter_config\.json"):
            read_peft(folder, make_general())


def test_pickles_are_not_read(save_lora, make_general, tmp_path):
    _, folder = save_lora()
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InvalidAdapterError, match="safe_serialization=True"):
        read_peft(shutil.copytree(folder, tmp_path / "copy"), make_general())
