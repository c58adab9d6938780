"""AdapterHub folders: what is refused by name, where settings are read as the library reads them, exports.

What is computed is compared with the library's own outputs in test_parity.py.
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hmi_engine as hmi
from benchmarks.parity_cases import RECORDED
from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop import detect_format, read_adapterhub, read_head, write_adapterhub
from hmi_engine.knowledge.adapters import (
    Adapter,
    BiasBlock,
    BottleneckBlock,
    LoraBlock,
    ScaleBlock,
    Site,
    random_adapter,
)
from hmi_engine.knowledge.heads import (
    ClassificationHead,
    DenseLayer,
    EmbeddingHead,
    RegressionHead,
    TokenClassificationHead,
)

from .mutations import copy_folder, write_json

CASES = sorted(path.parent.name for path in RECORDED.glob("*/adapter_config.json"))


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    """GeneralInfo of the recorded base model for K = 0."""
    path = tmp_path_factory.mktemp("stores") / "store"
    with hmi.Store.create(path, general=RECORDED / "base", plot_layers=0) as store:
        return store.general


def change(folder, file="adapter_config.json", *, config=None, **fields):
    """Changes fields of a JSON file, and of the ``config`` in it."""
    value = json.loads((folder / file).read_text()) | fields
    value["config"] = value["config"] | (config or {})
    write_json(folder / file, value)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("seq_bn", {"phm_layer": True}, r"phm_layer \(Compacter\)"),
        ("seq_bn", {"inv_adapter": "nice"}, "inv_adapter"),
        ("seq_bn", {"use_gating": True}, "use_gating"),
        ("seq_bn", {"ln_before": True}, "ln_before"),
        ("seq_bn", {"ln_after": True}, "ln_after"),
        ("seq_bn", {"original_ln_after": False}, "original_ln_after=false"),
        ("seq_bn", {"residual_before_ln": False}, "original_ln_before=true with residual_before_ln=False"),
        ("seq_bn", {"residual_before_ln": "post_add"}, "residual_before_ln='post_add'"),
        ("seq_bn", {"mh_adapter": True}, "original_ln_before=true at the attention"),
        ("par_bn", {"mh_adapter": True}, "is_parallel at the attention"),
        ("seq_bn", {"non_linearity": "leakyrelu"}, "non_linearity: the activation 'leakyrelu'"),
        ("seq_bn", {"reduction_factor": 1e-9}, "wider than"),
        ("seq_bn", {"reduction_factor": 0}, "reduction_factor"),
        ("seq_bn", {"reduction_factor": {"1": 4}}, "nothing for layer 0 and no 'default'"),
        ("seq_bn", {"reduction_factor": 2}, r"adapter_down\.0\.weight has shape \[8, 32\].*16"),
        ("seq_bn", {"scaling": "often"}, "scaling"),
        ("seq_bn", {"scaling": "learned"}, r"no tensor .*\.scaling"),
        ("seq_bn", {"leave_out": [1]}, r"layer\.1\..* belongs to nothing"),
        ("seq_bn", {"output_adapter": False}, "belongs to nothing"),
        ("seq_bn", {"architecture": "prefix_tuning"}, "prefix tuning"),
        ("seq_bn", {"architecture": "reft"}, "ReFT"),
        ("seq_bn", {"architecture": ["union"]}, "architecture"),
        ("lora", {"use_gating": True}, "use_gating"),
        ("lora", {"use_dora": True}, "DoRA"),
        ("lora", {"vera_d": 0.1}, "VeRA"),
        ("lora", {"r": 3}, r"r=3 of adapter_config\.json"),
        ("lora", {"attn_matrices": ["q", "x"]}, "attn_matrices"),
        ("lora", {"attn_matrices": ["q"]}, r"self\.key.* belongs to nothing"),
        ("ia3", {"r": 2}, "composition_mode='scale' with r above 1"),
        ("ia3", {"composition_mode": "add"}, "no tensor .*lora_A"),
        ("union", {"configs": []}, "configs of a union"),
        ("union", {"configs": [{"architecture": "union", "configs": []}]}, "architecture is 'union'"),
    ],
)
def test_what_is_refused(tmp_path, general, name, config, message):
    folder = copy_folder(RECORDED / name, tmp_path / "folder")
    change(folder, config=config)
    with pytest.raises(InvalidAdapterError, match=message):
        read_adapterhub(folder, general)


def test_a_union_has_one_method_at_a_place(tmp_path, general):
    folder = copy_folder(RECORDED / "seq_bn", tmp_path / "folder")
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    change(folder, config={"architecture": "union", "configs": [config, config]})
    with pytest.raises(
        InvalidAdapterError, match=r"two methods of the union stand at encoder\.layer\.0\.output"
    ):
        read_adapterhub(folder, general)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"hidden_size": 768}, "hidden_size is 768"),
        ({"name": "other"}, r"no tensor .*adapters\.other\."),
        ({"name": ""}, "name: "),
        ({"peft_type": "LORA"}, "use import_peft"),
    ],
)
def test_another_base_or_name(tmp_path, general, fields, message):
    folder = copy_folder(RECORDED / "seq_bn", tmp_path / "folder")
    change(folder, **fields)
    with pytest.raises(InvalidAdapterError, match=message):
        read_adapterhub(folder, general)


def test_old_files_mean_what_they_meant(tmp_path, general):
    """Files without a version wrote gelu for gelu_new; LoRAs before 1.1 were trained without alpha / r."""
    folder = copy_folder(RECORDED / "seq_bn_reductions", tmp_path / "bottleneck")
    site = (0, Site.AFTER_FFN_NORMALIZED)
    assert read_adapterhub(folder, general).adapter.blocks[site].activation == "gelu"
    change(folder, version=None)
    assert read_adapterhub(folder, general).adapter.blocks[site].activation == "gelu_tanh"

    folder = copy_folder(RECORDED / "lora", tmp_path / "lora")
    for version, scale in (("adapters.1.3.0", 6 / 4), ("adapters.1.0.1", 1), ("3.2.1", 6 / 4)):
        change(folder, version=version)
        assert read_adapterhub(folder, general).adapter.blocks[0, Site.QUERY].scale == scale


def test_pickles_and_fusion_are_named(tmp_path, general):
    folder = copy_folder(RECORDED / "seq_bn", tmp_path / "folder")
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(InvalidAdapterError, match=r"pytorch_adapter\.bin, a pickle.*use_safetensors=True"):
        read_adapterhub(folder, general)
    folder = copy_folder(RECORDED / "seq_bn", tmp_path / "head")
    (folder / "model_head.safetensors").rename(folder / "pytorch_model_head.bin")
    with pytest.raises(InvalidAdapterError, match=r"save_head\(.*use_safetensors=True"):
        read_adapterhub(folder, general)
    (tmp_path / "fusion").mkdir()
    (tmp_path / "fusion" / "adapter_fusion_config.json").write_text("{}")
    with pytest.raises(InvalidAdapterError, match="AdapterFusion"):
        detect_format(tmp_path / "fusion")
    (tmp_path / "fusion" / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidAdapterError, match="neither peft_type"):
        detect_format(tmp_path / "fusion")


def test_unknown_settings_are_reported(tmp_path, general):
    folder = copy_folder(RECORDED / "seq_bn", tmp_path / "folder")
    change(folder, config={"brand_new_feature": 3, "another_one": None})
    assert "brand_new_feature" in " ".join(read_adapterhub(folder, general).warnings)
    assert not read_adapterhub(RECORDED / "seq_bn", general).warnings


HEADS = {
    "seq_bn": ("classification", "cls", ["tanh"]),
    "seq_bn_upper": ("classification", "pooler", []),
    "seq_bn_reductions": ("token_classification", None, []),
    "seq_bn_channel": ("regression", "pooler", ["tanh"]),
    "double_seq_bn": ("classification", "cls", ["relu", "relu"]),
    "after_ffn": ("classification", "cls", [None]),
    "par_bn": ("classification", "cls", ["gelu"]),
    "lora": ("token_classification", None, ["tanh"]),
    "static_head": ("classification", "pooler", []),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(general, name):
    head = read_head(RECORDED / name)
    head.validate(general)
    assert (head.kind, head.pooling, [layer.activation for layer in head.hidden]) == HEADS[name]
    assert getattr(head, "multi_label", False) == (name == "par_bn")


@pytest.mark.parametrize(
    ("name", "config", "fields", "message"),
    [
        ("seq_bn", {"head_type": "question_answering"}, {}, "head_type 'question_answering'"),
        ("seq_bn", {"head_type": "masked_lm"}, {}, "masked_lm"),
        ("seq_bn", {"layers": 0}, {}, "layers"),
        ("seq_bn", {"layers": 10**9}, {}, "layers"),
        ("seq_bn", {"layers": 3}, {}, r"no tensor 'heads\.seq_bn\.4\.bias'|no tensor 'heads\.seq_bn\.7"),
        ("seq_bn", {"num_labels": 4}, {}, "num_labels is 4"),
        ("seq_bn", {"num_labels": -1}, {}, "num_labels"),
        ("seq_bn", {"activation_function": "mish"}, {}, "activation 'mish'"),
        ("seq_bn", {"bias": False}, {}, r"heads\.seq_bn\.4\.bias belongs to nothing"),
        ("seq_bn", {"label2id": {"a": 0, "b": 0, "c": 1}}, {}, "label2id does not number 3 labels"),
        ("seq_bn", {"label2id": {"a": 0, "b": 1, "c": -2}}, {}, "label2id"),
        ("seq_bn", {"label2id": {"a": 0, "b": 1}}, {}, "label2id"),
        ("seq_bn", {}, {"name": None}, "name is missing"),
    ],
)
def test_refused_heads(tmp_path, general, name, config, fields, message):
    folder = copy_folder(RECORDED / name, tmp_path / "folder")
    change(folder, "head_config.json", config=config, **fields)
    with pytest.raises((InvalidAdapterError, InvalidHeadError), match=message):
        read_adapterhub(folder, general)


def test_a_fixed_head_of_another_model(tmp_path, general):
    folder = copy_folder(RECORDED / "static_head", tmp_path / "folder")
    value = json.loads((folder / "head_config.json").read_text())
    write_json(folder / "head_config.json", value | {"model_class": "BertForQuestionAnswering"})
    with pytest.raises(InvalidAdapterError, match="BertForQuestionAnswering"):
        read_adapterhub(folder, general)


def test_a_head_from_elsewhere(tmp_path, general):
    folder = copy_folder(RECORDED / "lora", tmp_path / "folder")
    for name in ("head_config.json", "model_head.safetensors"):
        (folder / name).unlink()
    imported = read_adapterhub(folder, general)
    assert imported.head is None
    assert any("head_config.json" in warning for warning in imported.warnings)
    assert len(read_adapterhub(folder, general, head=RECORDED / "double_seq_bn").head.hidden) == 2
    own = EmbeddingHead("mean")
    assert read_adapterhub(folder, general, head=own).head is own
    labels = ["a", "b", "c"]
    assert read_adapterhub(RECORDED / "lora", general, labels=labels).head.labels == tuple(labels)
    with pytest.raises(InvalidHeadError, match="2 labels were given"):
        read_adapterhub(RECORDED / "lora", general, labels=["a", "b"])


def assert_same(found, expected):
    """Adapters with the same blocks bit for bit."""
    assert set(found.blocks) == set(expected.blocks)
    for place, block in expected.blocks.items():
        assert found.blocks[place].settings() == pytest.approx(block.settings())
        for name, tensor in block.tensors().items():
            assert torch.equal(found.blocks[place].tensors()[name], tensor), (place, name)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_of_what_the_library_made(tmp_path, general, name):
    imported = read_adapterhub(RECORDED / name, general)
    write_adapterhub(tmp_path, imported.adapter, imported.head, general, base_model="base")
    again = read_adapterhub(tmp_path, general)
    assert again.warnings == ()
    assert_same(again.adapter, imported.adapter)
    assert again.head.labels == imported.head.labels
    assert again.head.kind == imported.head.kind
    for key, tensor in imported.head.tensors().items():
        assert torch.equal(again.head.tensors()[key], tensor)


def test_round_trip_of_layers_that_differ(tmp_path, general):
    """Ranks that do not divide the width, activations and scales by layer, several methods."""
    sites = [Site.AFTER_FFN_NORMALIZED, Site.PARALLEL_FFN, Site.AFTER_FFN, Site.AFTER_FFN]
    activations = ["relu", "gelu_tanh", "silu", "silu"]
    blocks = {}
    for layer, (site, activation, rank) in enumerate(zip(sites, activations, (5, 48, 7, 31), strict=True)):
        (block,) = random_adapter(
            general, "bottleneck", rank, layer, layers=[0], sites=[site]
        ).blocks.values()
        blocks[layer, site] = dataclasses.replace(block, activation=activation, scale=0.1 * (1 + layer))
    attention = random_adapter(general, "bottleneck", 3, 9, layers=[1, 2], sites=[Site.AFTER_ATTENTION])
    lora = random_adapter(general, "lora", 3, 9, layers=[0, 3], sites=[Site.KEY, Site.FFN_UP])
    other = random_adapter(general, "lora", 2, 9, layers=[1])
    scales = random_adapter(general, "ia3", 0, 9, layers=[2], sites=[Site.VALUE_SCALE, Site.FFN_DOWN_SCALE])
    adapter = Adapter(blocks | attention.blocks | lora.blocks | other.blocks | scales.blocks)
    write_adapterhub(tmp_path, adapter, None, general, base_model="base")
    assert_same(read_adapterhub(tmp_path, general).adapter, adapter)


def test_an_export_without_a_head_leaves_no_other_tenants_head(tmp_path, general):
    first, second = (random_adapter(general, "bottleneck", 4, seed) for seed in (1, 2))
    head = ClassificationHead(("secret", "labels"), torch.ones(2, 32), torch.ones(2), "cls")
    write_adapterhub(tmp_path, first, head, general, base_model="base")
    (tmp_path / "README.md").write_text("mine")
    write_adapterhub(tmp_path, second, None, general, base_model="base")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "adapter.safetensors", "README.md"}
    imported = read_adapterhub(tmp_path, general)
    assert imported.head is None
    assert_same(imported.adapter, second)


@pytest.mark.parametrize("rank", range(1, 100))
def test_every_rank_has_a_reduction_factor(tmp_path, general, rank):
    adapter = random_adapter(general, "bottleneck", rank, 0, layers=[1])
    write_adapterhub(tmp_path, adapter, None, general, base_model="base")
    factor = json.loads((tmp_path / "adapter_config.json").read_text())["config"]["reduction_factor"]
    assert int(general.hidden_size // factor) == rank  # the library's own expression
    assert_same(read_adapterhub(tmp_path, general).adapter, adapter)


def test_what_adapterhub_cannot_express(tmp_path, general):
    vector, matrix = torch.ones(32), torch.ones(32, 2)
    lora = LoraBlock(matrix, matrix.T, 1.0)
    bottleneck = BottleneckBlock(matrix, torch.ones(2), matrix.T, vector, "relu")

    def refuse(message, blocks, head=None):
        with pytest.raises((InvalidAdapterError, InvalidHeadError), match=message):
            write_adapterhub(tmp_path / "out", Adapter(blocks), head, general, base_model="base")
        assert not (tmp_path / "out").exists()

    refuse("nothing to write", {})
    refuse("no adapters of biases", {(0, Site.QUERY_BIAS): BiasBlock(vector)})
    refuse("attention_output: AdapterHub has no such place", {(0, Site.ATTENTION_OUTPUT): lora})
    refuse("input_scale", {(0, Site.FFN_DOWN_INPUT_SCALE): ScaleBlock(torch.ones(48))})
    refuse("one method, rank and alpha", {(0, Site.QUERY): lora, (0, Site.VALUE_SCALE): ScaleBlock(vector)})
    two = {(0, Site.AFTER_FFN): bottleneck, (0, Site.PARALLEL_FFN): bottleneck}
    refuse("layer 0: AdapterHub has one bottleneck", two)
    sound = {(0, Site.AFTER_FFN): bottleneck}
    refuse("embedding head", sound, EmbeddingHead("cls"))
    weight, bias = torch.ones(2, 32), torch.ones(2)
    refuse("mean of all tokens", sound, ClassificationHead(("a", "b"), weight, bias, "mean"))
    refuse("one number for regression", sound, RegressionHead(("a", "b"), weight, bias, "cls"))
    refuse("one number for regression", sound, ClassificationHead(("a",), weight[:1], bias[:1], "cls"))
    layers = tuple(DenseLayer(torch.eye(32), vector, name) for name in ("relu", "tanh"))
    refuse("several activations", sound, TokenClassificationHead(("a", "b"), weight, bias, layers))


def test_half_precision_is_read_as_it_is(tmp_path, general):
    folder = copy_folder(RECORDED / "seq_bn", tmp_path / "folder")
    path = folder / "adapter.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halves, path)
    block = read_adapterhub(folder, general).adapter.blocks[1, Site.AFTER_FFN_NORMALIZED]
    expected = halves["bert.encoder.layer.1.output.adapters.seq_bn.adapter_up.weight"]
    assert torch.equal(block.up.T, expected)
