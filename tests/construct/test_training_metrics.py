"""Accuracy and macro-F1 against scikit-learn."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from hmi_engine.construct.training_metrics import evaluate

LABEL = st.integers(0, 4)


@settings(deadline=None)
@given(st.lists(st.tuples(LABEL, LABEL), min_size=1, max_size=40), LABEL)
def test_equal_to_scikit_learn(pairs, majority):
    truth, predictions = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    metrics = evaluate(truth, predictions, majority)
    assert metrics.num_examples == len(pairs)
    assert metrics.accuracy == pytest.approx(accuracy_score(truth, predictions))
    assert metrics.macro_f1 == pytest.approx(f1_score(truth, predictions, average="macro"))
    assert metrics.majority_accuracy == pytest.approx(accuracy_score(truth, [majority] * len(truth)))


@pytest.mark.parametrize(("truth", "predictions"), [([], []), ([1], [1, 2])])
def test_nothing_to_compare(truth, predictions):
    with pytest.raises(ValueError, match="cannot be compared"):
        evaluate(truth, predictions, 0)
