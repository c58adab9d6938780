"""Batches padded to a shape: kernels may rely on what they rely on for batches that nobody padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hmi_kernels
from hmi_engine.models.packing import PackedSequences
from hmi_engine.pipeline.graph_shape import GraphShape

POSITIONS = 512
LENGTHS = st.lists(st.integers(1, 12) | st.integers(1, POSITIONS), min_size=1, max_size=300)


def shape_of(lengths, reads_first=True):
    sequences = PackedSequences.pack([[0] * length for length in lengths])
    rows_read = [1] * len(lengths) if reads_first else lengths
    return GraphShape.of(sequences, rows_read, POSITIONS), sequences


@given(LENGTHS)
def test_every_row_belongs_to_a_sequence_that_has_keys(lengths):
    shape, sequences = shape_of(lengths)
    padded, rows, of_rows = shape.bounds(sequences.offsets)
    count = len(lengths)
    assert shape.num_tokens > sequences.num_tokens and shape.num_sequences > count
    assert torch.equal(padded[: count + 1], sequences.offsets)
    assert torch.equal(rows[:count], sequences.offsets[:-1])
    assert torch.equal(of_rows[: count + 1], torch.arange(count + 1))
    assert (padded[-1], of_rows[-1]) == (shape.num_tokens, shape.num_sequences)
    assert len(padded) == len(of_rows) == len(rows) + 1 == shape.num_sequences + 1
    keys, queries = padded.diff(), of_rows.diff()
    assert (keys >= 0).all() and (queries >= 0).all()
    assert (keys[queries > 0] > 0).all()
    assert max(keys.max(), queries.max()) <= shape.max_length
    assert ((rows >= 0) & (rows < shape.num_tokens)).all()


@given(LENGTHS)
def test_padding_is_bounded(lengths):
    """By a quarter and a step's 64 tokens: what a batch costs without need."""
    shape, sequences = shape_of(lengths)
    assert shape.num_tokens <= 1.25 * sequences.num_tokens + 64 + 8
    assert shape.num_tokens <= GraphShape.most_rows(sequences.num_tokens)[0]


def test_a_few_shapes_serve_all_numbers_of_tokens():
    shapes = {shape_of([tokens])[0].num_tokens for tokens in range(1, POSITIONS + 1)}
    shapes |= {shape_of([POSITIONS] * 15 + [tokens])[0].num_tokens for tokens in range(1, POSITIONS + 1)}
    assert len(shapes) < 16


def test_what_is_read_and_long_sequences_tell_shapes_apart():
    assert shape_of([5, 6])[0] == shape_of([9, 2])[0]
    assert shape_of([5, 6])[0] != shape_of([5, 6], reads_first=False)[0]
    assert shape_of([128])[0].max_length < shape_of([129])[0].max_length == POSITIONS


def test_more_sequences_than_can_be_padded_are_refused():
    assert not shape_of([2] * 1024)[0].is_usable
    assert shape_of([2] * 500)[0].is_usable


@pytest.mark.parametrize("reads_first", [True, False])
def test_attention_of_the_padded_batch_is_that_of_the_batch(reads_first):
    lengths, hidden_size = [3, 1, 17, 8], 32
    shape, sequences = shape_of(lengths, reads_first)
    padded, rows, of_rows = shape.bounds(sequences.offsets)
    states = torch.randn(shape.num_tokens, hidden_size)
    states[sequences.num_tokens :] = float("nan")
    own = states[: sequences.num_tokens]
    if reads_first:
        found = hmi_kernels.packed_attention(states[rows], states, states, of_rows, padded, num_heads=2)
        queries, offsets = own[sequences.offsets[:-1]], torch.arange(len(lengths) + 1)
    else:
        found = hmi_kernels.packed_attention(states, states, states, padded, padded, num_heads=2)
        queries, offsets = own, sequences.offsets
    wanted = hmi_kernels.packed_attention(queries, own, own, offsets, sequences.offsets, num_heads=2)
    assert torch.equal(found[: len(wanted)], wanted)
