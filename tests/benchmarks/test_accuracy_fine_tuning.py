"""Full fine-tuning learns what can be learned, and its scores are seqeval's and scikit-learn's."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import BertModel, pipeline

from benchmarks.accuracy_study import fine_tuning
from benchmarks.accuracy_study.fine_tuning import FineTuning, fine_tune
from benchmarks.accuracy_study.scores import score
from benchmarks.accuracy_study.sets import ClassificationSet, TaggingSet
from hmi_engine.knowledge.examples import Example, TaggedExample

RECIPE = FineTuning(learning_rate=2e-3, epochs=4, batch_size=16, max_tokens=16)


@pytest.fixture
def texts(make_sentences):
    return make_sentences(360, seed=3, longest=9)


def test_a_classifier_learns_a_word(tiny_bert, texts):
    examples = [
        Example(text, "with" if "the" in text.split() else "without", line) for line, text in enumerate(texts)
    ]
    labelled = ClassificationSet("words", *map(tuple, (examples[:240], examples[240:300], examples[300:])))
    outcome = fine_tune(tiny_bert, labelled, RECIPE, seed=0)
    assert len(outcome.dev_by_epoch) == RECIPE.epochs
    assert score("accuracy", outcome.outcomes.counts(labelled)) > 0.9


def test_a_tagger_learns_words_in_long_sentences(tiny_bert, texts):
    sentences = [_tagged(text + " " + other) for text, other in pairwise(texts)]
    labelled = TaggingSet("words", *map(tuple, (sentences[:240], sentences[240:300], sentences[300:])))
    outcome = fine_tune(tiny_bert, labelled, RECIPE, seed=0)
    counts = outcome.outcomes.counts(labelled)
    assert counts.shape == (len(labelled.test), 1, 3)
    assert score("entity F1", counts) > 0.9


def test_a_saved_model_answers_as_the_one_that_was_scored(tiny_bert, texts, tmp_path):
    examples = tuple(Example(text, "ab"[line % 2], line) for line, text in enumerate(texts[:64]))
    labelled = ClassificationSet("words", examples[:32], examples[32:40], examples[40:])
    outcome = fine_tune(tiny_bert, labelled, replace(RECIPE, epochs=1), seed=0, save=tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path))
    found = [each["label"] for each in classify([example.text for example in labelled.test])]
    assert found == [labelled.labels[answer] for answer in outcome.outcomes.answers]


def test_frozen_layers_stay_as_they_are(tiny_bert, texts, monkeypatch):
    examples = tuple(Example(text, "ab"[line % 2], line) for line, text in enumerate(texts[:48]))
    labelled = ClassificationSet("words", examples[:32], examples[32:40], examples[40:])
    models = []
    new_model = fine_tuning._Classification.new_model
    monkeypatch.setattr(
        fine_tuning._Classification, "new_model", lambda task: models.append(new_model(task)) or models[-1]
    )
    fine_tune(tiny_bert, labelled, replace(RECIPE, epochs=1, frozen_layers=2), seed=0)
    before = BertModel.from_pretrained(tiny_bert).state_dict()
    changed = {
        name
        for name, tensor in models[0].base_model.state_dict().items()
        if name in before and not torch.equal(tensor, before[name])
    }
    prefixes = ("encoder.layer.2.", "encoder.layer.3.", "pooler.")
    assert changed and all(name.startswith(prefixes) for name in changed)
    assert {name.split(".")[2] for name in changed if name.startswith("encoder")} == {"2", "3"}


def _tagged(text):
    words = tuple(text.split())
    return TaggedExample(words, tuple("B-ARTICLE" if word in ("the", "a") else "O" for word in words))
