"""The compression benchmark: table and merges follow the formula, distances are exact, all is measured."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import benchmarks.compression as compression
import hmi_kernels
from benchmarks.arguments import Arguments
from benchmarks.compression_rows import (
    Table,
    compute_table,
    nearest_distances,
    relative_error,
    store_table,
)
from hmi_engine.knowledge.row_formats import ROW_FORMATS, codebook_bytes, stored_row_bytes
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.bert_loading import import_bert
from hmi_engine.models.packing import PackedSequences

PLOT_LAYERS = 2
MASK = 4


def some_sequences(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (25,), generator=generator).tolist()
    return [torch.randint(5, 15, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def table(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("compression") / "general"
    import_bert(str(tiny_bert), folder)
    return compute_table(
        HierarchicalBert.load(folder, PLOT_LAYERS), PackedSequences.pack(some_sequences(1)), MASK, min_count=2
    )


def test_the_table_holds_what_the_corpus_holds_twice(table: Table) -> None:
    counts = Counter(pair for ids in some_sequences(1) for pair in itertools.pairwise(ids))
    expected = sorted(pair for pair, count in counts.items() if count >= 2)
    assert hmi_kernels.ngram_tokens(table.keys)[:, :2].tolist() == [list(pair) for pair in expected]
    assert table.counts.tolist() == [counts[pair] for pair in expected]
    assert table.unigram_rows().shape == table.rows.shape


def test_a_merge_follows_the_formula(table: Table) -> None:
    """U + (R(left) - U) + (R(right) - U), token by token, with windows run one by one."""
    sequences = PackedSequences.pack(some_sequences(2))
    ids = sequences.input_ids
    ends = torch.zeros(len(ids), dtype=torch.bool)
    ends[sequences.offsets[1:] - 1] = True
    keys = hmi_kernels.ngram_keys(torch.stack([ids, ids.roll(-1), torch.full_like(ids, -1)], dim=1))
    held = torch.isin(keys, table.keys) & ~ends
    found = store_table(table, "float32").merge(sequences, table.references(keys, held))
    positions = sequences.positions()
    for t in range(len(ids)):
        alone = table.model.window_states(ids[t][None, None])[0, 0].half().float()
        state = alone.clone()
        for first, slot in ((t - 1, 1), (t, 0)):
            if first >= 0 and not ends[first]:
                window = ids[first : first + 2].clone()
                if not held[first]:
                    window[1 - slot] = MASK
                row = table.model.window_states(window[None])[0, slot]
                state += (row if held[first] else row.half().float()) - alone
        expected = table.model.merge_norm(state + table.model.merge_positions[positions[t]])
        torch.testing.assert_close(found[t], expected, rtol=1e-4, atol=1e-4)


def test_the_most_frequent_rows_are_kept(table: Table) -> None:
    for num_rows in (0, 3, len(table.keys) + 5):
        kept = table.most_frequent(num_rows)
        assert int(kept.sum()) == min(num_rows, len(table.keys))
        if 0 < num_rows < len(table.keys):
            assert table.counts[kept].min() >= table.counts[~kept].max()


def test_references_to_rows_that_are_not_there_are_refused(table: Table) -> None:
    keys = torch.cat([table.keys[:1], table.keys.max() + 1 + torch.zeros(1, dtype=torch.int64)])
    assert table.references(keys, torch.tensor([True, False])).tolist() == [[0], [-1]]
    with pytest.raises(ValueError, match="not in the table"):
        table.references(keys, torch.tensor([True, True]))


def test_distances_to_the_nearest_row() -> None:
    rows = torch.randn(60, 2, 5, generator=torch.Generator().manual_seed(0))
    rows[7] = rows[31]
    flat = rows.flatten(1).double()
    distances = torch.cdist(flat, flat)
    distances.fill_diagonal_(torch.inf)
    expected = (distances.amin(dim=1) / flat.norm(dim=1)).float()
    sample = [3, 7, 31, 59]
    found = nearest_distances(rows, sample)
    torch.testing.assert_close(found, expected[sample], rtol=1e-5, atol=1e-6)
    assert found[1] == found[2] == 0


@pytest.fixture
def data_folder(tmp_path: Path, make_sentences) -> Path:
    folder = tmp_path / "data" / "words"
    folder.mkdir(parents=True)
    for split, count, seed in (("train", 240, 3), ("dev", 20, 4), ("test", 60, 5)):
        texts = make_sentences(count, seed=seed, longest=6)
        lines = [{"text": text, "label": "the" if "the" in text.split() else "none"} for text in texts]
        (folder / f"{split}.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder.parent


def test_all_formats_are_measured(tiny_bert: Path, data_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compression, "packaged_model", lambda: tiny_bert)
    result = compression.measure(Arguments(data_folder, tmp_path / "out.json", quick=True, command="test"))
    values = {quantity.name: quantity.value for quantity in result.quantities}
    num_rows = result.settings["rows"]
    assert isinstance(num_rows, int) and num_rows > 10
    for row_format in ROW_FORMATS:
        row_bytes = stored_row_bytes(row_format, 2, 32)
        assert values[f"{row_format}: bytes a row"] == row_bytes
        total = num_rows * row_bytes + codebook_bytes(row_format, 2, 32)
        assert values[f"{row_format}: bytes of the table"] == total
    assert values["float32: row error"] == values["float32: state error"] == 0
    assert 0 < values["float16: row error"] < values["int8: row error"] < 0.05
    small = values["all sets: accuracy, float16, in a small table"]
    for row_format in compression.TRAINED[1:]:
        name = f"{row_format}, in a small table"
        difference = values[f"all sets: accuracy, {name}"] - small
        assert values[f"all sets: {name}, minus float16"] == pytest.approx(difference)
        for how in ("trained alike", "trained on float16"):
            name = f"{row_format}, {how}"
            assert 0.3 < values[f"words: accuracy, {name}"] <= 1
            difference = values[f"all sets: accuracy, {name}"] - values["all sets: accuracy, float16"]
            assert values[f"all sets: {name}, minus float16"] == pytest.approx(difference)
    for curve in result.curves:
        assert curve.y[1] == pytest.approx(values[f"{curve.name}: state error"])  # room for all rows
        assert curve.y[0] >= curve.y[1]
    (case,) = result.cases
    assert {system.name for system in case.systems} == set(ROW_FORMATS)
    assert len(case.ratios) == len(ROW_FORMATS) - 1


def test_relative_error_is_a_ratio_of_lengths() -> None:
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert relative_error(expected * 1.5, expected) == pytest.approx(0.5)
