"""The benchmark of few examples: every way trains on the same texts, and tables say what it was."""

import json
from collections import Counter

import pytest

from benchmarks import few_examples
from benchmarks.accuracy_study.sets import ClassificationSet
from benchmarks.few_examples import WAYS
from benchmarks.result import BenchmarkResult
from hmi_engine.construct import training_schedule
from hmi_engine.knowledge.examples import Example


@pytest.fixture
def data(tmp_path, make_sentences):
    """A set of classes and one of tags."""
    for name in ("classes", "tags"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for number, (split, count) in enumerate((("train", 80), ("dev", 10), ("test", 30))):
        texts = make_sentences(count, seed=number, longest=6)
        lines = [{"text": text, "label": "the" if "the" in text.split() else "none"} for text in texts]
        blocks = [
            "".join(f"{word} {'B-X' if word == 'the' else 'O'}\n" for word in text.split()) for text in texts
        ]
        (tmp_path / "data" / "classes" / f"{split}.txt").write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / "data" / "tags" / f"{split}.txt").write_text("\n".join(blocks))
    return tmp_path / "data"


def test_every_way_trains(tiny_bert, tmp_path, monkeypatch, data):
    monkeypatch.setattr(few_examples, "packaged_model", lambda: tiny_bert)
    monkeypatch.setattr(few_examples, "packaged_distillation", lambda: None)
    monkeypatch.setattr(training_schedule, "MIN_STEPS", 60)
    out = tmp_path / "few.json"
    few_examples.main(["--quick", "--data", str(data), "--out", str(out)])
    (table,) = BenchmarkResult.model_validate_json(out.read_text()).tables
    rows = {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}
    assert list(rows) == [*(way.name for way in WAYS), "majority"]
    for way in WAYS:
        row = rows[way.name]
        assert 0 <= row["classes"] <= 1
        assert (row["tags"] is None) == ("pooling" in way.fields)
        assert 0 < row["steps taken"] <= row["steps planned"] and row["seconds"] > 0
    assert rows["majority"]["tags"] is None and rows["majority"]["classes"] > 0
    # 34 examples are learned from: two batches of 32 in an epoch, or five of 8, which take 12 epochs.
    assert rows["10 epochs, batches of 32"]["steps planned"] == 20
    assert rows["as usual"]["steps planned"] == 60


def test_draws_differ_and_hold_no_label_once():
    train = tuple(Example(f"text {number}", "common" if number % 5 else str(number)) for number in range(100))
    labelled = ClassificationSet("set", train, (), ())
    draws = [few_examples._draw(labelled, 30, number) for number in range(3)]
    assert len({tuple(example.text for example in drawn) for drawn in draws}) == 3
    for drawn in draws:
        assert min(Counter(example.label for example in drawn).values()) > 1


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    few_examples.main(["--quick", "--out", str(tmp_path / "few.json")])
    result = BenchmarkResult.model_validate_json((tmp_path / "few.json").read_text())
    assert [row[0] for row in result.tables[0].rows] == [*(way.name for way in WAYS), "majority"]
