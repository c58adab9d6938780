"""Figures against scikit-learn, scipy and seqeval; the bootstrap's statistics against the figures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from seqeval import metrics as seqeval
from sklearn import metrics as sklearn

from hmi_engine.construct import training_metrics
from hmi_engine.construct.bootstrap import bootstrap_intervals
from hmi_engine.construct.training_metrics import (
    measure_classes,
    measure_label_sets,
    measure_numbers,
    measure_retrieval,
    measure_similarity,
    measure_tags,
)

LABEL = st.integers(0, 4)
TAGS = st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), min_size=1, max_size=7)
TAG_PAIRS = st.lists(TAGS.flatmap(lambda tags: st.tuples(st.just(tags), st.permutations(tags))), min_size=1)


@settings(deadline=None)
@given(st.lists(st.tuples(LABEL, LABEL), min_size=1, max_size=40), LABEL)
def test_classes_as_scikit_learn_judges_them(pairs, majority):
    truth, predictions = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = measure_classes(truth, predictions, majority=majority, resamples=0)
    assert found.num_examples == len(pairs)
    assert found.accuracy == pytest.approx(sklearn.accuracy_score(truth, predictions))
    assert found.macro_f1 == pytest.approx(sklearn.f1_score(truth, predictions, average="macro"))
    assert found.majority_accuracy == pytest.approx(sklearn.accuracy_score(truth, [majority] * len(truth)))


@settings(deadline=None)
@given(TAG_PAIRS)
def test_tags_as_seqeval_judges_them(pairs):
    truth, predictions = [list(pair[0]) for pair in pairs], [list(pair[1]) for pair in pairs]
    values = measure_tags(truth, predictions, resamples=0).values
    assert values["entity_f1"] == pytest.approx(seqeval.f1_score(truth, predictions, zero_division=0))
    expected = seqeval.precision_score(truth, predictions, zero_division=0)
    assert values["entity_precision"] == pytest.approx(expected)
    assert values["entity_recall"] == pytest.approx(seqeval.recall_score(truth, predictions, zero_division=0))
    assert values["word_accuracy"] == pytest.approx(seqeval.accuracy_score(truth, predictions))


def test_tags_that_are_no_entities_have_no_entity_figures():
    values = measure_tags([["NN", "VB"]], [["NN", "NN"]], resamples=0).values
    assert values == {"word_accuracy": 0.5}


def test_known_figures():
    numbers = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.5, 1.0, 4.0, 4.5])
    values = measure_numbers(*numbers, resamples=0).values
    assert values["pearson"] == pytest.approx(stats.pearsonr(*numbers).statistic)
    assert values["spearman"] == pytest.approx(stats.spearmanr(*numbers).statistic)
    assert values["r2"] == pytest.approx(sklearn.r2_score(*numbers))
    assert values["mean_absolute_error"] == pytest.approx(0.75)
    assert measure_numbers(numbers[0], np.ones(4), resamples=0).values["pearson"] == 0.0
    assert measure_similarity(*numbers, resamples=0).values["spearman"] == values["spearman"]
    assert measure_retrieval(np.array([0, 1, 0, 3]), resamples=0).values == {
        "retrieval_accuracy": 0.5,
        "mean_reciprocal_rank": (1 + 1 / 2 + 1 + 1 / 4) / 4,
    }


def label_sets(generator):
    truth = generator.random((40, 5)) < 0.3
    return truth, truth ^ (generator.random((40, 5)) < 0.2)


def test_label_sets_as_scikit_learn_judges_them():
    truth, predictions = label_sets(np.random.default_rng(0))
    values = measure_label_sets(truth, predictions, resamples=0).values
    for average in ("micro", "macro"):
        expected = sklearn.f1_score(truth, predictions, average=average)
        assert values[f"{average}_f1"] == pytest.approx(expected)
    assert values["exact_match"] == pytest.approx((truth == predictions).all(axis=1).mean())


def judge(task, generator):
    """A function that judges chosen examples of forty."""
    if task == "classes":
        truth, predictions = generator.integers(0, 4, (2, 40))
        return lambda chosen, **more: measure_classes(truth[chosen], predictions[chosen], majority=1, **more)
    if task == "label sets":
        truth, predictions = label_sets(generator)
        return lambda chosen, **more: measure_label_sets(truth[chosen], predictions[chosen], **more)
    if task == "tags":
        tags = np.array(["O", "B-x", "I-x", "B-y", "I-y"])
        truth, predictions = ([list(tags[row]) for row in generator.integers(0, 5, (40, 6))] for _ in "ab")
        return lambda chosen, **more: measure_tags(
            [truth[number] for number in chosen], [predictions[number] for number in chosen], **more
        )
    if task == "retrieval":
        ranks = generator.integers(0, 3, 40)
        return lambda chosen, **more: measure_retrieval(ranks[chosen], **more)
    truth = generator.integers(0, 6, 40).astype(float)  # with ties
    predictions = truth + generator.normal(size=40)
    measure = measure_numbers if task == "numbers" else measure_similarity
    return lambda chosen, **more: measure(truth[chosen], predictions[chosen], **more)


@pytest.mark.parametrize("task", ["classes", "label sets", "tags", "retrieval", "numbers", "similarity"])
def test_intervals_are_quantiles_of_the_figures_of_resamples(task, monkeypatch):
    """Each resample judged by the libraries, one after another, gives the same intervals."""
    measure = judge(task, np.random.default_rng(1))
    resamples = []

    def watched(statistics, num_examples, **more):
        watch = {"watch": lambda indices: resamples.extend(indices) or np.zeros(len(indices))}
        return bootstrap_intervals({**statistics, **watch}, num_examples, **more)

    monkeypatch.setattr(training_metrics, "bootstrap_intervals", watched)
    found = measure(np.arange(40), resamples=50, seed=3)
    judged = [measure(chosen, resamples=0).values for chosen in resamples]
    assert len(judged) == 50
    assert set(found.intervals) - {"watch"} == set(found.values)
    for name, value in found.values.items():
        low, high = np.quantile([values[name] for values in judged], [0.025, 0.975])
        assert found.intervals[name] == pytest.approx((low, high), abs=1e-12)
        assert low < value < high


@pytest.mark.parametrize("constant", [0.1, 0.3, 0.7, 1e-12, 5e9])
def test_of_a_constant_truth_r2_is_one_or_zero(constant):
    """The mean of twenty times the same number differs from it by a rounding error, which is no variance."""
    truth = np.full(19, constant)
    assert measure_numbers(truth, truth.copy(), resamples=0).values["r2"] == 1.0
    assert measure_numbers(truth, truth * 1.1, resamples=0).values["r2"] == 0.0
    # In a third of the resamples the twentieth number is missing.
    truth = np.append(truth, 7 * constant)
    found = measure_numbers(truth, truth * 1.1)
    assert found.intervals["r2"] == pytest.approx((0.0, found.values["r2"]), abs=0.1)


def test_intervals_depend_on_the_seed_alone():
    truth, predictions = np.random.default_rng(0).integers(0, 3, (2, 200))
    first, second, other = (
        measure_classes(truth.tolist(), predictions.tolist(), seed=seed) for seed in (1, 1, 2)
    )
    assert first == second != other


@pytest.mark.parametrize(("truth", "predictions"), [([], []), ([1], [1, 2])])
def test_nothing_to_compare(truth, predictions):
    with pytest.raises(ValueError, match="cannot be compared"):
        measure_classes(truth, predictions)
