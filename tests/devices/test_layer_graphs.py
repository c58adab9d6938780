"""Layers as graphs: the answers of engines without them, and when graphs are made."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import hmi_engine as hmi
from devices.deferred_engines import memory_for
from devices.deferred_streams import DeferredStreams
from hmi_engine.pipeline import layer_graphs
from hmi_engine.pipeline.layer_graphs import LayerGraphs

pytestmark = pytest.mark.usefixtures("plain_products")

OPTIONS = {"record_traffic": False, "max_batch_tokens": 60, "device_memory": "64MiB"}


@pytest.fixture
def open_engine(store, monkeypatch):
    """A function: an engine on deferred streams of a seed, and the streams."""

    @contextmanager
    def opened(seed=0, **options):
        streams = DeferredStreams(seed)
        monkeypatch.setattr("hmi_engine.serving_core.open_streams", lambda name: streams)
        with hmi.Engine(store, **OPTIONS | options) as engine:
            yield engine, streams

    return opened


@pytest.fixture
def captures(monkeypatch):
    """A list that grows with the shape of each capture."""
    capture, shapes = LayerGraphs._capture, []

    def noting(graphs, shape, captured):
        shapes.append(shape)
        capture(graphs, shape, captured)

    monkeypatch.setattr(LayerGraphs, "_capture", noting)
    return shapes


READ_FIRST = ("t0", "t4", "t6", "t10")
"""Tenants whose heads read the first token, or the pooler, alone."""


def answers(store, requests):
    with hmi.Engine(store, record_traffic=False) as engine:
        return engine.run(requests)


def test_the_second_batch_of_a_shape_is_captured_and_later_ones_are_not(
    store, mixed_requests, open_engine, captures, same
):
    requests = mixed_requests(1)
    wanted = answers(store, requests)
    with open_engine() as (engine, streams):
        for number, (made, replays) in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
            same(engine.run(requests), wanted)
            layers = store.general.num_upper_layers
            assert (len(captures), streams.num_replays) == (made, replays * layers), number


@pytest.mark.parametrize("first_only", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_heads_of_either_kind(store, mixed_requests, open_engine, captures, same, seed, first_only):
    requests = [each for each in mixed_requests(60) if not first_only or each.tenant in READ_FIRST]
    wanted = answers(store, requests)
    with open_engine(seed, pipeline_depth=3) as (engine, _):
        for _ in range(3):
            same(engine.run(requests), wanted)
    assert {shape.reads_first for shape in captures} >= {first_only}


def test_graphs_follow_what_tenants_bring(store, mixed_requests, open_engine, captures, same):
    """Kinds of adapters come one after another, each at places where there was nothing before."""
    requests = mixed_requests(24)
    wanted = answers(store, requests)
    with open_engine() as (engine, _):
        for request, answer in zip(requests, wanted, strict=True):
            same(engine.run([request]), [answer])
        captures.clear()
        for request, answer in zip(requests, wanted, strict=True):
            same(engine.run([request]), [answer])
        assert len(captures) == len(set(captures)), "places and ranks are known by now"


def test_shapes_beyond_the_most_are_captured_anew(
    store, mixed_requests, open_engine, captures, same, monkeypatch
):
    requests = mixed_requests(20)
    wanted = answers(store, requests)
    monkeypatch.setattr(layer_graphs, "MOST_SHAPES", 2)
    with open_engine(max_batch_tokens=200) as (engine, _):
        for count in (1, 20, 1, 1, 20, 20, 8, 8, 1, 1):
            same(engine.run(requests[:count]), wanted[:count])
        assert len(engine._core.runner._computer._graphs._captured) <= 2
    assert len(captures) > len(set(captures))


def test_larger_batches_and_unwanted_graphs(store, mixed_requests, open_engine, captures, same):
    long = hmi.Request("t0", text=" ".join(each.text for each in mixed_requests(20)))
    wanted = answers(store, [long])
    for options in ({"max_batch_tokens": 1}, {"device_graphs": False}):
        with open_engine(**options) as (engine, streams):
            for _ in range(3):
                same(engine.run([long]), wanted)
            assert not captures and not streams.num_replays and streams.num_run


def test_where_layers_cannot_be_captured_they_are_launched(
    store, mixed_requests, open_engine, same, monkeypatch, caplog
):
    requests = mixed_requests(30)
    wanted = answers(store, requests)

    def refuse(streams, stream, work):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(DeferredStreams, "capture", refuse)
    with open_engine(pipeline_depth=3) as (engine, streams):
        for _ in range(3):
            same(engine.run(requests), wanted)
        assert not streams.num_replays
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not permitted" in caplog.text


def forget_tables(monkeypatch):
    """A graph reads the segments and offsets of the batch that it was captured of."""
    run = LayerGraphs.run

    def stale(graphs, sent, hidden_states, arriving):
        captured = graphs._captured.get(sent.shape)
        if captured is not None and captured.graphs:
            sent = sent._replace(tables=captured.tables)
        return run(graphs, sent, hidden_states, arriving)

    monkeypatch.setattr(LayerGraphs, "run", stale)


def forget_the_form(monkeypatch):
    """Graphs that were captured before a tenant brought a place run for it too."""
    monkeypatch.setattr("hmi_engine.memory.adapter_batch.AdapterBatch.form", property(lambda batch: ()))


def reuse_tables_early(monkeypatch):
    """The next batch's tables are sent to where those of the batch before still are read."""
    send = LayerGraphs.send

    def shared(graphs, searched, slot):
        slot.graph_tables = graphs.__dict__.setdefault("shared", slot.graph_tables)
        return send(graphs, searched, slot)

    monkeypatch.setattr(LayerGraphs, "send", shared)


@pytest.mark.parametrize("mistake", [forget_tables, forget_the_form, reuse_tables_early])
def test_each_mistake_is_seen(store, mixed_requests, open_engine, same, monkeypatch, mistake):
    requests = mixed_requests(30)
    wanted = answers(store, requests)
    mistake(monkeypatch)
    for seed in range(12):
        try:
            options = {"pipeline_depth": 3, "device_memory": memory_for(store, 0.5)}
            with open_engine(seed, **options) as (engine, _), torch.no_grad():
                for _ in range(3):
                    same(engine.run(requests), wanted)
        except (AssertionError, ValueError, IndexError, RuntimeError):
            return
    pytest.fail(f"nobody noticed: {mistake.__doc__}")
