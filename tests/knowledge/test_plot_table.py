import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hmi_engine.errors import StoreCorruptError, StoreVersionError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.plot_table import PlotTable, open_plot, text_digest, write_plot
from hmi_kernels import plot_index_find

MakeTable = Callable[..., PlotTable]
NAMES = ("index", "rows", "unigrams", "row_keys", "row_counts", "documents")


@pytest.mark.parametrize("keys", [[], [5], [77, 3, 2**62, 9, 10]])
@pytest.mark.parametrize("unigrams", [False, True])
def test_a_table_comes_back_and_the_library_reads_it(
    tmp_path: Path, general: GeneralInfo, make_table: MakeTable, keys: list[int], unigrams: bool
) -> None:
    table = make_table(keys, unigrams=unigrams)
    path = tmp_path / "a" / "1.plot.safetensors"
    write_plot(path, table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_plot(path, general)
    by_library = load_file(path)
    assert opened.metadata == table.metadata
    for name in NAMES:
        expected, found = getattr(table, name), getattr(opened, name)
        if expected is None:
            assert found is None
            continue
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        assert torch.equal(by_library[name], expected)
    assert plot_index_find(opened.index, torch.tensor([*keys, 4])).tolist() == [*range(len(keys)), -1]


def test_tensors_are_aligned_views_of_the_file_that_outlive_its_name(
    tmp_path: Path, make_table: MakeTable
) -> None:
    table = make_table([5, 6, 7], unigrams=True)
    path = tmp_path / "file"
    write_plot(path, table)
    before = memory_map(path)
    opened = open_plot(path)
    assert not before
    assert len(memory_map(path)) == 1
    for name in NAMES:
        tensor = getattr(opened, name)
        assert tensor.data_ptr() % 64 == 0
        assert any(start <= tensor.data_ptr() < end for start, end in memory_map(path))
    path.unlink()
    rows = opened.rows
    del opened
    assert torch.equal(rows, table.rows)


def memory_map(path: Path) -> list[tuple[int, int]]:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [tuple(int(bound, 16) for bound in line.split()[0].split("-")) for line in lines]  # type: ignore[misc]


def test_writing_to_an_opened_table_does_not_reach_the_file(tmp_path: Path, make_table: MakeTable) -> None:
    path = tmp_path / "file"
    write_plot(path, make_table([5]))
    content = path.read_bytes()
    open_plot(path).rows.fill_(1)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        {"rows": torch.zeros(3, 2, 8)},
        {"rows": torch.zeros(2, 2, 8).half()},
        {"rows": torch.zeros(3, 3, 8).half()},
        {"index": torch.zeros(6, 2, dtype=torch.int64)},
        {"index": torch.zeros(0, 2, dtype=torch.int64)},
        {"index": torch.zeros(2, 2, dtype=torch.int64)},
        {"index": torch.zeros(8, dtype=torch.int64)},
        {"row_keys": torch.zeros(3)},
        {"row_counts": torch.zeros(2, dtype=torch.int64)},
        {"unigrams": torch.zeros(49, 3, 8).half()},
        {"documents": torch.zeros(2, 2, dtype=torch.int64)},
        {"documents": torch.tensor(1)},
    ],
)
def test_tensors_that_do_not_match_are_refused_before_writing(
    tmp_path: Path, make_table: MakeTable, change: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}|an index of"):
        write_plot(tmp_path / "file", replace(make_table([1, 2, 3], unigrams=True), **change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, _: tensors.pop("rows"), "tensors are"),
        (lambda tensors, _: tensors.update(extra=torch.ones(1)), "tensors are"),
        (lambda tensors, _: tensors.update(rows=torch.zeros(2, 2, 8).half()), "rows is"),
        (lambda tensors, _: tensors.update(index=torch.zeros(8, 2)), "index is"),
        (lambda _, metadata: metadata.update(format="other"), "no PLOT file"),
        (lambda _, metadata: metadata.update(hmi="{}"), "metadata"),
        (
            lambda _, metadata: metadata.update(hmi=metadata["hmi"].replace("float16", "int8")),
            "row_dtype is",
        ),
        (
            lambda _, metadata: metadata.update(hmi=metadata["hmi"].replace('"window":2', '"window":-2')),
            "rows is",
        ),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    tmp_path: Path,
    make_table: MakeTable,
    edit: Callable[[dict[str, torch.Tensor], dict[str, str]], object],
    message: str,
) -> None:
    path = tmp_path / "table.safetensors"
    write_plot(path, make_table([1, 2, 3]))
    tensors = {
        name: tensor.clone() for name, tensor in load_file(path).items() if not name.startswith("padding")
    }
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    edit(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(StoreCorruptError, match=message) as caught:
        open_plot(path)
    assert "table.safetensors" in str(caught.value)


def test_an_index_has_slots_enough_for_a_search(tmp_path: Path, make_table: MakeTable) -> None:
    one_slot = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least 2"):
        plot_index_find(one_slot, torch.tensor([5]))
    with pytest.raises(ValueError, match="an index of 1 entries"):
        write_plot(tmp_path / "file", replace(make_table([]), index=one_slot))


@pytest.mark.parametrize("keys", [[5], [77, 3, 2**62, 9, 10]])
@pytest.mark.parametrize("row", [-1, -(2**63), 0, 1_000_000, 2**63 - 1])
def test_an_index_refers_to_rows_of_the_table(
    tmp_path: Path, make_table: MakeTable, keys: list[int], row: int
) -> None:
    """``row`` counts from behind the last one on, and negative numbers from there backwards."""
    path, table = tmp_path / "file", make_table(keys)
    used = table.index[:, 0] != 0
    index = table.index.clone()
    index[~used, 1] = row  # nobody reads what an empty slot says
    write_plot(path, replace(table, index=index))
    assert torch.equal(open_plot(path).index, index)
    stray = row if row < 0 or row == 2**63 - 1 else len(keys) + row
    index[used.nonzero()[-1], 1] = stray
    write_plot(path, replace(table, index=index))
    with pytest.raises(StoreCorruptError, match=f"{path}: .* row {stray}, .* {len(keys)} rows; .*hmi verify"):
        open_plot(path)


def test_newer_formats_and_cut_files_are_refused(tmp_path: Path, make_table: MakeTable) -> None:
    path = tmp_path / "file"
    write_plot(path, make_table([1]))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(StoreCorruptError, match="tensors take"):
        open_plot(path)
    path.unlink()
    with pytest.raises(StoreCorruptError, match="cannot be read"):
        open_plot(path)
    save_file({}, path, {"format": "hmi-plot", "format_version": "5"})
    with pytest.raises(StoreVersionError, match="format version 5"):
        open_plot(path)


@pytest.mark.parametrize("name", ["window", "plot_layers", "hidden_size", "vocab_size", "row_dtype"])
def test_a_table_made_for_another_base_is_refused(
    tmp_path: Path, general: GeneralInfo, make_table: MakeTable, name: str
) -> None:
    write_plot(tmp_path / "file", make_table([1]))
    other = general.model_copy(update={name: {"window": 3, "row_dtype": "float32"}.get(name, 99)})
    with pytest.raises(StoreCorruptError, match=f"made for {name}"):
        open_plot(tmp_path / "file", other)


@given(st.lists(st.text(max_size=5), max_size=8), st.lists(st.text(max_size=5), max_size=8))
def test_documents_are_found_as_in_a_set(table_texts: list[str], asked: list[str]) -> None:
    documents = torch.tensor(sorted({text_digest(text) for text in table_texts}), dtype=torch.int64)
    empty = torch.empty(0, dtype=torch.int64)
    table = PlotTable(empty, empty, empty, empty, None, documents, metadata=None)  # type: ignore[arg-type]
    asked = asked + table_texts
    assert table.contains_document(asked).tolist() == [text in set(table_texts) for text in asked]


def test_digests_are_fixed_for_ever() -> None:
    """Known value of BLAKE2b with 8 bytes of output: `printf abc | b2sum -l 64`."""
    assert text_digest("abc").to_bytes(8, "little", signed=True).hex() == "d8bb14d833d59559"
    assert text_digest("\ud800") != text_digest("?")
