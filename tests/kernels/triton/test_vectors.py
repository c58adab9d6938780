"""Triton's grouped scale and bias: to the last bit what float64 gives when it is rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.test_vectors import OPERATIONS, make_batch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("hidden_size", [1, 37, 256, 264, 768])
def test_equals_float64(dtype: torch.dtype, operation: str, hidden_size: int) -> None:
    batch = make_batch(dtype, hidden_size)
    assert torch.equal(batch.run(operation), batch.expected(operation))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_columns_of_wider_tensors(operation: str) -> None:
    batch = make_batch(torch.bfloat16, 256)
    wide = torch.randn(len(batch.rows), 301).bfloat16()
    batch.rows, before = wide[:, 16:272].clone(), wide.clone()
    assert torch.equal(batch.run(operation, wide[:, 16:272]), batch.expected(operation))
    assert torch.equal(wide[:, :16], before[:, :16])
    assert torch.equal(wide[:, 272:], before[:, 272:])


def test_nan_stays_with_its_tenant() -> None:
    batch = make_batch(torch.float16)
    clean = batch.run("scale")
    batch.arena[272 : 272 + 264] = torch.nan  # slot 0, of segments 3 and 7
    ill = torch.zeros(len(clean), dtype=torch.bool)
    for segment in (3, 7):
        begin, end = batch.segment_offsets[segment : segment + 2].tolist()
        ill[begin:end] = True
    result = batch.run("scale")
    assert result[ill].isnan().all()
    assert torch.equal(result[~ill], clean[~ill])


@pytest.mark.parametrize(
    ("table", "position", "value"),
    [
        ("segment_offsets", 4, -1),
        ("segment_offsets", 4, 10**6),
        ("segment_slots", 3, 4),
        ("segment_slots", 3, -2),
        ("slot_offsets", 0, -2),
        ("slot_offsets", 0, 2 * 272 + 8),
        ("slot_offsets", 0, 2**63 - 1),
    ],
)
def test_values_that_cannot_be_change_nothing(table: str, position: int, value: int) -> None:
    batch = make_batch(torch.float16)
    clean = batch.run("scale")
    begin, end = batch.segment_offsets[3:5].tolist()
    next_end = int(batch.segment_offsets[5])
    getattr(batch, table)[position] = value
    result = batch.run("scale")
    assert torch.equal(result[begin:end], batch.rows[begin:end])
    assert torch.equal(result[:begin], clean[:begin])
    is_offset = table == "segment_offsets"  # then also the start of the next segment
    assert torch.equal(result[end:next_end], (batch.rows if is_offset else clean)[end:next_end])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_to_do(operation: str) -> None:
    for lengths in ([], [0], [0, 0, 0], [2]):
        batch = make_batch(torch.float16, lengths=lengths, slots=[0, 1, 3][: len(lengths)])
        assert torch.equal(batch.run(operation), batch.expected(operation))
    empty = make_batch(torch.float16, lengths=[0], slots=[0])
    empty.rows = empty.rows[:0]
    assert empty.run(operation).shape == (0, 264)


@settings(max_examples=25, deadline=None, database=None)
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 30), max_size=8))
    slots = [data.draw(st.integers(-1, 3)) for _ in lengths]
    dtype = data.draw(st.sampled_from(DTYPES))
    batch = make_batch(dtype, data.draw(st.integers(1, 600)), lengths, slots)
    operation = data.draw(st.sampled_from(list(OPERATIONS)))
    assert torch.equal(batch.run(operation), batch.expected(operation))
