"""Tenants trained together: each as alone, whatever becomes of the others."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from hmi_engine.construct import joint_loop
from hmi_engine.construct.joint_training import TenantExamples, train_tenants
from hmi_engine.construct.packed_batch import PackedBatch
from hmi_engine.construct.stacked_optimizer import StackedOptimizer
from hmi_engine.construct.stacked_tenants import ParameterTable
from hmi_engine.construct.trainable_adapter import TrainableAdapter
from hmi_engine.construct.trainable_layers import TrainableLayers
from hmi_engine.construct.training import TrainingBase, TrainingSettings, train_tenant
from hmi_engine.construct.training_cache import HiddenStateCache
from hmi_engine.construct.training_data import WordPlaces
from hmi_engine.construct.training_loop import learning_rate_factor
from hmi_engine.errors import (
    HmiError,
    InvalidNameError,
    TenantExistsError,
    TrainingDataError,
    TrainingDivergedError,
)
from hmi_engine.knowledge.examples import Example, PairExample, ScoredPairExample, TaggedExample
from hmi_engine.memory.plots import PlotLibrary

QUICK = {"max_epochs": 2, "batch_size": 16, "rank": 4}
# Their order of sums differs (packed and padded batches); Adam's first steps are all sign, which tells.
CLOSE = {"atol": 2e-3, "rtol": 2e-2}


@pytest.fixture
def base(make_store, topic_examples):
    """A domain made from some of the training texts."""
    store = make_store()
    store.add_domain("topics", [example.text for example in topic_examples(60, seed=1)])
    plots = PlotLibrary(store.layout, store.catalog, store.general)
    return TrainingBase(store.general, store.model, store.encoder, plots, "topics", None)


def alone(base, tenant):
    return train_tenant(
        general=base.general,
        model=base.model,
        encoder=base.encoder,
        plots=base.plots,
        domain=base.domain,
        examples=tenant.examples,
        validation_examples=tenant.validation_examples,
        test_examples=tenant.test_examples,
        settings=tenant.settings,
    )


def tenant(name, examples, test_examples=(), **settings):
    return TenantExamples(
        name, examples, test_examples=test_examples, settings=TrainingSettings(**{**QUICK, **settings})
    )


def tensors(trained):
    blocks = [value for _, block in trained.adapter.ordered_blocks() for value in block.tensors().values()]
    return [*blocks, *trained.head.tensors().values()]


def assert_same(found, expected):
    assert len(found.report.history) == len(expected.report.history)
    assert found.report.best_epoch == expected.report.best_epoch
    for one, other in zip(found.report.history, expected.report.history, strict=True):
        assert one.training_loss == pytest.approx(other.training_loss, rel=1e-3)
        assert one.validation_loss == pytest.approx(other.validation_loss, rel=1e-3)
    assert found.report.validation.values == pytest.approx(expected.report.validation.values, abs=0.05)
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "bottleneck"},
        {"kind": "double_seq_bn", "activation": "relu"},
        {"kind": "lora", "pooling": "mean"},
        {"kind": "ia3"},
        {"kind": "bitfit"},
        {"class_weights": "balanced", "label_smoothing": 0.1, "miss": "exact"},
    ],
    ids=str,
)
def test_as_the_loop_for_one_tenant(base, topic_examples, settings):
    many = [
        tenant("first", topic_examples(60, seed=1), topic_examples(20, seed=9), **settings),
        tenant("second", topic_examples(44, seed=2), seed=5, **settings),
    ]
    for given, outcome in train_tenants(base, many):
        expected = alone(base, given)
        assert_same(outcome, expected)
        assert outcome.report.data_sha256 == expected.report.data_sha256
        if given.test_examples:
            assert outcome.report.test.num_examples == 20


def test_dropout_is_the_same_for_all_of_a_batch(base, topic_examples):
    """Tenants with another dropout are trained apart, and the same seeds give the same tenants."""
    many = [
        tenant(name, topic_examples(40, seed=number), dropout=dropout)
        for number, (name, dropout) in enumerate({"a": 0.1, "b": 0.1, "c": 0.0}.items())
    ]
    first, second = ({given.name: each for given, each in train_tenants(base, many)} for _ in range(2))
    for name in first:
        assert all(map(torch.equal, tensors(first[name]), tensors(second[name])))
    assert_same(first["c"], alone(base, many[2]))


def test_words_are_tagged(base):
    def sentence(number):
        words = tuple(f"protein binds gene {'cell' if number % 2 else 'the'}".split())
        return TaggedExample(words, ("B-X", "O", "B-Y" if number % 3 else "O", "O"))

    settings = {"task": "token_classification"}
    many = [
        tenant("first", [sentence(number) for number in range(30)], **settings),
        tenant("second", [sentence(number) for number in range(7, 29)], **settings),
    ]
    for given, outcome in train_tenants(base, many):
        assert_same(outcome, alone(base, given))


def test_company_changes_nothing(base, topic_examples, monkeypatch):
    """Of other sizes, rates and lengths of training, some leaving early, in passes of any size."""
    first = tenant("first", topic_examples(50, seed=1), max_epochs=4, batch_size=None, patience=None)
    others = [
        tenant("short", topic_examples(24, seed=2), max_epochs=1),
        tenant("fast", topic_examples(70, seed=3), learning_rate=0.02, batch_size=8),
        tenant("impatient", topic_examples(40, seed=4), learning_rate=0.5, patience=1, max_epochs=6),
        tenant("two labels", [e for e in topic_examples(60, seed=5) if e.label != "numbers"]),
        tenant("wide", topic_examples(30, seed=6), rank=8),
    ]
    expected = dict(train_tenants(base, [first]))[first]
    for tokens in (8192, 300):
        monkeypatch.setattr(joint_loop, "TOKENS_PER_PASS", tokens)
        outcomes = {given.name: outcome for given, outcome in train_tenants(base, [*others, first])}
        assert set(outcomes) == {"first", *(other.name for other in others)}
        assert_same(outcomes["first"], expected)
        assert len(outcomes["short"].report.history) == 1
        assert outcomes["wide"].adapter.rank == 8
        assert outcomes["two labels"].head.weight.shape[0] == 2


def test_one_at_a_time_is_the_same(base, topic_examples):
    many = [tenant(str(seed), topic_examples(30, seed=seed), max_epochs=1) for seed in range(3)]
    together = {given.name: outcome for given, outcome in train_tenants(base, many)}
    for given, outcome in train_tenants(base, many, together=1):
        assert_same(outcome, together[given.name])
    with pytest.raises(ValueError, match="together"):
        next(train_tenants(base, many, together=0))


def test_failures_stay_with_their_tenants(make_store, topic_examples):
    store = make_store()
    store.add_domain("topics", ["the cell binds"])
    good = topic_examples(40, seed=1)
    many = [
        tenant("diverges", topic_examples(40, seed=2), learning_rate=1e30),
        tenant("one-label", [Example("the cell", "biology")] * 9),
        tenant("good", good),
        tenant("bad/../name", good),
        tenant("layers", good, layers=(0,)),
        tenant("nothing", []),
    ]
    outcomes = store.train_tenants(many, domain="topics")
    assert list(outcomes) == [given.name for given in many]
    assert isinstance(outcomes["diverges"], TrainingDivergedError)
    assert "step" in str(outcomes["diverges"])
    assert isinstance(outcomes["one-label"], TrainingDataError)
    assert isinstance(outcomes["bad/../name"], InvalidNameError)
    assert isinstance(outcomes["layers"], HmiError)
    assert isinstance(outcomes["nothing"], TrainingDataError)
    assert set(store.tenants) == {"good"}
    plots = PlotLibrary(store.layout, store.catalog, store.general)
    base = TrainingBase(store.general, store.model, store.encoder, plots, "topics", None)
    assert_same(outcomes["good"], alone(base, many[2]))

    again = store.train_tenants([tenant("good", good)], domain="topics")
    assert isinstance(again["good"], TenantExistsError)
    replaced = store.train_tenants([tenant("good", good, rank=8)], domain="topics", replace=True)
    assert not isinstance(replaced["good"], HmiError)
    assert store.tenants["good"].rank == 8
    with pytest.raises(ValueError, match="one name"):
        store.train_tenants([tenant("good", good)] * 2, domain="topics")


def test_held_out_sets_of_pairs_and_scored_pairs(base, topic_examples):
    """No one figure judges both: that is told before the training, and the others are trained."""
    texts = [example.text for example in topic_examples(24, seed=1)]
    pairs = [PairExample(first, second) for first, second in pairwise(texts)]
    scored = [ScoredPairExample(first, second, float(len(first))) for first, second in pairwise(texts)]
    settings = TrainingSettings(**QUICK, task="embedding")
    held_out = {
        "validation": (scored[:4] + pairs[:4], ()),
        "test": ((), scored[:4] + pairs[:4]),
        "each of one kind": (pairs[:8], scored[:8]),
    }
    many = [TenantExamples(name, pairs, *sets, settings) for name, sets in held_out.items()]
    told = []
    heard = replace(base, progress=lambda stage, *counts: told.append(stage))
    outcomes = {given.name: outcome for given, outcome in train_tenants(heard, many[:2])}
    assert not told
    for name in ("validation", "test"):
        assert isinstance(outcomes[name], TrainingDataError)
        assert f"the {name} set is of pairs or of scored pairs" in str(outcomes[name])
    outcomes = {given.name: outcome for given, outcome in train_tenants(base, many)}
    report = outcomes["each of one kind"].report
    assert report.best_by == "retrieval_accuracy" and list(report.test.values) == ["spearman"]


def test_progress_counts_all_steps(base, topic_examples):
    told = []
    heard = TrainingBase(
        base.general,
        base.model,
        base.encoder,
        base.plots,
        base.domain,
        lambda stage, done, total, metrics: told.append((stage, done, total, metrics)),
    )
    many = [tenant(str(seed), topic_examples(30, seed=seed), max_epochs=1) for seed in range(2)]
    list(train_tenants(heard, many))
    steps = [call for call in told if call[0] == "training"]
    assert steps[-1][1] == steps[-1][2] == 2 * 2
    assert all(math.isfinite(call[3]["loss"]) for call in steps)


@pytest.mark.parametrize("reading", ["cls", "mean", "words"])
def test_packed_rows_and_gradients_equal_dense_ones(make_store, reading):
    store = make_store(plot_layers=0)
    generator = torch.Generator().manual_seed(1)
    adapter = TrainableAdapter(store.general, kind="lora", rank=3, layers=(2, 3), generator=generator)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    lengths = (5, 2, 5, 9, 1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    states = HiddenStateCache(
        torch.randn(sum(lengths), 32, generator=generator),
        offsets,
        [[7] * length for length in lengths],
        None,
    )
    words = WordPlaces(torch.tensor([0, 0, 3, 4]), torch.tensor([1, 4, 8, 0])) if reading == "words" else None
    layers = TrainableLayers(store.model, adapter)
    packed = PackedBatch.pack([(0, states, number) for number in range(len(lengths))])
    found = []
    for batch in (packed, states.dense(range(len(lengths)))):
        rows = layers.read(batch, reading, words)
        found.append([rows, *torch.autograd.grad(rows.sin().sum(), list(adapter.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_optimizer_equals_torch_for_each_row():
    """Three modules of different sizes, rates and decays; one stops, and one has bad gradients at the end."""
    torch.manual_seed(0)
    modules = [nn.Linear(6, outputs) for outputs in (2, 3, 1)]
    table = ParameterTable(modules)
    optimizer = StackedOptimizer([table], max_norm=0.5)
    rates, decays, stops = torch.tensor([1e-2, 3e-3, 2e-2]), torch.tensor([0.1, 0.0, 0.01]), (8, 8, 4)
    references = [
        torch.optim.AdamW(
            [
                {"params": [module.weight], "weight_decay": float(decay)},
                {"params": [module.bias], "weight_decay": 0.0},
            ]
        )
        for module, decay in zip(modules, decays, strict=True)
    ]

    def draw_gradients():
        table.rows.grad = torch.zeros_like(table.rows)
        for slot, module in enumerate(modules):
            own = table.parameters_of(table.rows.grad[slot], slot)
            for name, parameter in module.named_parameters():
                parameter.grad = torch.randn_like(parameter) * 3
                own[name].copy_(parameter.grad)

    for step in range(8):
        draw_gradients()
        factor = learning_rate_factor(step, 8, 0.2)
        is_on = torch.tensor([step < stop for stop in stops])
        assert optimizer.step(rates * factor * is_on, decays).all()
        for slot, (module, reference) in enumerate(zip(modules, references, strict=True)):
            if step < stops[slot]:
                nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                for group in reference.param_groups:
                    group["lr"] = float(rates[slot]) * factor
                reference.step()
            for name, parameter in module.named_parameters():
                torch.testing.assert_close(table.detached(slot)[name], parameter, atol=1e-6, rtol=1e-5)

    draw_gradients()
    table.rows.grad[1, 0] = torch.nan
    before = table.rows.detach().clone()
    assert optimizer.step(rates, decays).tolist() == [True, False, True]
    assert torch.equal(table.rows[1], before[1])
    assert table.rows.isfinite().all()
    assert not torch.equal(table.rows[0], before[0])


def test_command_line(make_store, topic_examples, tmp_path):
    from typer.testing import CliRunner

    from hmi_engine.cli import app

    store = make_store()
    store.add_domain("topics", ["the cell binds"])
    path = store.layout.root
    store.close()
    for number in range(2):
        lines = [
            json.dumps({"text": example.text, "label": example.label})
            for example in topic_examples(40, seed=number)
        ]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    rows = [
        {"name": f"tenant-{number}", "data": f"{number}.jsonl", "settings": {"max_epochs": 1, "rank": 4}}
        for number in range(2)
    ]
    manifest = tmp_path / "tenants.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    command = ["tenant", "train-many", str(path), "--manifest", str(manifest), "--domain", "topics"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    rows.append({"name": "missing", "data": "nowhere.jsonl"})
    rows.append({"name": "odd", "data": "0.jsonl", "settings": {"rank": -1}})
    manifest.write_text("\n".join(map(json.dumps, rows)))
    done = CliRunner().invoke(app, [*command, "--replace"])
    assert done.exit_code == 1, done.output
    assert "missing" in done.output and "rank" in done.output
    for bad, message in (("{", "line 1"), ("", "names no tenant"), (json.dumps({"name": "x"}), "data")):
        manifest.write_text(bad)
        done = CliRunner().invoke(app, command)
        assert done.exit_code != 0
        assert message in done.output + str(done.exception)
