"""The accuracy benchmark trains each variant and reports shares of right answers."""

import json

import benchmarks.accuracy as accuracy
from benchmarks.arguments import Arguments


def test_every_task_in_every_variant(tiny_bert, tmp_path, monkeypatch, make_sentences):
    monkeypatch.setattr(accuracy, "packaged_model", lambda: tiny_bert)
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count, seed in (("train", 240, 3), ("test", 80, 4)):
        texts = make_sentences(count, seed=seed, longest=6)
        lines = [{"text": text, "label": "the" if "the" in text.split() else "none"} for text in texts]
        (folder / f"words.{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = accuracy.measure(Arguments(folder, tmp_path / "out.json", quick=True, command="test"))
    shares = {quantity.name: quantity.value for quantity in result.quantities}
    assert len(shares) == 1 + 3 + 3
    for variant in accuracy.VARIANTS:
        assert shares[f"words/label: {variant.name}"] == shares[f"mean of all tasks: {variant.name}"]
        assert 0.3 < shares[f"words/label: {variant.name}"] <= 1
    assert all(quantity.unit == "share" for quantity in result.quantities)
