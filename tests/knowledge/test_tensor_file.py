import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hmi_engine.errors import StoreCorruptError
from hmi_engine.knowledge.tensor_file import ALIGNMENT, file_sha256, read_header, write_tensors

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.int64, torch.float32, torch.float16, torch.uint8])
LIMIT = 1 << 20


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(st.tuples(shapes, dtypes), max_size=6), st.booleans())
def test_the_safetensors_library_reads_what_we_write(
    tmp_path: Path, specification: list[tuple[tuple[int, ...], torch.dtype]], aligned: bool
) -> None:
    path = tmp_path / "file.safetensors"
    tensors = {
        f"t{number}": torch.randint(0, 100, shape).to(dtype)
        for number, (shape, dtype) in enumerate(specification)
    }
    sha256 = write_tensors(path, tensors, {"key": "wert ä"}, align_tensors=aligned)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == file_sha256(path)
    loaded = load_file(path)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "wert ä"}
    header = read_header(path, max_header_bytes=LIMIT)
    assert [entry.name for entry in header.entries if entry.end > entry.start] == [
        name for name, tensor in tensors.items() if tensor.numel()
    ]
    assert header.data_start % ALIGNMENT == 0
    if aligned:
        assert all(entry.start % ALIGNMENT == 0 for entry in header.entries if entry.end > entry.start)


def test_we_read_headers_that_the_safetensors_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"b": torch.ones(2, 3), "a": torch.ones(4, dtype=torch.int64)}, path, {"k": "v"})
    header = read_header(path, max_header_bytes=LIMIT)
    assert {entry.name: (entry.dtype, entry.shape) for entry in header.entries} == {
        "a": ("I64", (4,)),
        "b": ("F32", (2, 3)),
    }
    assert header.metadata == {"k": "v"}


def test_tensors_that_are_no_plain_arrays_are_written_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    views = {"transposed": base.T, "column": base[:, 1], "expanded": base[:1].expand(3, 4)}
    write_tensors(tmp_path / "file", views | {"parameter": torch.nn.Parameter(base)}, {})
    loaded = load_file(tmp_path / "file")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in views.items())
    assert torch.equal(loaded["parameter"], base)


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"no json", b""),
        (b"[" * 100_000, b""),
        ([], b""),
        ({"t": entry()}, b""),
        ({"t": entry()}, b"12345"),
        ({"t": entry("F64")}, b"1234"),
        ({"t": entry("F99")}, b"1234"),
        ({"t": entry(["F32"])}, b"1234"),
        ({"t": entry(shape=[2])}, b"1234"),
        ({"t": entry(shape=[-1])}, b"1234"),
        ({"t": entry(shape=[-1, -1])}, b"1234"),
        ({"t": entry(shape=[True])}, b"1234"),
        ({"t": entry(shape=[1.0])}, b"1234"),
        ({"t": entry(shape=1)}, b"1234"),
        ({"t": entry(offsets=[4, 8])}, b"12341234"),
        ({"t": entry(offsets=[-4, 0])}, b"1234"),
        ({"t": entry(offsets=[0, 4, 8])}, b"1234"),
        ({"t": entry(), "u": entry()}, b"1234"),
        ({"t": entry(), "u": entry(offsets=[2, 6])}, b"123456"),
        ({"t": {"dtype": "F32"}}, b"1234"),
        ({"t": 3}, b"1234"),
        ({"__metadata__": {"a": 1}}, b""),
        ({"__metadata__": []}, b""),
        ({"t": entry(shape=[2**62, 2**62], offsets=[0, 2**126])}, b"1234"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: object, data: bytes) -> None:
    path = raw_file(tmp_path / "liar.safetensors", header, data)
    with pytest.raises(StoreCorruptError, match=r"liar\.safetensors"):
        read_header(path, max_header_bytes=LIMIT)


@pytest.mark.parametrize(
    "content", [b"", b"1234", (2**63).to_bytes(8, "little"), (LIMIT + 1).to_bytes(8, "little")]
)
def test_headers_of_impossible_length_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content + bytes(2 * LIMIT if len(content) == 8 else 0))
    with pytest.raises(StoreCorruptError, match="header of"):
        read_header(tmp_path / "file", max_header_bytes=LIMIT)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(StoreCorruptError, match="cannot be read"):
            read_header(path, max_header_bytes=LIMIT)
