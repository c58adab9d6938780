"""Triton's grouped products, their matrices' gradients, and the adapters' backward pass on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from kernels.product_cases import ProductBatch, make_products, product_batches
from kernels.test_deltas import DeltaBatch, delta_batches

from hmi_kernels import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(batch: ProductBatch) -> None:
    eps = torch.finfo(batch.inputs.dtype).eps
    for found, expected in (
        (batch.product(transposed=False), batch.expected_product(transposed=False)),
        (batch.product(transposed=True), batch.expected_product(transposed=True)),
        (batch.weight_gradient(), batch.expected_weight_gradient()),
    ):
        bound = eps * expected.abs() + 1e-4 + 2.0**-25
        assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(dtype: torch.dtype) -> None:
    shapes = [(70, 16), (70, 37), (0, 16), (33, 3)]
    check(make_products([0, 5, 50, 1, 33, 17], [2, 0, 1, -1, 3, 1], shapes, dtype=dtype, before=2, after=1))


@settings(max_examples=6, deadline=None)
@given(batch=product_batches(most=40))
def test_drawn(batch: ProductBatch) -> None:
    check(batch)


@settings(max_examples=5, deadline=None)
@given(batch=delta_batches(sizes=(1, 40)))
def test_deltas_equal_gradients_of_the_reference(batch: DeltaBatch) -> None:
    for found, expected in zip(batch.gradients(), batch.gradients(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("table", "position", "value"),
    [
        ("segment_slots", 1, 9),
        ("slot_offsets", 0, 2**40),
        ("slot_rows", 0, 4096),
        ("slot_columns", 0, -8),
    ],
)
def test_values_that_cannot_be_change_nothing(table: str, position: int, value: int) -> None:
    batch = make_products([9, 40, 20], [1, 0, 1], [(40, 16), (40, 30)])
    clean, clean_gradient = batch.product(transposed=False), batch.weight_gradient()
    place, _, _ = batch.block(0)
    getattr(batch, table)[position] = value
    clean[9:49], clean_gradient[place] = 0, 0
    assert torch.equal(batch.product(transposed=False), clean)
    assert torch.equal(batch.weight_gradient(), clean_gradient)
