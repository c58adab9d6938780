"""A trained tenant answers through the engine as its report says, whatever its task and adapter."""

import itertools

import numpy as np
import pytest

import hmi_engine as hmi
from hmi_engine.construct.training import TrainingSettings
from hmi_engine.construct.training_metrics import measure_label_sets, measure_tags
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.examples import (
    Example,
    MultiLabelExample,
    PairExample,
    RegressionExample,
    ScoredPairExample,
    TaggedExample,
)


@pytest.mark.parametrize(
    ("kind", "window", "miss", "pooling"),
    [
        ("bottleneck", 2, "backoff", "cls"),
        ("bottleneck", 3, "exact", "mean"),
        ("lora", 3, "backoff", "cls"),
        ("lora", 2, "exact", "mean"),
        ("double_seq_bn", 2, "backoff", "cls"),
        ("ia3", 2, "backoff", "cls"),
        ("bitfit", 2, "backoff", "mean"),
    ],
)
def test_served_accuracy_is_the_reported_one(make_store, topic_examples, kind, window, miss, pooling):
    store = make_store(window=window)
    examples = topic_examples(120, seed=1)
    seen = {example.text for example in examples}
    new = [example for example in topic_examples(60, seed=2) if example.text not in seen]
    store.add_domain("topics", sorted(seen))
    settings = TrainingSettings(kind=kind, miss=miss, pooling=pooling, max_epochs=3, learning_rate=5e-3)
    trained = store.train_tenant("topic", examples, domain="topics", test_examples=new, settings=settings)
    with hmi.Engine(store, miss=miss) as engine:
        responses = engine.run([hmi.Request("topic", example.text) for example in new])
        evaluation = hmi.evaluate_tenant(engine, "topic", new)
    assert all(response.error is None for response in responses)
    correct = [response.label == example.label for response, example in zip(responses, new, strict=True)]
    assert sum(correct) / len(correct) == pytest.approx(trained.report.test.accuracy)
    assert_alike(evaluation.metrics, trained.report.test)


def assert_alike(evaluated, reported):
    """The same figures and intervals; the training alone knows its most frequent label."""
    assert evaluated.num_examples == reported.num_examples
    for name in set(reported.values) - {"majority_accuracy"}:
        assert evaluated.values[name] == pytest.approx(reported.values[name], abs=1e-4)
        assert evaluated.intervals[name] == pytest.approx(reported.intervals[name], abs=1e-4)


def tagged(example):
    words = tuple(example.text.split())
    tags = [f"B-{example.label}" if place in (0, len(words) - 1) else "O" for place in range(len(words))]
    return TaggedExample((*words, "small-cell"), (*tags, "O"), example.line)


def labels_of(example):
    return (example.label, *(["short"] if len(example.text.split()) < 6 else []))


MAKE = {
    "classification": lambda e: Example(e.text, e.label, e.line),
    "multi_label": lambda e: MultiLabelExample(e.text, labels_of(e), e.line),
    "token_classification": tagged,
    "regression": lambda e: RegressionExample(e.text, 100.0 + 7 * len(e.label), e.line),
    "embedding": lambda e: PairExample(e.text, f"{e.label} {e.text.split()[-1]} {e.text.split()[0]}"),
}


@pytest.mark.parametrize("task", list(MAKE))
def test_every_task_is_served_as_it_was_judged(make_store, topic_examples, task):
    store = make_store()
    source = topic_examples(90, seed=1)
    store.add_domain("topics", [example.text for example in source])
    examples = [MAKE[task](example) for example in source]
    new = [MAKE[task](example) for example in topic_examples(40, seed=2)]
    settings = TrainingSettings(task=task, max_epochs=2, learning_rate=5e-3, max_tokens=48)
    report = store.train_tenant("t", examples, domain="topics", test_examples=new, settings=settings).report
    with hmi.Engine(store) as engine:
        assert_alike(hmi.evaluate_tenant(engine, "t", new).metrics, report.test)
        if task == "embedding":
            scored = [ScoredPairExample(pair.anchor, pair.positive, float(i)) for i, pair in enumerate(new)]
            vectors = [
                [response.embedding for response in engine.run([hmi.Request("t", text) for text in pair[:2]])]
                for pair in scored
            ]
            with pytest.raises(TrainingDataError, match="not of both"):
                hmi.evaluate_tenant(engine, "t", [*new[:2], *scored[:1]])
            found = hmi.evaluate_tenant(engine, "t", scored).metrics.values["spearman"]
            ranks = np.argsort(np.argsort([float(first @ second) for first, second in vectors]))
            assert found == pytest.approx(np.corrcoef(ranks, np.arange(40))[0, 1], abs=1e-3)


def best_constant(task, examples):
    """What the best answer that does not look at the topic reaches."""
    if task == "multi_label":
        labels = sorted({label for example in examples for label in example.labels})
        truth = np.array([[label in example.labels for label in labels] for example in examples])
        answers = itertools.product([False, True], repeat=len(labels))
        found = [
            measure_label_sets(truth, np.tile(answer, (len(truth), 1)), resamples=0) for answer in answers
        ]
        return max(metrics.values["micro_f1"] for metrics in found)
    if task == "token_classification":
        truth = [example.tags for example in examples]
        topics = {tag for tags in truth for tag in tags} - {"O"}
        answers = [[["O" if tag == "O" else topic for tag in tags] for tags in truth] for topic in topics]
        return max(measure_tags(truth, answer, resamples=0).values["entity_f1"] for answer in answers)
    return {"regression": 0.0, "embedding": 1 / len(examples)}[task]


@pytest.mark.parametrize(
    ("task", "figure", "recipe"),
    [
        ("multi_label", "micro_f1", {"learning_rate": 2e-2, "pooling": "mean", "class_weights": "balanced"}),
        ("token_classification", "entity_f1", {}),
        ("regression", "r2", {}),
        ("embedding", "retrieval_accuracy", {}),
    ],
    ids=str,
)
def test_every_task_learns_what_can_be_learned(make_store, topic_examples, task, figure, recipe):
    store = make_store()
    examples = [MAKE[task](example) for example in topic_examples(360, seed=1)]
    new = [MAKE[task](example) for example in topic_examples(60, seed=2)]
    recipe = {"rank": 8, "max_epochs": 12, "learning_rate": 5e-3} | recipe
    settings = TrainingSettings(task=task, **recipe)
    trained = store.train_tenant("t", examples, domain="general", test_examples=new, settings=settings)
    low, _ = trained.report.test.intervals[figure]
    assert low > best_constant(task, new)
