"""The benchmark of joint training: every system trains every tenant; PEFT's loop learns."""

import json

import numpy as np
import pytest
import torch

import benchmarks.joint_training as joint_training
from benchmarks.arguments import Arguments
from benchmarks.peers.peft_training import PeftTrainer
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.knowledge.examples import Example


@pytest.fixture
def labelled(make_sentences):
    def make(count, seed):
        texts = make_sentences(count, seed=seed, longest=6)
        return [Example(text, "the" if "the" in text.split() else "none") for text in texts]

    return make


def test_every_tenant_in_every_system(tiny_bert, tmp_path, monkeypatch, labelled):
    monkeypatch.setattr(joint_training, "packaged_model", lambda: tiny_bert)
    monkeypatch.setattr(joint_training, "packaged_distillation", lambda: None)
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count, seed in (("train", 300, 3), ("test", 80, 4)):
        lines = [{"text": example.text, "label": example.label} for example in labelled(count, seed)]
        (folder / f"words.{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = joint_training.measure(Arguments(folder, tmp_path / "out.json", quick=True, command="test"))
    (case,) = result.cases
    (table,) = result.tables
    assert [row[0] for row in table.rows] == [system.name for system in case.systems]
    assert {ratio.baseline for ratio in case.ratios} >= {"PEFT, all layers", "PEFT, upper layers"}
    assert all(0 <= row[2] <= row[1] <= row[3] <= 1 and row[4] > 0 for row in table.rows)


def test_peft_keeps_the_best_epoch_as_hmi_does(tiny_bert, labelled, monkeypatch):
    """Of equal accuracy the least validation loss; LoRA, pooler and classifier have learned."""
    losses = iter((0.9, 0.5, 0.7, 0.0))
    seen: list[dict[str, torch.Tensor]] = []

    def judge(self, model, rows):
        trained = {name: value.detach().clone() for name, value in model.named_parameters()}
        seen.append(trained)
        return [True] * len(rows), next(losses)

    monkeypatch.setattr(PeftTrainer, "_judge", judge)
    settings = TrainingSettings(kind="lora", max_epochs=3)
    PeftTrainer(tiny_bert, None, settings).train(labelled(40, 1), labelled(10, 2))
    first, second, _, kept = seen
    assert all(torch.equal(kept[name], value) for name, value in second.items())
    learned = {name for name, value in second.items() if not torch.equal(first[name], value)}
    for part in ("lora_", "pooler.modules_to_save", "classifier.modules_to_save"):
        assert any(part in name for name in learned), part


@pytest.mark.parametrize("layers", [None, (2, 3)])
def test_peft_learns(tiny_bert, labelled, layers):
    settings = TrainingSettings(kind="lora", max_epochs=6, learning_rate=1e-2)
    right = PeftTrainer(tiny_bert, layers, settings).train(labelled(240, 1), labelled(80, 2))
    truth = [example.label for example in labelled(80, 2)]
    assert len(right) == 80
    assert np.mean(right) > max(map(truth.count, set(truth))) / 80 + 0.05
