"""Folders written by HMI, loaded by PEFT."""

import dataclasses
import errno
import resource
import signal
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from hmi_engine.errors import (
    InvalidAdapterError,
    InvalidHeadError,
    ReadOnlyStoreError,
    StoreBusyError,
    StoreFullError,
)
from hmi_engine.interop import read_peft, write_adapterhub, write_peft
from hmi_engine.knowledge.adapters import (
    LORA_SITES,
    Adapter,
    BiasBlock,
    LoraBlock,
    ScaleBlock,
    Site,
    random_adapter,
    site_sizes,
)
from hmi_engine.knowledge.heads import (
    ClassificationHead,
    DenseLayer,
    EmbeddingHead,
    RegressionHead,
    TokenClassificationHead,
)

from .test_peft_import import assert_same_updates


@pytest.fixture
def mixed_adapter(make_general):
    """Different ranks and scales at every place, some sites only in some layers."""
    generator = torch.Generator().manual_seed(3)
    blocks = {}
    for layer in (0, 2):
        for number, site in enumerate(LORA_SITES[layer:]):
            inputs, outputs = site_sizes(site, make_general())
            rank = 1 + (layer + number) % 4
            a = torch.randn(inputs, rank, generator=generator)
            b = torch.randn(rank, outputs, generator=generator)
            blocks[layer, site] = LoraBlock(a, b, scale=0.3 * (1 + number))
    return Adapter(blocks)


def classification_head(pooling="pooler"):
    return ClassificationHead(("no", "yes", "maybe"), torch.randn(3, 32), torch.randn(3), pooling)


def load_with_peft(base, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(folder))
    assert not [w for w in caught if "missing" in str(w.message).lower()]
    return model


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
def test_peft_loads_what_was_written(tmp_path, make_general, make_base, mixed_adapter, task_type):
    heads = {
        "SEQ_CLS": classification_head(),
        "TOKEN_CLS": TokenClassificationHead(("O", "B", "I"), torch.randn(3, 32), torch.randn(3)),
        "FEATURE_EXTRACTION": None,
    }
    head = heads[task_type]
    write_peft(tmp_path / "out", mixed_adapter, head, make_general(), base_model="tests/tiny")
    model = load_with_peft(make_base(task_type), tmp_path / "out")
    assert_same_updates(mixed_adapter, model)
    assert model.peft_config["default"].base_model_name_or_path == "tests/tiny"
    if head is not None:
        classifier = model.base_model.model.classifier.modules_to_save["default"]
        assert torch.equal(classifier.weight, head.weight)
        assert torch.equal(classifier.bias, head.bias)


def test_round_trip(tmp_path, make_general, mixed_adapter):
    head = classification_head()
    write_peft(tmp_path, mixed_adapter, head, make_general(), base_model="tests/tiny")
    imported = read_peft(tmp_path, make_general())
    assert imported.warnings == ()
    assert imported.head.labels == head.labels
    assert set(imported.adapter.blocks) == set(mixed_adapter.blocks)
    for place, block in mixed_adapter.blocks.items():
        found = imported.adapter.blocks[place]
        assert torch.equal(found.a, block.a)
        assert torch.equal(found.b, block.b)
        assert found.scale == pytest.approx(block.scale, rel=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("kind", ["ia3", "bitfit"])
def test_round_trip_of_vectors(tmp_path, make_general, make_base, kind):
    general, base = make_general(), make_base("FEATURE_EXTRACTION").state_dict
    adapter = random_adapter(general, kind, 0, 7, layers=[1, 2])
    head = RegressionHead(("low", "high"), torch.randn(2, 32), torch.randn(2), "pooler")
    write_peft(tmp_path, adapter, head, general, base_model="tests/tiny", base=base)
    imported = read_peft(tmp_path, general, base=base)
    assert imported.head.kind == "regression"
    assert imported.head.labels == ("low", "high")
    assert set(imported.adapter.blocks) == set(adapter.blocks)
    for place, block in adapter.blocks.items():
        # A bias is rounded once, when the base's is added.
        tolerance = 0 if kind == "ia3" else 1e-7
        torch.testing.assert_close(
            imported.adapter.blocks[place].vector, block.vector, atol=tolerance, rtol=0
        )


def test_links_are_replaced_and_not_followed(tmp_path, make_general, mixed_adapter):
    precious = tmp_path / "precious"
    precious.write_text("stays")
    (tmp_path / "out").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "out" / name).symlink_to(precious)
    write_peft(tmp_path / "out", mixed_adapter, None, make_general(), base_model="tests/tiny")
    assert precious.read_text() == "stays"
    assert set(read_peft(tmp_path / "out", make_general()).adapter.blocks) == set(mixed_adapter.blocks)


@pytest.mark.parametrize("write", [write_peft, write_adapterhub])
def test_a_full_disk_keeps_the_folder_as_it_was(tmp_path, make_general, write):
    small, large = (random_adapter(make_general(), "lora", rank, 0) for rank in (1, 40))
    write(tmp_path, small, None, make_general(), base_model="tests/tiny")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(StoreFullError, match=r"no room .* The store is as it was; free some space"):
            write(tmp_path, large, None, make_general(), base_model="tests/tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("write", [write_peft, write_adapterhub])
def test_a_folder_that_may_not_be_written_is_not_the_stores(tmp_path, make_general, write, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("hmi_engine.knowledge.atomic.fsync_path", refuse)
    adapter = random_adapter(make_general(), "lora", 1, 0)
    with pytest.raises(ReadOnlyStoreError, match=r"denied\. Choose a folder in which you may write"):
        write(tmp_path, adapter, None, make_general(), base_model="tests/tiny")


@pytest.mark.parametrize("write", [write_peft, write_adapterhub])
def test_two_exports_do_not_write_into_one_folder_at_once(tmp_path, make_general, write, monkeypatch):
    adapter, other = (random_adapter(make_general(), "lora", rank, 0) for rank in (1, 2))
    refused = []

    def write_another_first(path, contents):
        monkeypatch.setattr(Path, "write_text", write_text)
        for second in (write_peft, write_adapterhub):
            with pytest.raises(StoreBusyError, match="out: another export writes into it") as error:
                second(tmp_path / "out", other, None, make_general(), base_model="tests/tiny")
            refused.append(error)
        write_text(path, contents)

    write_text = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, contents, **_: write_another_first(path, contents))
    write(tmp_path / "out", adapter, None, make_general(), base_model="tests/tiny")
    assert len(refused) == 2
    write(tmp_path / "out", adapter, None, make_general(), base_model="tests/tiny")


def test_what_peft_cannot_express(tmp_path, make_general, mixed_adapter):
    general = make_general()

    def write(adapter, head):
        write_peft(tmp_path, adapter, head, general, base_model="tests/tiny")

    with pytest.raises(InvalidAdapterError, match="bottleneck"):
        write(random_adapter(general, "bottleneck", 4, 0), None)
    with pytest.raises(InvalidAdapterError, match="none"):
        write(Adapter({}), None)
    with pytest.raises(InvalidHeadError, match=r"'cls'.*without the head"):
        write(mixed_adapter, classification_head("cls"))
    with pytest.raises(InvalidHeadError, match="embedding"):
        write(mixed_adapter, EmbeddingHead("mean"))
    layer = DenseLayer(torch.eye(32), torch.zeros(32), "gelu")
    with pytest.raises(InvalidHeadError, match="1 hidden layers"):
        write(mixed_adapter, dataclasses.replace(classification_head("cls"), hidden=(layer,)))
    with pytest.raises(InvalidHeadError, match="hidden layers"):
        write(mixed_adapter, TokenClassificationHead(("O",), torch.ones(1, 32), torch.ones(1), (layer,)))
    scale, both = ScaleBlock(torch.ones(48)), (Site.FFN_DOWN_INPUT_SCALE, Site.FFN_UP_SCALE)
    with pytest.raises(InvalidAdapterError, match="'mixed'"):
        write(Adapter(dict(mixed_adapter.blocks) | {(1, both[0]): scale}), None)
    output = ScaleBlock(torch.ones(32))
    with pytest.raises(InvalidAdapterError, match=r"layer 0, ffn_down: .*not both"):
        write(Adapter({(0, Site.FFN_DOWN_INPUT_SCALE): scale, (0, Site.FFN_DOWN_SCALE): output}), None)
    with pytest.raises(InvalidAdapterError, match="pass `base`"):
        write(Adapter({(0, Site.QUERY_BIAS): BiasBlock(torch.ones(32))}), None)
    with pytest.raises(InvalidAdapterError, match="layer 1, query, a"):
        write(Adapter({(1, Site.QUERY): LoraBlock(torch.zeros(3, 2), torch.zeros(2, 32), 1.0)}), None)
    assert not list(tmp_path.iterdir())
