"""Folders that are wrong in one way or in many: always one of HMI's errors, and the store stays as it was."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hmi_engine as hmi
from benchmarks.parity_cases import PEFT_CASES, RECORDED, peft_references
from hmi_engine.errors import HmiError
from hmi_engine.interop import read_adapterhub, read_peft

from .mutations import WRONG_VALUES, changed, copy_folder, mutate, places, write_json

SLOW_SECONDS = 120
HUB = ("seq_bn_reductions", "double_seq_bn", "lora", "ia3", "union", "static_head")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folders of both libraries by a name, all of which can be imported."""
    folder = tmp_path_factory.mktemp("peft")
    references = dict(peft_references(RECORDED / "base", folder, [[2, 7, 3]], 2))
    chosen = (
        "LoRA, ranks and alphas by module",
        "LoRA and all biases",
        "IA3",
        "LoRA and a pooler trained whole",
    )
    assert set(chosen) <= set(PEFT_CASES)
    return {name: RECORDED / name for name in HUB} | {name: references[name].folder for name in chosen}


@pytest.fixture(scope="module")
def bad_store(tmp_path_factory):
    """A store with one tenant."""
    path = tmp_path_factory.mktemp("stores") / "store"
    with hmi.Store.create(path, general=RECORDED / "base", plot_layers=0) as store:
        store.import_adapter(RECORDED / "seq_bn", tenant="kept")
        yield store


def state(store):
    """What a failed import must not change: the tenants, and every file with its size."""
    files = {
        path: path.stat().st_size
        for path in (store.layout.root / "tenants").rglob("*")
        if path.is_file() and "catalog" not in path.name
    }
    return dict(store.tenants.items()), files


def try_import(store, folder, *, seconds=5.0):
    """Imports under a new name, and takes it out again; returns the error there was, if any."""
    before, begun = state(store), time.monotonic()
    try:
        store.import_adapter(folder, tenant="new")
    except HmiError as error:
        assert str(error).removeprefix(str(folder)).isprintable()
        assert state(store) == before
        return error
    finally:
        assert time.monotonic() - begun < seconds
    adapter, head = store.load_tenant("new")
    adapter.validate(store.general)
    head.validate(store.general)
    store.remove_tenant("new")
    return None


def test_the_sound_folders_are_imported(sound, bad_store):
    for folder in sound.values():
        assert try_import(bad_store, folder) is None


@pytest.mark.parametrize(
    "name",
    [
        "double_seq_bn",
        "lora",
        "IA3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("union", "LoRA, ranks and alphas by module")
        ),
    ],
)
def test_every_field_wrong_in_every_way(sound, bad_store, tmp_path, name):
    """Most must be refused; all are, or mean the same as in the library (None is its default)."""
    folder, refused = copy_folder(sound[name], tmp_path / "folder"), 0
    config = json.loads((folder / "adapter_config.json").read_text())
    read = read_peft if "peft_type" in config else read_adapterhub
    for place in places(config):
        for value in WRONG_VALUES[:: 3 if len(place) > 1 else 1]:
            write_json(folder / "adapter_config.json", changed(config, place, value))
            try:
                read(folder, bad_store.general)
            except HmiError as error:
                assert str(folder) in str(error)
                assert str(error).isprintable()
                refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("double_seq_bn", {("name",), ("config",), *(("config", f) for f in
         ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity"))}),
        ("lora", {("name",), ("config",), ("config", "architecture"), ("config", "r"),
         ("config", "attn_matrices"), ("config", "intermediate_lora"), ("config", "output_lora")}),
        ("LoRA, ranks and alphas by module", {("peft_type",), ("r",), ("rank_pattern",),
         ("rank_pattern", "query"), ("rank_pattern", r"layer\.(1|3)\.output\.dense"), ("task_type",),
         ("target_modules",)}),
    ],
)  # fmt: skip
def test_a_missing_field_that_matters_is_refused(sound, bad_store, tmp_path, name, needed):
    """Without a field the library takes its default; where that contradicts the tensors it is refused."""
    folder = copy_folder(sound[name], tmp_path / "folder")
    config = json.loads((folder / "adapter_config.json").read_text())
    refused = set()
    for place in places(config):
        if isinstance(place[-1], str):
            write_json(folder / "adapter_config.json", changed(config, place, remove=True))
            if try_import(bad_store, folder) is not None:
                refused.add(place)
    assert refused == needed


def wrong_tensors(tensors, name):
    """A tensor missing, extra, transposed, of another shape or type, with values that are no numbers."""
    tensor = tensors[name]
    rest = {key: value for key, value in tensors.items() if key != name}
    yield "missing", rest
    yield "extra", tensors | {f"{name}.extra": tensor.clone()}
    if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1]:
        yield "transposed", tensors | {name: tensor.T.contiguous()}
    yield "shape", tensors | {name: torch.cat([tensor, tensor])}
    yield "flat", tensors | {name: tensor.reshape(1, -1, 1)}
    yield "empty", tensors | {name: tensor[:0]}
    for dtype in (torch.float64, torch.int32, torch.uint8):
        yield str(dtype), tensors | {name: tensor.to(dtype)}
    for value in (float("nan"), float("inf")):
        yield str(value), tensors | {name: torch.cat([tensor[:1] * value, tensor[1:]])}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((name, "adapter.safetensors") for name in HUB),
        ("double_seq_bn", "model_head.safetensors"),
        ("static_head", "model_head.safetensors"),
        ("LoRA, ranks and alphas by module", "adapter_model.safetensors"),
        ("LoRA and all biases", "adapter_model.safetensors"),
        ("IA3", "adapter_model.safetensors"),
    ],
)
def test_every_kind_of_tensor_wrong_in_every_way(sound, bad_store, tmp_path, name, file):
    folder = copy_folder(sound[name], tmp_path / "folder")
    tensors = load_file(folder / file)
    kinds = {key.rpartition("layer.")[2].partition(".")[2] or key: key for key in tensors}
    exempt = ("original_module", "modules_to_save", "embeddings")  # no effect, or a test of their own
    for key in kinds.values():
        if any(part in key for part in exempt):
            continue
        for change, wrong in wrong_tensors(tensors, key):
            save_file(wrong, folder / file)
            error = try_import(bad_store, folder)
            if error is None and change == "missing" and key.endswith("pooler.dense.bias"):
                continue  # the base's own then
            assert error is not None, f"{key} {change}"
            assert str(folder) in str(error), f"{key} {change}: {error}"


def header(text, length=None):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        header(b"{}", 0),
        header({}),
        header({}, 2**63),
        header({}, 100_000_000),
        header(b" " * 17_000_000),
        header(b"[" * 100_000),
        header({"a": ENTRY}),
        header({"a": ENTRY | {"data_offsets": [0, 2**62]}}) + bytes(4),
        header({"a": ENTRY | {"data_offsets": [-4, 0]}}) + bytes(4),
        header({"a": ENTRY | {"data_offsets": [4, 0]}}) + bytes(4),
        header({"a": ENTRY | {"shape": [2**40, 2**40]}}) + bytes(4),
        header({"a": ENTRY | {"dtype": "F8_E4M3"}}) + bytes(1),
        header({"a": ENTRY, "b": ENTRY}) + bytes(4),
        header({"a": ENTRY, "b": ENTRY | {"data_offsets": [2, 6]}}) + bytes(6),
        header({"a": ENTRY, "__metadata__": 3}) + bytes(4),
        header({"a": ENTRY}) + bytes(1000),
        header({"../../outside": ENTRY}) + bytes(4),
        header({"\u202e\x07": ENTRY}) + bytes(4),
    ],
)
@pytest.mark.parametrize("name", ["seq_bn_reductions", "IA3"])
def test_safetensors_that_lie(sound, bad_store, tmp_path, name, content):
    folder = copy_folder(sound[name], tmp_path / "folder")
    (path,) = (p for p in folder.iterdir() if p.name.startswith("adapter") and p.suffix == ".safetensors")
    path.write_bytes(content)
    error = try_import(bad_store, folder, seconds=20)
    assert error is not None
    assert path.name in str(error)


def test_a_header_of_a_hundred_megabytes_is_not_read(sound, bad_store, tmp_path):
    folder = copy_folder(sound["seq_bn_reductions"], tmp_path / "folder")
    with (folder / "adapter.safetensors").open("wb") as file:
        file.write((100_000_000).to_bytes(8, "little"))
        file.truncate(100_000_100)
    assert "header of 100000000 bytes" in str(try_import(bad_store, folder))
    with (folder / "adapter.safetensors").open("wb") as file:
        file.truncate(3 << 30)
    assert "has at most" in str(try_import(bad_store, folder))


def test_what_a_library_quotes_of_the_file_is_written_out(sound, bad_store, tmp_path):
    folder = copy_folder(sound["seq_bn_reductions"], tmp_path / "folder")
    header = json.dumps({"a": {"dtype": "F\0\x1b[2J\n32", "shape": [], "data_offsets": [0, 4]}}).encode()
    (folder / "adapter.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert r"F\x00\x1b[2J 32" in str(try_import(bad_store, folder))


NO_FILES = (
    Path.mkdir,
    os.mkfifo,
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("gone"),
)


@pytest.mark.parametrize("name", ["seq_bn_reductions", "IA3"])
def test_files_that_are_no_files(sound, bad_store, tmp_path, name):
    names = [path.name for path in sound[name].iterdir() if path.name != "README.md"]
    for file in names:
        for number, make in enumerate(NO_FILES):
            folder = copy_folder(sound[name], tmp_path / f"{file}-{number}")
            (folder / file).unlink()
            make(folder / file)
            error = try_import(bad_store, folder)
            assert error is not None
            assert file in str(error)
    assert "this is no folder" in str(try_import(bad_store, sound[name] / "adapter_config.json"))
    assert "does not exist" in str(try_import(bad_store, tmp_path / "missing"))
    assert try_import(bad_store, "a\0b") is not None
    assert try_import(bad_store, "x" * 5000) is not None


def test_links_to_sound_files_are_followed(sound, bad_store, tmp_path):
    """The cache of the Hugging Face hub is made of them."""
    (tmp_path / "snapshot").mkdir()
    for path in sound["seq_bn_reductions"].iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert try_import(bad_store, tmp_path / "snapshot") is None


def test_a_name_inside_of_the_files_is_no_path(sound, bad_store, tmp_path):
    folder = copy_folder(sound["seq_bn_reductions"], tmp_path / "folder")
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | {"name": "../../outside"})
    assert "no tensor" in str(try_import(bad_store, folder))
    with pytest.raises(HmiError, match="name"):
        bad_store.import_adapter(sound["seq_bn_reductions"], tenant="../outside")


def fuzz(random, sound, store, folder):
    """One mutated folder; what it was is told where a test fails."""
    name = random.choice(sorted(sound))
    copy_folder(sound[name], folder)
    made = mutate(folder, random)
    try:
        try_import(store, folder)
    except BaseException as error:
        error.add_note(f"{name}: {made}") if hasattr(error, "add_note") else None
        raise


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_mutated_folders(sound, bad_store, tmp_path_factory, random):
    fuzz(random, sound, bad_store, tmp_path_factory.getbasetemp() / "fuzzed")
    assert "kept" in bad_store.tenants


@pytest.mark.slow
def test_mutated_folders_for_two_minutes(sound, bad_store, tmp_path_factory):
    end, count = time.monotonic() + SLOW_SECONDS, 0

    @settings(max_examples=100_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(random=st.randoms(use_true_random=True))
    def run(random):
        nonlocal count
        if time.monotonic() < end:
            count += 1
            fuzz(random, sound, bad_store, tmp_path_factory.getbasetemp() / "fuzzed")

    run()
    assert count > 500
    assert bad_store.verify() == []
