"""Pieces of a batch: every sequence once and in its order, of few and even sizes."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from hmi_engine.models.packing import PackedSequences, Readout
from hmi_engine.pipeline.batch_compute import SearchedBatch

BATCHES = st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=60)


class Adapters:
    """Those of sequences, by number."""

    def __init__(self, numbers):
        self.numbers = numbers

    def between(self, first, last):
        return Adapters(self.numbers[first:last])


def searched(batch):
    token = iter(range(10**6))
    sequences = PackedSequences.pack([[next(token) for _ in range(length)] for length, _ in batch])
    numbers = list(range(len(batch)))
    return SearchedBatch(
        number=1,
        served=numbers,
        tenants=[SimpleNamespace(number=number) for number in numbers],
        view=None,
        sequences=sequences,
        readout=Readout.select(sequences, [first_only for _, first_only in batch]),
        adapters=Adapters(numbers),
        references=torch.arange(sequences.num_tokens)[:, None],
        arrivals=[],
    )


@given(BATCHES, st.integers(1, 200))
def test_pieces_are_the_batch(batch, most):
    whole = searched(batch)
    pieces = list(whole.pieces(most))
    assert [index for piece in pieces for index in piece.served] == whole.served
    assert [number for piece in pieces for number in piece.adapters.numbers] == whole.served
    assert [tenant.number for piece in pieces for tenant in piece.tenants] == whole.served
    assert torch.equal(torch.cat([piece.sequences.input_ids for piece in pieces]), whole.sequences.input_ids)
    assert torch.equal(torch.cat([piece.references for piece in pieces]), whole.references)
    rows_read = [count for piece in pieces for count in piece.rows_read]
    assert tuple(rows_read) == whole.rows_read


@given(BATCHES, st.integers(1, 200))
def test_each_is_a_batch_of_its_own(batch, most):
    for piece in searched(batch).pieces(most):
        sequences = piece.sequences
        lengths = [batch[index][0] for index in piece.served]
        assert sequences.lengths == tuple(lengths) == tuple(sequences.offsets.diff().tolist())
        assert sequences.offsets[0] == 0 and sequences.offsets[-1] == sequences.num_tokens
        if piece.readout is not None:
            alone = Readout.select(sequences, [batch[index][1] for index in piece.served])
            expected = torch.arange(sequences.num_tokens) if alone is None else alone.rows
            assert torch.equal(piece.readout.rows, expected)
            assert piece.readout.offsets.diff().tolist() == list(piece.readout.counts)


@given(BATCHES, st.integers(1, 200))
def test_they_are_few_and_none_is_too_long(batch, most):
    whole = searched(batch)
    pieces = list(whole.pieces(most))
    longest = max(length for length, _ in batch)
    fewest = -(-whole.sequences.num_tokens // most)
    assert all(piece.sequences.num_tokens <= most for piece in pieces if len(piece.served) > 1)
    if longest <= most // 4:
        assert len(pieces) <= fewest + 1 + fewest // 2
    if fewest == 1:
        assert pieces == [whole]
