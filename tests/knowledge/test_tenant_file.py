import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hmi_engine.errors import InvalidHeadError, StoreCorruptError, StoreError, StoreVersionError
from hmi_engine.knowledge.adapters import Adapter, LoraBlock, Site
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import ClassificationHead, DenseLayer, EmbeddingHead, Head
from hmi_engine.knowledge.tenant_file import load_tenant, read_into, read_layout, write_tenant
from hmi_engine.knowledge.tenant_layout import MAX_HEADER_BYTES


@pytest.fixture
def tenant_file(tmp_path: Path, mixed_adapter: Adapter, classification_head: ClassificationHead) -> Path:
    path = tmp_path / "tenant.safetensors"
    write_tenant(path, mixed_adapter, classification_head)
    return path


def test_adapter_and_heads_come_back(
    tmp_path: Path, general: GeneralInfo, mixed_adapter: Adapter, heads: list[Head]
) -> None:
    for head in heads:
        write_tenant(tmp_path / "file", mixed_adapter, head)
        adapter, loaded = load_tenant(tmp_path / "file", general)
        assert adapter.blocks.keys() == mixed_adapter.blocks.keys()
        for key, block in mixed_adapter.blocks.items():
            found = adapter.blocks[key]
            assert type(found) is type(block)
            assert found.settings() == block.settings()
            assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in block.tensors().items())
        assert type(loaded) is type(head)
        assert_same_head(loaded, head)


def assert_same_head(found: object, expected: object) -> None:
    """Fields alike, tensors equal, and so the layers inside."""
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(other, value), name
        elif isinstance(value, DenseLayer):
            assert_same_head(other, value)
        elif name == "hidden":
            assert len(other) == len(value)
            for one, two in zip(other, value, strict=True):
                assert_same_head(one, two)
        else:
            assert other == value, name


def test_a_head_of_many_labels_comes_back(tmp_path: Path, general: GeneralInfo) -> None:
    labels = tuple(f'D{number:06d} some descriptive label of a "heading"' for number in range(30_000))
    head = ClassificationHead(labels, torch.randn(30_000, 8), torch.randn(30_000), "cls")
    write_tenant(tmp_path / "file", Adapter({}), head)
    assert_same_head(load_tenant(tmp_path / "file", general)[1], head)


def test_a_head_that_nobody_could_read_is_not_written(tmp_path: Path) -> None:
    labels = ("é" * (MAX_HEADER_BYTES // 6), "y")  # six letters each in JSON
    head = ClassificationHead(labels, torch.randn(2, 8), torch.randn(2), "cls")
    with pytest.raises(InvalidHeadError, match=r"2 labels do not fit .* fewer or shorter"):
        write_tenant(tmp_path / "file", Adapter({}), head)
    assert list(tmp_path.iterdir()) == []


def test_the_layout_describes_the_data_that_safetensors_sees(tenant_file: Path) -> None:
    """The promises that kernels and arenas rely on, checked against the library's reading of the file."""
    layout = read_layout(tenant_file)
    tensors = load_file(tenant_file)
    data = torch.empty(layout.num_elements)
    read_into(tenant_file, layout, data)
    kernel_order = {
        "lora": ("a", "b"),
        "bottleneck": ("down", "down_bias", "up", "up_bias"),
        "ia3": ("vector",),
        "bitfit": ("vector",),
    }
    for block in layout.blocks:
        parts = [tensors[f"layer.{block.layer:03d}.{block.site}.{name}"] for name in kernel_order[block.kind]]
        expected = torch.cat([part.flatten() for part in parts])
        end = block.offset_elements + block.num_elements
        assert torch.equal(data[block.offset_elements : end], expected)
        if block.kind in ("ia3", "bitfit"):
            assert (block.inputs, block.rank, block.outputs) == (len(parts[0]), 0, len(parts[0]))
            continue
        assert (block.inputs, block.rank) == tuple(parts[0].shape)
        assert block.outputs == parts[1 if block.kind == "lora" else 2].shape[1]
    assert layout.head.tensors.keys() == {"weight", "bias"}
    for name, place in layout.head.tensors.items():
        assert torch.equal(place.view(data), tensors[f"output_head.{name}"])


def test_all_of_a_layer_is_one_span(tenant_file: Path, mixed_adapter: Adapter) -> None:
    layout = read_layout(tenant_file)
    assert tuple(layout.layer_spans) == mixed_adapter.layers
    head_elements = 3 * 8 + 3
    starts, ends = zip(*layout.layer_spans.values(), strict=True)
    assert (0, *ends) == (*starts, layout.num_elements - head_elements), "layers in turn, then the head"
    for layer, (start, end) in layout.layer_spans.items():
        sizes = [block.num_elements for block in layout.blocks if block.layer == layer]
        assert end - start == sum(sizes)


def test_a_head_alone_and_nothing_at_all(tmp_path: Path, general: GeneralInfo) -> None:
    write_tenant(tmp_path / "file", Adapter({}), EmbeddingHead("mean"))
    layout = read_layout(tmp_path / "file")
    assert (layout.num_elements, layout.blocks, layout.layer_spans) == (0, (), {})
    read_into(tmp_path / "file", layout, torch.empty(0))
    adapter, head = load_tenant(tmp_path / "file", general)
    assert adapter.kind == "none"
    assert isinstance(head, EmbeddingHead)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_stored_as_float32(tmp_path: Path, general: GeneralInfo, dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 8).to(dtype).T, torch.randn(2, 8).to(dtype)
    write_tenant(tmp_path / "file", Adapter({(2, Site.KEY): LoraBlock(a, b, 1)}), EmbeddingHead("mean"))
    block = load_tenant(tmp_path / "file", general)[0].blocks[2, Site.KEY]
    assert isinstance(block, LoraBlock)
    assert block.a.dtype == torch.float32
    assert torch.equal(block.a, a.float())
    assert torch.equal(block.b, b.float())


def test_reading_fills_exactly_the_given_slice(tenant_file: Path) -> None:
    layout = read_layout(tenant_file)
    arena = torch.full((layout.num_elements + 20,), -7.0)
    read_into(tenant_file, layout, arena[10:-10])
    assert (arena[:10] == -7).all()
    assert (arena[-10:] == -7).all()
    buffer = memoryview(bytearray(layout.data_bytes))
    read_into(tenant_file, layout, buffer)
    assert bytes(buffer) == arena[10:-10].numpy().tobytes() == tenant_file.read_bytes()[layout.data_start :]


def test_reading_into_an_unfit_buffer_is_refused(tenant_file: Path) -> None:
    layout = read_layout(tenant_file)
    size = layout.num_elements
    for buffer in (torch.empty(size + 1), torch.empty(size, dtype=torch.int32), torch.empty(2 * size)[::2]):
        with pytest.raises(ValueError, match="buffer"):
            read_into(tenant_file, layout, buffer)


def test_a_file_that_shrank_or_vanished_is_corrupt(tenant_file: Path) -> None:
    layout = read_layout(tenant_file)
    buffer = torch.empty(layout.num_elements)
    with tenant_file.open("r+b") as file:
        file.truncate(layout.data_start + layout.data_bytes - 4)
    with pytest.raises(StoreCorruptError, match="cut short"):
        read_into(tenant_file, layout, buffer)
    with pytest.raises(StoreCorruptError, match="tensors take"):
        read_layout(tenant_file)
    tenant_file.unlink()
    with pytest.raises(StoreCorruptError, match="cannot be read"):
        read_into(tenant_file, layout, buffer)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), data=st.data())
def test_a_damaged_header_never_gives_another_error_or_a_place_outside(
    tenant_file: Path, position: int, value: int, data: st.DataObject
) -> None:
    content = bytearray(tenant_file.read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    content[position % header_end] = value
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tenant_file.with_name("damaged.safetensors")
    path.write_bytes(content)
    try:
        layout = read_layout(path)
    except StoreError as error:
        assert "damaged.safetensors" in str(error)
        return
    assert layout.data_start + layout.data_bytes == len(content)
    for block in layout.blocks:
        assert 0 <= block.offset_elements <= block.offset_elements + block.num_elements <= layout.num_elements


Edit = Callable[[dict[str, torch.Tensor], dict[str, str]], object]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, _: tensors.pop("output_head.bias"), "expected tensors"),
        (
            lambda tensors, _: tensors.update({"output_head.weight": torch.ones(2, 8)}),
            "head.weight has shape",
        ),
        (lambda tensors, _: tensors.update({"zzz": torch.ones(1)}), "'zzz' is not described"),
        (lambda tensors, _: tensors.update({"output_head.bias": torch.ones(3).half()}), "all F32"),
        (lambda tensors, _: tensors.update({"layer.003.value.a": torch.ones(3)}), "do not fit each other"),
        (lambda tensors, _: tensors.update({"layer.003.value.b": torch.ones(4, 8)}), "do not fit each other"),
        (lambda _, metadata: metadata.pop("format"), "no tenant file"),
        (lambda _, metadata: metadata.update(format_version="x"), "no tenant file"),
        (lambda _, metadata: metadata.pop("hmi"), "metadata"),
        (lambda _, metadata: replace_in(metadata, '"value"', '"nowhere"'), "unknown site"),
        (lambda _, metadata: replace_in(metadata, '"relu"', '"mish"'), "activation 'mish' is unknown"),
        (lambda _, metadata: replace_in(metadata, '"relu"', "1"), "activation 1"),
        (lambda _, metadata: replace_in(metadata, '"scale":0.5', '"scales":0.5'), "settings are scales"),
        (lambda _, metadata: replace_in(metadata, '"scale":0.5', '"scale":1e999'), "metadata"),
        (lambda _, metadata: replace_in(metadata, '"scale":0.5', '"scale":NaN'), "metadata"),
        (lambda _, metadata: replace_in(metadata, '"scale":0.5', '"scale":"0.5"'), "must be a finite number"),
        (lambda _, metadata: replace_in(metadata, '"mean"', '"max"'), "pooling"),
        (lambda _, metadata: replace_in(metadata, '"mean"', "null"), "pooling"),
        (lambda _, metadata: replace_in(metadata, '"kind":"classification"', '"kind":"lm"'), "head.kind"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tenant_file: Path, edit: Edit, message: str) -> None:
    tensors = load_file(tenant_file)
    with safe_open(tenant_file, "pt") as file:
        metadata = file.metadata()
    edit(tensors, metadata)
    save_file(tensors, tenant_file, metadata)
    with pytest.raises(StoreCorruptError, match=message):
        read_layout(tenant_file)


def replace_in(metadata: dict[str, str], old: str, new: str) -> None:
    assert old in metadata["hmi"]
    metadata["hmi"] = metadata["hmi"].replace(old, new)


def test_a_newer_format_says_so(tenant_file: Path) -> None:
    save_file({}, tenant_file, {"format": "hmi-tenant", "format_version": "99"})
    with pytest.raises(StoreVersionError, match="format version 99, this HMI reads up to 2"):
        read_layout(tenant_file)


def test_the_format_before_says_what_to_do(tenant_file: Path) -> None:
    save_file({}, tenant_file, {"format": "hmi-tenant", "format_version": "1"})
    with pytest.raises(StoreVersionError, match=r"format version 1 .*add the tenant again"):
        read_layout(tenant_file)


def test_a_tenant_of_another_base_is_refused(tenant_file: Path, general: GeneralInfo) -> None:
    read_layout(tenant_file).check_fits(general, tenant_file)
    for change in ({"hidden_size": 16}, {"intermediate_size": 5}, {"plot_layers": 3}, {"num_layers": 3}):
        other = general.model_copy(update=change)
        with pytest.raises(StoreCorruptError, match=r"tenant\.safetensors"):
            read_layout(tenant_file).check_fits(other, tenant_file)
        with pytest.raises(StoreCorruptError, match=r"tenant\.safetensors"):
            load_tenant(tenant_file, other)


def test_nan_written_past_the_checks_is_found_on_loading(
    tmp_path: Path, general: GeneralInfo, classification_head: ClassificationHead
) -> None:
    write_tenant(
        tmp_path / "file", Adapter({}), replace(classification_head, bias=torch.tensor([0.0, 1.0, torch.nan]))
    )
    with pytest.raises(StoreCorruptError, match="bias: holds NaN"):
        load_tenant(tmp_path / "file", general)
