"""The default row format: that of the two real tables which holds more of the corpus."""

import builtins
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences, write_bert

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.construct.table_plan import TableSettings, largest_useful_count
from hmi_engine.knowledge.plot_table import PlotTable, open_plot

TEXTS = sentences(2500, seed=11)
BUDGETS = ["20KiB", "70KiB", "100KiB", "200KiB", "2MiB"]


@pytest.fixture(scope="module")
def store(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> hmi.Store:
    return hmi.Store.create(tmp_path_factory.mktemp("choice") / "store", general=tiny_bert, plot_layers=2)


def table_of(store: hmi.Store, name: str) -> PlotTable:
    file = store.domains[name].file
    assert file is not None
    return open_plot(store.layout.resolve(file))


def found(store: hmi.Store, name: str) -> int:
    """How many of the corpus' bigrams have a row, counted one by one."""
    bigrams = Counter(pair for ids in store.encoder.token_ids(TEXTS) for pair in pairwise(ids))
    tokens = hmi_kernels.ngram_tokens(table_of(store, name).row_keys)[:, :2]
    return sum(bigrams[first, second] for first, second in tokens.tolist())


def test_the_format_that_finds_more_is_chosen(store: hmi.Store) -> None:
    chosen = {}
    for budget in BUDGETS:
        report = store.add_domain(f"free-{budget}", TEXTS, plot_bytes=budget)
        hits: dict[str, int] = {}
        for row_format in ("float16", "pq8"):
            try:
                store.add_domain(f"{row_format}-{budget}", TEXTS, plot_bytes=budget, row_format=row_format)  # type: ignore[arg-type]
            except hmi.errors.BudgetTooSmallError:
                hits[row_format] = 0
            else:
                hits[row_format] = found(store, f"{row_format}-{budget}")
        info = store.domains[f"free-{budget}"]
        chosen[budget] = info.row_format
        assert info.row_format == ("pq8" if hits["pq8"] > hits["float16"] else "float16")
        assert found(store, info.name) == hits[info.row_format]
        same = table_of(store, f"{info.row_format}-{budget}")
        assert torch.equal(table_of(store, info.name).rows, same.rows)
        assert info.card["row_format_reason"] == report.row_format_reason is not None
    # Codebooks do not fit; they cost more rows than they buy; they pay; everything fits anyway.
    assert set(chosen.values()) == {"float16", "pq8"}
    assert chosen["20KiB"] == chosen["2MiB"] == "float16"
    assert store.verify() == []


def test_everything_that_occurs_often_enough_fits_as_floats(store: hmi.Store) -> None:
    store.add_domain("all", TEXTS, plot_bytes="2MiB", min_count=3)
    bigrams = Counter(pair for ids in store.encoder.token_ids(TEXTS) for pair in pairwise(ids))
    assert store.domains["all"].row_format == "float16"
    assert store.domains["all"].rows == sum(count >= 3 for count in bigrams.values())


@pytest.mark.parametrize("row_dtype", ["float16", "float32"])
def test_updates_keep_the_format(tiny_bert: Path, tmp_path: Path, row_dtype: Any) -> None:
    with hmi.Store.create(
        tmp_path / "store", general=tiny_bert, plot_layers=2, row_dtype=row_dtype
    ) as opened:
        opened.add_domain("large", TEXTS[:20])
        opened.add_domain("small", TEXTS, plot_bytes="100KiB")
        assert [opened.domains[name].row_format for name in ("large", "small")] == [row_dtype, "pq8"]
        opened.update_domain("large", TEXTS, plot_bytes="100KiB")
        opened.update_domain("small", TEXTS[:20], plot_bytes="2MiB")
        assert [opened.domains[name].row_format for name in ("large", "small")] == [row_dtype, "pq8"]
        opened.move_domain("small", "large")
        assert opened.domains["small"].row_format == "pq8"
        assert opened.verify() == []


def test_what_is_counted_suffices_for_the_densest_format(store: hmi.Store) -> None:
    plot_bytes = 1 << 20
    useful = largest_useful_count(TableSettings(plot_bytes, None, 1), store.general, [])
    row = store.general.window * store.general.hidden_size // 4  # one byte for four elements
    key_count_and_index = 16 + 2 * 16
    assert useful >= plot_bytes // (row + key_count_and_index)


def test_without_faiss_rows_are_floats(store: hmi.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_faiss(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    report = store.add_domain("without", TEXTS, plot_bytes="100KiB")
    assert store.domains["without"].row_format == "float16"
    assert report.row_format_reason is not None and "faiss" in report.row_format_reason
    with pytest.raises(hmi.errors.MissingDependencyError, match="pip install faiss-cpu"):
        store.add_domain("asked", TEXTS, plot_bytes="100KiB", row_format="pq8")


def test_a_width_that_codes_do_not_divide_has_floats(tmp_path: Path) -> None:
    general = write_bert(tmp_path / "bert", hidden_size=30, num_attention_heads=3)
    with hmi.Store.create(tmp_path / "store", general=general, plot_layers=1) as opened:
        report = opened.add_domain("words", TEXTS, plot_bytes="100KiB")
        assert opened.domains["words"].row_format == "float16"
        assert report.row_format_reason is not None and "multiple of 4" in report.row_format_reason
        assert opened.verify() == []


def test_an_interrupted_addition_keeps_its_choice(store: hmi.Store, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXTS))

    def stop(step: str, done: int, total: int | None) -> None:
        if step == "computing rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add_domain("interrupted", path, plot_bytes="100KiB", progress=stop)
    report = store.add_domain("interrupted", path, plot_bytes="100KiB")
    assert store.domains["interrupted"].row_format == "pq8"
    assert report.row_format_reason == store.domains["interrupted"].card["row_format_reason"]
