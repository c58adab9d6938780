"""Rows that are sent, and tables that lie on the device, merge as those in host memory do."""

from __future__ import annotations

import gc

import pytest
import torch

from hmi_engine.memory.device_rows import DeviceRows
from hmi_engine.memory.plot_view import merge_rows
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.memory.streams import HostStreams
from hmi_engine.models.packing import PackedSequences


def lay_out(shapes):
    tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    return [(tensor, tensor) for tensor in tensors]


@pytest.fixture(params=[None, "int8"], ids=["floats", "int8"])
def domain(request, store, corpus):
    """A domain whose rows are of a format, below one whose rows are floats."""
    name = f"own-{request.param}"
    if name not in store.domains:
        own = corpus[:100] + ["results show"] * 9
        store.add_domain(name, own, parent="words", row_format=request.param)
    return name


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_merges_as_from_host_memory(store, domain, make_sentences, budget):
    sequences = PackedSequences.pack(store.encoder.token_ids(make_sentences(12, seed=5)))
    domains = [domain, "words"] * 6
    rows = DeviceRows(HostStreams(), budget)
    plots = PlotLibrary(store.layout, store.catalog, store.general)
    with plots.reading(domains) as view:
        references = view.lookup(sequences, domains)
        before = references.clone()
        expected = view.merge(store.model, sequences, domains, references)
        for _ in range(2):
            inputs = rows.bring(view.merge_inputs(sequences, domains, references), lay_out)
            found = merge_rows(store.model, inputs, window=store.general.window)
            assert torch.equal(found, expected) and torch.equal(references, before)
        used = references[references >= 0].unique().numel()
        sent = sum(len(table.rows) for table in inputs.tables)
        assert (sent == used) == (budget == 0) and sent >= used
    plots.close()


def test_tables_leave_with_the_original(store, make_sentences):
    sequences = PackedSequences.pack(store.encoder.token_ids(make_sentences(3)))
    rows = DeviceRows(HostStreams(), 1 << 30)
    plots = PlotLibrary(store.layout, store.catalog, store.general)
    with plots.reading(["words"]) as view:
        references = view.lookup(sequences, ["words"] * 3)
        rows.bring(view.merge_inputs(sequences, ["words"] * 3, references), lay_out)
        held = sum(rows._bytes_of_tables.values())
        assert held == view.table("words").rows.nbytes
    plots.close()
    del view
    gc.collect()
    assert not rows._bytes_of_tables
