"""Targets, losses and figures of every task against plain torch, and what examples are refused."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn import functional

from hmi_engine.construct.objectives import OBJECTIVES
from hmi_engine.construct.objectives.token_classification import IGNORED, tags_of_words
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.examples import (
    Example,
    MultiLabelExample,
    PairExample,
    RegressionExample,
    ScoredPairExample,
    TaggedExample,
)
from hmi_engine.models.tokenization import TextEncoder
from hmi_engine.request import Tag


@pytest.fixture(scope="module")
def encoder(tiny_bert):
    return TextEncoder(tiny_bert, 48)


def learn(task, examples, validation=(), **settings):
    return OBJECTIVES[task].learn(examples, TrainingSettings(task=task, **settings), validation)


CLASSES = [Example("the cell", label) for label in "aababc"]
LABEL_SETS = [MultiLabelExample("the cell", labels) for labels in (("x",), (), ("x", "y"), ("y",), ())]
NUMBERS = [RegressionExample("the cell", value) for value in (1.0, 2.0, 6.0)]
PAIRS = [PairExample("a", "b"), PairExample("c", "d", "e"), PairExample("f", "b"), PairExample("d", "g")]
TAGGED = [TaggedExample(("the", "cell-gene"), ("O", "B-x")), TaggedExample(("data",), ("O",))]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, "balanced"])
def test_loss_of_classes(encoder, smoothing, class_weights):
    objective = learn("classification", CLASSES, label_smoothing=smoothing, class_weights=class_weights)
    targets = objective.encode(CLASSES, encoder, 16).batch_targets(range(6))
    outputs = torch.randn(6, 3)
    weight = None
    if class_weights:
        weight = torch.tensor(
            compute_class_weight("balanced", classes=np.arange(3), y=targets.numpy())
        ).float()
    expected = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)(outputs, targets)
    torch.testing.assert_close(objective.loss(outputs, targets), expected)


@pytest.mark.parametrize("class_weights", [None, "balanced"])
def test_loss_of_label_sets(encoder, class_weights):
    objective = learn("multi_label", LABEL_SETS, label_smoothing=0.2, class_weights=class_weights)
    targets = objective.encode(LABEL_SETS, encoder, 16).batch_targets(range(5))
    assert targets.tolist() == [[1, 0], [0, 0], [1, 1], [0, 1], [0, 0]]
    outputs = torch.randn(5, 2)
    probability, smoothed = outputs.sigmoid(), torch.where(targets > 0, 0.9, 0.1)
    positive = 3 / 2 if class_weights else 1.0
    expected = -(positive * smoothed * probability.log() + (1 - smoothed) * (1 - probability).log()).mean()
    torch.testing.assert_close(objective.loss(outputs, targets), expected)


def test_a_label_that_all_examples_have_is_learned():
    examples = [MultiLabelExample("the cell", labels) for labels in (("x", "y"), ("x",), ("x",))]
    objective = learn("multi_label", examples, class_weights="balanced")
    assert objective.weights.tolist() == [1, 2]
    outputs = torch.zeros(3, 2, requires_grad=True)
    objective.loss(outputs, torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])).backward()
    assert bool((outputs.grad[:, 0] < 0).all())


def test_loss_and_unit_of_numbers(encoder):
    objective = learn("regression", NUMBERS)
    data = objective.encode(NUMBERS, encoder, 16)
    values = torch.tensor([1.0, 2.0, 6.0])
    standardised = (values - values.mean()) / values.std(correction=0)
    outputs = torch.randn(3, 1)
    expected = (outputs[:, 0] - standardised).square().mean()
    torch.testing.assert_close(objective.loss(outputs, data.batch_targets(range(3))), expected)
    metrics = objective.measure(standardised[:, None], data, range(3), resamples=0)
    assert metrics.values["mean_absolute_error"] == pytest.approx(0, abs=1e-5)
    head = objective.new_head(8, torch.Generator().manual_seed(0))
    rows = torch.randn(4, 8)
    stored = objective.to_head(head)
    expected = head(rows) * values.std(correction=0) + values.mean()
    torch.testing.assert_close(rows @ stored.weight.T + stored.bias, expected, atol=1e-5, rtol=1e-5)


def test_contrastive_loss(encoder):
    """Each anchor chooses among the texts of the batch, but for itself and copies of its own positive."""
    objective = learn("embedding", PAIRS)
    data = objective.encode(PAIRS, encoder, 16)
    assert data.encoded.texts == ("a", "b", "c", "d", "e", "f", "g")
    texts = data.batch_texts(range(4))
    assert [data.encoded.texts[text] for text in texts] == list("acfdbdbge")
    vectors = functional.normalize(torch.randn(9, 6), dim=1)
    anchors, candidates = vectors[:4], vectors[4:]
    scores = 20 * anchors @ candidates.T
    allowed = {0: [0, 1, 3, 4], 1: [0, 1, 2, 3, 4], 2: [1, 2, 3, 4], 3: [0, 2, 3, 4]}
    losses = [-scores[row, chosen].log_softmax(0)[chosen.index(row)] for row, chosen in allowed.items()]
    found = objective.loss(3 * vectors, data.batch_targets(range(4)))
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_retrieval_and_similarity(encoder):
    objective = learn("embedding", PAIRS)
    data = objective.encode(PAIRS, encoder, 16)
    vectors = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0.1, 1], [1, 0], [0.1, 1], [1, 0], [1, 0.2], [0, 1]])
    # anchors a c f d; positives b d b g, of which b is [1, 0], d [0.1, 1] and g [1, 0.2]
    values = objective.measure(vectors, data, range(4), resamples=0).values
    # f is nearer to d and to g; the nearest to d is d itself, which does not count
    assert values["retrieval_accuracy"] == pytest.approx(3 / 4)
    assert values["mean_reciprocal_rank"] == pytest.approx((1 + 1 + 1 / 3 + 1) / 4)

    scored = [
        ScoredPairExample("a", "b", 1.0),
        ScoredPairExample("a", "c", 5.0),
        ScoredPairExample("b", "c", 3),
    ]
    objective = learn("embedding", PAIRS, scored)
    assert objective.best_by == "spearman"
    data = objective.encode(scored, encoder, 16)
    vectors = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [1, 0], [1, 1]])
    assert objective.measure(vectors, data, range(3), resamples=0).values == {"spearman": pytest.approx(1.0)}
    assert 0 <= float(objective.loss(vectors, data.batch_targets(range(3)))) < 0.1
    both = objective.encode([*PAIRS, *scored], encoder, 16)
    with pytest.raises(TrainingDataError, match="not of both"):
        objective.measure(torch.randn(20, 2), both, range(7), resamples=0)


def test_tags_are_learned_at_first_pieces(encoder):
    """``cell-gene`` is three words to the tokenizer, and ``xyz`` three pieces of one."""
    example = TaggedExample(("the", "cell-gene", "xyz", "data"), ("O", "B-x", "I-x", "B-y"))
    objective = learn("token_classification", [example])
    assert objective.labels == ("O", "B-x", "B-y", "I-x", "I-y")
    data = objective.encode([example], encoder, 48)
    ids = encoder.token_ids(["the cell xyz data"])[0]
    tokens = data.encoded.token_ids[0]
    assert [tokens[place] for place in data.words[0]] == [ids[1], ids[2], ids[3], ids[-2]]
    assert data.targets[0][:, 0].tolist() == [0, 1, 3, 2]
    outputs = torch.randn(4, 5)
    expected = functional.cross_entropy(outputs, torch.tensor([0, 1, 3, 2]))
    torch.testing.assert_close(objective.loss(outputs, data.batch_targets([0])), expected)


def test_words_beyond_the_limit_are_outside(encoder):
    example = TaggedExample(("the", "cell", "gene", "data"), ("O", "B-x", "B-x", "B-x"))
    objective = learn("token_classification", [example])
    data = objective.encode([example], encoder, 4)
    assert data.targets[0].tolist() == [[0, 0], [1, 1], [IGNORED, 1], [IGNORED, 1]]
    outputs = torch.eye(3)[[0, 1, 1, 1]]
    values = objective.measure(outputs, data, [0], resamples=0).values
    assert values["word_accuracy"] == 0.5
    assert values["entity_recall"] == pytest.approx(1 / 3)
    nothing = torch.tensor([[IGNORED, 1]])
    assert objective.loss(outputs[:1], nothing).item() == 0.0


def test_tags_that_are_no_entities_are_judged_by_words():
    objective = learn("token_classification", [TaggedExample(("the", "cell"), ("DT", "NN"))])
    assert objective.best_by == "word_accuracy"


def test_answers_of_the_engine_as_tags_of_words():
    tags = [Tag(0, 3, "O", 1.0), Tag(4, 8, "B-x", 1.0), Tag(8, 9, "O", 1.0), Tag(9, 13, "I-x", 1.0)]
    assert tags_of_words(("the", "cell-gene", "data"), tags) == ["O", "B-x", "O"]


@pytest.mark.parametrize(
    ("task", "examples", "message"),
    [
        ("classification", [], "no classification examples"),
        ("classification", TAGGED, "takes examples of type Example, found a TaggedExample"),
        ("classification", [Example("the", "a")] * 2, "needs two labels"),
        ("classification", [Example(" ", "a", 7)], "line 7: a text"),
        ("classification", [Example("the", "", 8)], "line 8: a label"),
        ("classification", [Example("the", 3), Example("the", "a")], "example 0: .*one type"),
        ("multi_label", [MultiLabelExample("the", ("a",))] * 3, "all or none"),
        ("multi_label", [MultiLabelExample("the", ())] * 3, "all or none"),
        ("multi_label", [MultiLabelExample("the", (3,))], "labels must be strings"),
        ("regression", [RegressionExample("the", 2.0)] * 3, "all 3 examples have the value 2"),
        ("regression", [RegressionExample("the", float("nan"), 4)], "line 4: the value"),
        ("regression", [RegressionExample("the", "2")], "finite number"),
        ("regression", [RegressionExample("the", 10**5000, 6)], "line 6: .*an integer beyond float64"),
        ("embedding", [PairExample("a", "b")] * 2, "same positive"),
        ("embedding", [ScoredPairExample("a", "b", 1.0)], "PairExample"),
        ("token_classification", [TaggedExample(("the",), ())], "1 words and 0 tags"),
        ("token_classification", [TaggedExample(("the",), ("O",))], "nothing to learn"),
        ("token_classification", [TaggedExample((" ",), ("O",), 3)], "line 3"),
    ],
)
def test_examples_that_nothing_can_be_learned_from(task, examples, message):
    with pytest.raises(TrainingDataError, match=message):
        learn(task, examples)


@pytest.mark.parametrize(
    ("task", "examples", "test"),
    [
        ("classification", CLASSES, Example("the", "z")),
        ("multi_label", LABEL_SETS, MultiLabelExample("the", ("x", "z"))),
        ("token_classification", TAGGED, TaggedExample(("the",), ("B-z",))),
    ],
)
def test_labels_that_were_not_learned(encoder, task, examples, test):
    with pytest.raises(TrainingDataError, match=r"z'.*the training (labels|tags) are"):
        learn(task, examples).encode([test], encoder, 16)


@pytest.mark.parametrize("score", [float("inf"), 10**400, "high"], ids=["infinite", "huge", "text"])
def test_scores_that_are_no_numbers(encoder, score):
    scored = [ScoredPairExample("a", "b", 1.0), ScoredPairExample("a", "c", score, 7)]
    with pytest.raises(TrainingDataError, match="line 7: the score must be a finite number"):
        learn("embedding", PAIRS, scored).encode(scored, encoder, 16)


@pytest.mark.parametrize("task", ["embedding", "regression"])
def test_settings_for_labels(task):
    with pytest.raises(ValueError, match="has none"):
        TrainingSettings(task=task, class_weights="balanced")
    with pytest.raises(ValueError, match="has none"):
        TrainingSettings(task=task, label_smoothing=0.1)
