"""Files read together equal what Python reads of them; one that fails harms no other."""

import errno
import os
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmi_kernels import read_files


@pytest.fixture(params=["compiled", "python"], autouse=True)
def implementation(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(sys.modules["hmi_kernels.read_files"], "native_reason", "for this test")


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 400_000), st.integers(0, 5000)), min_size=0, max_size=12),
    st.integers(1, 9),
)
def test_every_tensor_holds_its_files_bytes(tmp_path_factory, shapes, num_threads):
    folder = tmp_path_factory.mktemp("files")
    contents = [os.urandom(offset + size) for size, offset in shapes]
    paths = [folder / str(number) for number in range(len(shapes))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content + b"beyond")
    tensors = [torch.empty(size, dtype=torch.uint8) for size, _ in shapes]
    offsets = [offset for _, offset in shapes]
    assert read_files(paths, offsets, tensors, num_threads=num_threads) == [None] * len(shapes)
    for tensor, content, offset in zip(tensors, contents, offsets, strict=True):
        assert tensor.numpy().tobytes() == content[offset:]


def test_each_error_stays_with_its_file(write, tmp_path):
    good = torch.arange(100_000, dtype=torch.float32)
    data = good.numpy().tobytes()
    bad = good.clone()
    bad[-1] = float("nan")
    infinite = good.clone()
    infinite[40_000] = -float("inf")
    (tmp_path / "folder").mkdir()
    paths = [
        write("first", data),
        tmp_path / "missing",
        write("short", data[:-1]),
        write("nan", bad.numpy().tobytes()),
        write("infinite", infinite.numpy().tobytes()),
        tmp_path / "folder",
        write("last", data),
    ]
    tensors = [torch.empty(100_000) for _ in paths]
    errors = read_files(paths, [0] * 7, tensors, require_finite=True)
    kinds = [FileNotFoundError, EOFError, ValueError, ValueError, IsADirectoryError]
    assert errors[0] is errors[-1] is None
    assert [type(error) for error in errors[1:-1]] == kinds
    for error, path in zip(errors[1:-1], paths[1:-1], strict=True):
        assert str(path) in str(error)
    assert errors[1].errno == errno.ENOENT
    assert "399999 of 400000" in str(errors[2])
    assert torch.equal(tensors[0], good) and torch.equal(tensors[-1], good)
    assert read_files(paths[3:5], [0, 0], tensors[3:5]) == [None, None], "looked at only where asked for"


@pytest.mark.parametrize("size", [1, 3, 32_767, 32_768, 32_769, 70_001])
def test_the_largest_finite_value_passes_and_every_place_is_looked_at(write, size):
    values = torch.full((size,), torch.finfo(torch.float32).max)
    tensor = torch.empty(size)
    assert read_files([write("f", values.numpy().tobytes())], [0], [tensor], require_finite=True) == [None]
    for place in {0, size // 2, size - 1}:
        changed = values.clone()
        changed[place] = float("inf")
        (error,) = read_files([write("f", changed.numpy().tobytes())], [0], [tensor], require_finite=True)
        assert isinstance(error, ValueError)


def test_wrong_arguments_are_refused_before_anything_is_read(write):
    path = write("f", b"12345678")
    tensor = torch.zeros(2)
    for arguments, keywords, error in (
        (([path], [0], []), {}, ValueError),
        (([path], [-1], [tensor]), {}, ValueError),
        (([path], [0], [tensor]), {"num_threads": 0}, ValueError),
        (([path], [0], [torch.zeros(4, 4).t()[:2]]), {}, ValueError),
        (([path], [0], [torch.zeros(2, device="meta")]), {}, TypeError),
        (([path], [0], [tensor.long()]), {"require_finite": True}, TypeError),
    ):
        with pytest.raises(error):
            read_files(*arguments, **keywords)
    assert tensor.tolist() == [0, 0]
    assert read_files([], [], []) == []


def test_names_that_are_no_text(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff\xfe")
    path.write_bytes(b"abcd")
    tensor = torch.empty(4, dtype=torch.uint8)
    assert read_files([path], [0], [tensor]) == [None]
    assert bytes(tensor.tolist()) == b"abcd"


def test_many_threads_read_at_once(write):
    paths = [write(str(number), bytes([number]) * 300_000) for number in range(8)]
    tensors = [[torch.empty(300_000, dtype=torch.uint8) for _ in paths] for _ in range(4)]
    results = [None] * 4

    def read(number):
        results[number] = read_files(paths, [0] * 8, tensors[number])

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[None] * 8] * 4
    for read_by_one in tensors:
        assert all(bool((tensor == number).all()) for number, tensor in enumerate(read_by_one))


def test_in_a_forked_child(write):
    paths = [write(str(number), bytes([number]) * 600_000) for number in range(4)]
    tensors = [torch.empty(600_000, dtype=torch.uint8) for _ in paths]
    assert read_files(paths, [0] * 4, tensors) == [None] * 4  # starts threads, which the child lacks
    child = os.fork()
    if child == 0:
        os._exit(0 if read_files(paths, [0] * 4, tensors) == [None] * 4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
