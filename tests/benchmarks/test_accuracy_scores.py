"""Scores of the accuracy study are scikit-learn's and seqeval's, of whole and of resampled test splits."""

import numpy as np
import pytest
import seqeval.metrics
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.accuracy_study.scores import Resampling, class_counts, entity_counts, score

LABELS = 4
answers = st.lists(st.tuples(st.integers(0, LABELS - 1), st.integers(0, LABELS - 1)), min_size=1, max_size=40)
tags = st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"])
sentences = st.lists(st.lists(st.tuples(tags, tags), min_size=1, max_size=12), min_size=1, max_size=8)


@settings(deadline=None)
@given(answers)
def test_labels(pairs):
    truth, found = zip(*pairs, strict=True)
    counts = class_counts(truth, found, LABELS)
    assert score("accuracy", counts) == pytest.approx(sklearn.metrics.accuracy_score(truth, found))
    expected = sklearn.metrics.f1_score(truth, found, average="macro", zero_division=0)
    assert score("macro-F1", counts) == pytest.approx(expected)


@settings(deadline=None)
@given(sentences)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning", "ignore:.*ill-defined")
def test_entities(pairs):
    truth = [[expected for expected, _ in sentence] for sentence in pairs]
    found = [[answer for _, answer in sentence] for sentence in pairs]
    counts = entity_counts(truth, found)
    assert counts.shape == (len(pairs), 1, 3)
    assert score("entity F1", counts) == pytest.approx(
        seqeval.metrics.f1_score(truth, found, zero_division=0)
    )


def _counts(seed, num_texts=60, right=0.7):
    generator = np.random.default_rng(seed)
    truth = generator.integers(LABELS, size=num_texts)
    wrong = generator.integers(LABELS, size=num_texts)
    found = np.where(generator.random(num_texts) < right, truth, wrong)
    return truth, found, class_counts(truth.tolist(), found.tolist(), LABELS)


def test_a_resampled_score_is_that_of_the_texts_drawn():
    truth, found, counts = _counts(0)
    sampled = Resampling.of("macro-F1", [counts], set_name="set", method="method", replicates=20)
    draws = np.random.default_rng(list(b"set")).multinomial(
        len(truth), np.full(len(truth), 1 / len(truth)), size=20
    )
    for drawn, value in zip(draws, sampled.samples, strict=True):
        rows = np.repeat(np.arange(len(truth)), drawn)
        expected = sklearn.metrics.f1_score(truth[rows], found[rows], average="macro")
        assert value == pytest.approx(expected)


def test_the_interval_is_the_binomial_one():
    counts = _counts(1, num_texts=2000)[2]
    interval = Resampling.of("accuracy", [counts], set_name="set", method="method").interval()
    half = 1.96 * (interval.value * (1 - interval.value) / 2000) ** 0.5
    assert interval.low == pytest.approx(interval.value - half, abs=0.004)
    assert interval.high == pytest.approx(interval.value + half, abs=0.004)


def test_seeds_widen_the_interval():
    good, bad = _counts(2, 2000, 0.9)[2], _counts(2, 2000, 0.5)[2]
    one, both = (
        Resampling.of("accuracy", seeds, set_name="set", method="method").interval()
        for seeds in ([good], [good, bad])
    )
    assert both.value == pytest.approx((score("accuracy", good) + score("accuracy", bad)) / 2)
    assert both.high - both.low > 5 * (one.high - one.low)


def test_differences_are_paired():
    counts = _counts(3)[2]
    first, second = (
        Resampling.of("accuracy", [counts], set_name="set", method=method) for method in ("one", "other")
    )
    difference = first.minus(second).interval()
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert Resampling.mean([first, second]).value == pytest.approx(first.value)
