"""Batches padded for products of few sizes give what the batch itself gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmi_engine.models import linear
from hmi_engine.models.packing import PackedSequences, Readout
from hmi_engine.pipeline.row_padding import pad_batch

BATCHES = st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=80)


@pytest.fixture(autouse=True)
def sizes_matter(monkeypatch):
    """Wherever these tests run."""
    monkeypatch.setattr(linear, "has_packed_matmul", lambda: True)


def packed(batch):
    sequences = PackedSequences.pack([[7] * length for length, _ in batch])
    return sequences, Readout.select(sequences, [first_only for _, first_only in batch])


@given(st.integers(0, 20_000))
def test_numbers_of_rows_are_few_and_no_smaller(count):
    rounded = linear.rounded_rows(count)
    assert count <= rounded <= count + 31
    assert linear.rounded_rows(rounded) == rounded
    assert rounded <= 1.1 * count + 4


def test_there_are_few_of_them():
    assert len({linear.rounded_rows(count) for count in range(1, 8193)}) < 320


@given(BATCHES)
def test_bounds_continue_those_of_the_batch(batch):
    sequences, readout = packed(batch)
    padded = pad_batch(sequences, readout)
    count = sequences.num_sequences
    assert padded.num_tokens == linear.rounded_rows(sequences.num_tokens)
    assert torch.equal(padded.sequences.offsets[: count + 1], sequences.offsets)
    assert padded.sequences.offsets[-1] == padded.num_tokens
    assert padded.sequences.offsets.diff().max() <= padded.sequences.max_length
    assert len(padded.pad(torch.ones(sequences.num_tokens, 3))) == padded.num_tokens
    if readout is None:
        assert padded.readout is None
        return
    rows, offsets = padded.readout.rows, padded.readout.offsets
    assert torch.equal(rows[: len(readout.rows)], readout.rows)
    assert len(rows) == offsets[-1] == linear.rounded_rows(len(readout.rows))
    assert torch.equal(offsets[:count], readout.offsets[:-1])
    assert len(offsets) == len(padded.sequences.offsets)
    keys, queries = padded.sequences.offsets.diff(), offsets.diff()
    assert (keys[queries > 0] > 0).all()


def test_nothing_is_padded_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(linear, "has_packed_matmul", lambda: False)
    sequences, readout = packed([(3, True), (5, False)])
    padded = pad_batch(sequences, readout)
    assert padded.num_tokens == 8 and len(padded.readout.rows) == 6
    assert torch.equal(padded.sequences.offsets, sequences.offsets)


@pytest.mark.parametrize("first_only", [True, False])
@torch.no_grad()
def test_layers_give_what_they_give_of_the_batch(store, first_only):
    model = store.model
    sequences = PackedSequences.pack([[5, 6, 7], [8] * 11, [9], [3, 4] * 6])
    readout = Readout.select(sequences, [first_only, False, first_only, first_only])
    hidden_states = model.embed(sequences.input_ids, sequences.positions())
    wanted = model.run_layers(hidden_states, sequences, first=0, readout=readout)
    padded = pad_batch(sequences, readout)
    assert padded.num_tokens > sequences.num_tokens
    found = model.run_layers(padded.pad(hidden_states), padded.sequences, first=0, readout=padded.readout)
    torch.testing.assert_close(found[: len(wanted)], wanted, atol=1e-5, rtol=1e-5)
