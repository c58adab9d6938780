"""Training a tenant from labelled texts, on the random BERT."""

from itertools import pairwise

import pytest
import torch

from hmi_engine.construct import training_cache
from hmi_engine.construct.training import TrainingReport, TrainingSettings, train_tenant
from hmi_engine.errors import (
    InvalidAdapterError,
    TrainingDataError,
    TrainingDivergedError,
    UnknownDomainError,
)
from hmi_engine.knowledge.examples import Example
from hmi_engine.memory.plots import PlotLibrary

QUICK = {"max_epochs": 2, "batch_size": 16, "rank": 4}


@pytest.fixture
def train(make_store, topic_examples):
    """Trains in a store whose domain was made from the training texts."""

    def run(
        examples=None,
        test_examples=(),
        *,
        window=2,
        plot_layers=2,
        progress=None,
        domain="topics",
        **settings,
    ):
        store = make_store(plot_layers=plot_layers, window=window)
        chosen = topic_examples(90, seed=1) if examples is None else examples
        if plot_layers:
            store.add_domain("topics", [example.text for example in chosen] or ["the cell"])
        return train_tenant(
            general=store.general,
            model=store.model,
            encoder=store.encoder,
            plots=PlotLibrary(store.layout, store.catalog, store.general) if plot_layers else None,
            domain=domain,
            examples=chosen,
            test_examples=test_examples,
            settings=TrainingSettings(**{**QUICK, **settings}),
            progress=progress,
        )

    return run


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_learns_what_can_be_learned(train, topic_examples, kind):
    examples = topic_examples(360, seed=1)
    seen = {example.text for example in examples}
    new = [example for example in topic_examples(120, seed=2) if example.text not in seen]
    trained = train(examples, new, kind=kind, rank=8, max_epochs=12, learning_rate=5e-3)
    report = trained.report
    assert report.test.accuracy > report.test.majority_accuracy + 0.3
    assert report.test.accuracy > 0.7
    assert report.labels == trained.head.labels == ("biology", "computing", "numbers")
    assert trained.adapter.kind == kind
    assert trained.adapter.layers == (2, 3)
    assert report.num_parameters == trained.adapter.num_parameters + 3 * 32 + 3
    assert 0 < report.hit_rates.cross_fitted < report.hit_rates.looked_up
    assert report.hit_rates.texts_in_corpus == 360
    assert report.test_hit_rates.cross_fitted == report.test_hit_rates.looked_up


@pytest.mark.parametrize(
    "settings",
    [
        {"miss": "exact"},
        {"pooling": "mean"},
        {"plot_layers": 0},
        {"window": 3},
        {"window": 3, "miss": "exact"},
        {"layers": (3,), "kind": "lora"},
    ],
    ids=str,
)
def test_variants(train, topic_examples, settings):
    trained = train(test_examples=topic_examples(20, seed=3), **settings)
    assert trained.report.test.num_examples == 20
    assert (trained.report.hit_rates is None) == ("miss" in settings or settings.get("plot_layers") == 0)
    assert trained.head.pooling == settings.get("pooling", "cls")
    assert trained.adapter.layers[-1] == 3


def test_a_label_with_a_single_example_is_learned(train, topic_examples):
    """Nothing is left of it to validate, which the report says."""
    trained = train([*topic_examples(90, seed=1), Example("nothing of all that", "other")])
    assert trained.head.labels == ("biology", "computing", "numbers", "other")
    assert trained.report.unvalidated_labels == ("other",)


def tensors(trained):
    blocks = [tensor for _, block in trained.adapter.ordered_blocks() for tensor in block.tensors().values()]
    return [*blocks, trained.head.weight, trained.head.bias]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_seed_decides_everything(train, dropout):
    first, second, other = (train(seed=seed, dropout=dropout) for seed in (3, 3, 4))
    assert all(map(torch.equal, tensors(first), tensors(second)))
    assert first.report.history == second.report.history
    assert not all(map(torch.equal, tensors(first), tensors(other)))


def test_the_best_epoch_is_kept(train, topic_examples):
    """A learning rate that destroys what was learned: an early epoch is the best, the rest is undone."""
    examples = topic_examples(90, seed=1)
    trained = train(examples, test_examples=examples, learning_rate=0.5, max_epochs=12, warmup_fraction=0.5)
    history, best = trained.report.history, trained.report.best_epoch
    ranks = [(epoch.metrics["accuracy"], -epoch.validation_loss) for epoch in history]
    assert ranks.index(max(ranks)) == best < len(history) - 1
    assert len(history) < 12
    assert trained.report.validation.accuracy == history[best].metrics["accuracy"]
    assert trained.report.validation.macro_f1 == history[best].metrics["macro_f1"]


def test_patience(train):
    """The last epochs bettered nothing, and no earlier run of that many did."""
    for patience in (1, 3):
        history = train(learning_rate=0.5, max_epochs=30, patience=patience).report.history
        accuracies = [epoch.metrics["accuracy"] for epoch in history]
        losses = [epoch.validation_loss for epoch in history]
        better = [
            number
            for number in range(len(history))
            if number == 0
            or accuracies[number] > max(accuracies[:number])
            or losses[number] < min(losses[:number])
        ]
        assert len(history) == better[-1] + 1 + patience < 30
        assert all(after - before <= patience for before, after in pairwise(better))


def test_without_memory_for_the_halfway_states(train, monkeypatch):
    with_memory = train(max_epochs=1)
    monkeypatch.setattr(training_cache, "MAX_HALFWAY_BYTES", 0)
    without = train(max_epochs=1)
    for found, expected in zip(tensors(without), tensors(with_memory), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


def test_a_diverged_training_is_refused(train):
    with pytest.raises(TrainingDivergedError, match=r"NaN at step 2 .*learning rate"):
        train(learning_rate=1e30, max_epochs=1)


def test_what_the_settings_leave_open_is_reported(train):
    settings = train(batch_size=None, patience=None).report.settings
    assert (settings.batch_size, settings.max_epochs, settings.patience) == (8, 2, 2)


def test_report_survives_json(train, topic_examples):
    report = train(test_examples=topic_examples(20, seed=3)).report
    assert TrainingReport.model_validate_json(report.model_dump_json()) == report
    assert report.num_training + report.validation.num_examples == 90
    assert len(report.data_sha256) == 64
    assert report.seconds > 0


def test_progress(train):
    calls = []
    report = train(progress=lambda *call: calls.append(call)).report
    stages = [call[0] for call in calls]
    assert list(dict.fromkeys(stages)) == ["caching hidden states", "training"]
    training = [call for call in calls if call[0] == "training"]
    steps = -(-report.num_training // 16)
    assert [call[1] for call in training] == list(range(1, 2 * steps + 1))
    assert {call[2] for call in training} == {2 * steps}
    assert set(training[0][3]) == {"loss"}
    assert training[-1][3]["accuracy"] == report.history[0].metrics["accuracy"]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no classification examples"),
        ([Example("the cell", "one", line) for line in range(9)], "needs two labels"),
        ([Example("the cell", label, 1) for label in ("a", "b")], "labels has a single example"),
    ],
)
def test_bad_examples(train, examples, message):
    with pytest.raises(TrainingDataError, match=message):
        train(examples)


def test_unknown_test_label(train):
    with pytest.raises(TrainingDataError, match="'poetry'"):
        train(test_examples=[Example("the cell", "poetry", 1)])


def test_settings_that_do_not_fit(train):
    with pytest.raises(InvalidAdapterError, match="layer 1"):
        train(layers=(1,))
    with pytest.raises(InvalidAdapterError, match="activation"):
        train(activation="square")
    with pytest.raises(UnknownDomainError):
        train(domain="nowhere")


@pytest.mark.parametrize(
    "field", [{"rank": 0}, {"layers": ()}, {"folds": 1}, {"max_tokens": 2}, {"miss": "never"}, {"epochs": 3}]
)
def test_impossible_settings(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        TrainingSettings(**field)


def test_missing_tables(make_store, topic_examples):
    store = make_store()
    with pytest.raises(ValueError, match="plots is None"):
        train_tenant(
            general=store.general,
            model=store.model,
            encoder=store.encoder,
            plots=None,
            domain="general",
            examples=topic_examples(9, seed=0),
            settings=TrainingSettings(),
        )
