"""The card that a training leaves in the store, and what a failed training leaves: nothing."""

from pathlib import Path

import pytest
import torch

import hmi_engine as hmi
from hmi_engine.construct import training_loop
from hmi_engine.construct.model_card import ModelCard
from hmi_engine.construct.model_card_text import card_markdown
from hmi_engine.construct.training import SearchSpace, TrainingSettings
from hmi_engine.errors import (
    InvalidRequestError,
    MissingDependencyError,
    TrainingDataError,
    TrainingDivergedError,
    TrainingMemoryError,
    UnknownTenantError,
)
from hmi_engine.knowledge.examples import Example

QUICK = TrainingSettings(max_epochs=1, rank=4)


@pytest.fixture
def train(make_store, topic_examples):
    """Trains a tenant ``t`` in a store of its own, which it returns too."""
    store = make_store()
    store.add_domain("topics", ["the cell binds"] * 3)

    def run(**options):
        arguments = {
            "examples": topic_examples(60, seed=1),
            "test_examples": topic_examples(20, seed=2),
            "domain": "topics",
            "settings": QUICK,
        }
        trained = store.train_tenant("t", **arguments | options)
        return store, trained

    run.store = store
    return run


def test_the_card_tells_what_was_done(train):
    store, trained = train(
        search_space=SearchSpace(learning_rates=(1e-3, 1e-2), ranks=(2, 4), budget_steps=12)
    )
    card = store.tenant_card("t")
    report = card.training
    assert report == trained.report
    assert (card.tenant, card.domain, card.plot_layers, card.window) == ("t", "topics", 2, 2)
    assert len(card.base_sha256) == len(report.data_sha256) == len(report.test_sha256) == 64
    assert set(report.test.intervals) == set(report.test.values)
    assert report.settings.rank == trained.adapter.rank in (2, 4)
    assert report.settings.learning_rate in (1e-3, 1e-2)
    assert len(report.search.trials) == 4 + 2
    assert card.versions.packages["torch"] == torch.__version__
    assert ModelCard.model_validate_json(card.model_dump_json()) == card
    text = card_markdown(card)
    for value in (card.base_sha256, report.data_sha256, "| accuracy |", "biology, computing, numbers"):
        assert value in text
    assert f"{report.test.accuracy:.3f} ({report.test.intervals['accuracy'][0]:.3f} to" in text


def test_a_card_is_replaced_and_removed_with_its_tenant(train, make_head):
    store, _ = train()
    first = store.tenant_card("t")
    train(replace=True, settings=TrainingSettings(max_epochs=1, rank=4, seed=5))
    assert store.tenant_card("t").training.settings.seed == 5 != first.training.settings.seed
    store.add_tenant(
        "t", domain="topics", adapter=hmi.Adapter({}), head=make_head(store.general), replace=True
    )
    assert store.tenant_card("t") is None
    store.remove_tenant("t")
    with pytest.raises(UnknownTenantError):
        store.tenant_card("t")


def test_given_validation_examples_choose_the_best_epoch(train, topic_examples):
    _, trained = train(validation_examples=topic_examples(17, seed=3))
    assert trained.report.num_training == 60
    assert trained.report.validation.num_examples == 17


def test_cut_texts_are_counted(train, topic_examples):
    _, trained = train(settings=TrainingSettings(max_epochs=1, max_tokens=7))
    texts = [example.text for example in topic_examples(20, seed=2)]
    assert trained.report.test_num_cut == sum(len(text.split()) + 2 > 7 for text in texts) > 0
    assert trained.report.num_cut > 0


def contents(store):
    return {path: path.read_bytes() for path in Path(store.layout.tenants).rglob("*") if path.is_file()}


def assert_nothing_is_left(store):
    assert list(store.tenants) == []
    assert contents(store) == {}
    assert store.verify() == []


def test_a_diverged_training_leaves_nothing(train):
    with pytest.raises(TrainingDivergedError, match="NaN"):
        train(settings=TrainingSettings(max_epochs=1, learning_rate=1e30))
    assert_nothing_is_left(train.store)


def test_the_last_good_epoch_survives_a_divergence(train, monkeypatch):
    """The loss is NaN from the second epoch's second batch on: what the first one learned is served."""
    step = training_loop._Optimizer.step

    def faulty(self, loss):
        return step(self, loss * float("nan") if self.steps == 5 else loss)

    monkeypatch.setattr(training_loop._Optimizer, "step", faulty)
    settings = TrainingSettings(max_epochs=3, rank=4, batch_size=16)
    _, trained = train(settings=settings)
    steps_per_epoch = -(-trained.report.num_training // 16)
    assert steps_per_epoch == 4
    assert trained.report.divergence.startswith("the loss became infinite or NaN at step 6 (batch 2 of")
    assert len(trained.report.history) == 1 and trained.report.best_epoch == 0
    assert trained.report.validation.values["accuracy"] == trained.report.history[0].metrics["accuracy"]
    assert train.store.tenant_card("t").training.divergence == trained.report.divergence


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_no_memory(train, monkeypatch, error):
    def full(self, loss):
        raise error

    monkeypatch.setattr(training_loop._Optimizer, "step", full)
    with pytest.raises(TrainingMemoryError, match=r"step 1 with batch_size=8 .*--batch-size or --max-tokens"):
        train()
    assert_nothing_is_left(train.store)


def test_other_faults_stay_what_they_are(train, monkeypatch):
    def broken(self, loss):
        raise RuntimeError("a fault")

    monkeypatch.setattr(training_loop._Optimizer, "step", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": []}, "no classification examples"),
        ({"test_examples": [Example("the", "poetry")]}, "'poetry'"),
        ({"validation_examples": [Example("the", "poetry")]}, "'poetry'"),
        ({"settings": TrainingSettings(task="token_classification")}, "TaggedExample"),
    ],
)
def test_bad_examples_leave_nothing(train, options, message):
    with pytest.raises(TrainingDataError, match=message):
        train(**options)
    assert_nothing_is_left(train.store)


def test_without_the_extra(train, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"hmi\[train\]"):
        train()


def test_evaluation_refuses_what_the_head_cannot_say(train, make_head):
    store, _ = train()
    with hmi.Engine(store) as engine:
        with pytest.raises(
            TrainingDataError, match=r"line 3: tenant 't' has no label 'poetry'; it has biology"
        ):
            hmi.evaluate_tenant(engine, "t", [Example("the cell", "poetry", 3)])
        with pytest.raises(TrainingDataError, match="no classification examples"):
            hmi.evaluate_tenant(engine, "t", [])
        with pytest.raises(UnknownTenantError):
            hmi.evaluate_tenant(engine, "nobody", [Example("the cell", "biology")])
        for seed in (-1, 2**63):
            with pytest.raises(InvalidRequestError, match="the seed must be from 0"):
                hmi.evaluate_tenant(engine, "t", [Example("the cell", "biology")], seed=seed)
