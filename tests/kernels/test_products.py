"""Grouped products and their matrices' gradients against float64, and what keeps tenants apart."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernels.product_cases import ProductBatch, int32, make_products, product_batches

import hmi_kernels

drawn = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LENGTHS, SLOTS = [0, 5, 300, 1, 64, 17], [2, 0, 1, -1, 3, 1]
SHAPES = [(48, 16), (48, 64), (0, 16), (48, 3)]


@drawn
@given(batch=product_batches())
def test_equals_float64(implementation: str, batch: ProductBatch) -> None:
    for transposed in (False, True):
        found, expected = (
            batch.product(transposed=transposed),
            batch.expected_product(transposed=transposed),
        )
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(
        batch.weight_gradient(), batch.expected_weight_gradient().float(), rtol=1e-4, atol=5e-4
    )


@pytest.mark.parametrize("shape", [(300, 5), (5, 300), (130, 130), (384, 1), (1, 384), (768, 16)])
def test_matrices_of_every_form(implementation: str, shape: tuple[int, int]) -> None:
    batch = make_products([33, 700, 2], [0, 1, 0], [shape, (shape[0], 1)])
    found, expected = batch.weight_gradient(), batch.expected_weight_gradient()
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-3)
    for transposed in (False, True):
        expected = batch.expected_product(transposed=transposed).float()
        torch.testing.assert_close(batch.product(transposed=transposed), expected, rtol=1e-4, atol=1e-3)


def test_threads_change_no_bit(simd_level: str, threads_mode: str) -> None:
    batch = make_products([700, 800, 300], [1, 0, 1], [(384, 16), (384, 64)])
    together = [batch.product(transposed=False), batch.product(transposed=True), batch.weight_gradient()]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    more = [batch.product(transposed=False), batch.product(transposed=True), batch.weight_gradient()]
    torch.set_num_threads(before)
    assert all(map(torch.equal, together, more))


def test_neighbours_change_no_bit(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("torch's products round by their number of rows")
    batch = make_products(LENGTHS, SLOTS, SHAPES)
    together, gradient = batch.product(transposed=False), batch.weight_gradient()
    for slot in (0, 1, 3):
        alone = ProductBatch(**vars(batch))
        alone.segment_slots = torch.where(batch.segment_slots == slot, batch.segment_slots, -1)
        place, _, _ = batch.block(slot)
        assert torch.equal(alone.weight_gradient()[place], gradient[place])
        for tokens, owner in alone.segments():
            assert owner == slot
            assert torch.equal(alone.product(transposed=False)[tokens], together[tokens])


def test_nan_stays_with_its_slot(implementation: str) -> None:
    batch = make_products(LENGTHS, SLOTS, SHAPES)
    clean, clean_gradient = batch.product(transposed=True), batch.weight_gradient()
    place, _, _ = batch.block(1)
    batch.arena[place] = torch.nan
    tokens = [tokens for tokens, slot in batch.segments() if slot == 1]
    others = torch.ones(len(batch.inputs), dtype=torch.bool)
    for segment in tokens:
        others[segment] = False
    assert torch.equal(batch.product(transposed=True)[others], clean[others])
    batch.inputs[tokens[0].start] = torch.nan
    gradient = batch.weight_gradient()
    assert gradient[place].isnan().all()
    clean_gradient[place] = gradient[place]
    assert torch.equal(gradient.nan_to_num(7), clean_gradient.nan_to_num(7))


@pytest.mark.parametrize("is_gradient", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_offsets": torch.tensor([0, 5, 4, 10])}, "segment_offsets"),
        ({"segment_slots": int32([0, 2, 1])}, "segment_slots"),
        ({"slot_offsets": torch.tensor([-1, 20])}, "slot_offsets"),
        ({"slot_offsets": torch.tensor([0, 29])}, "does not fit into the arena"),
        ({"slot_rows": int32([5, 3])}, "slot_rows"),
        ({"slot_columns": int32([4, -3])}, "slot_columns"),
    ],
)
def test_values_out_of_bounds(
    implementation: str, changes: dict[str, Any], message: str, is_gradient: bool
) -> None:
    tables = {
        "segment_offsets": torch.tensor([0, 5, 5, 10]),
        "segment_slots": int32([0, 1, 1]),
        "slot_offsets": torch.tensor([0, 20]),
        "slot_rows": int32([4, 4]),
        "slot_columns": int32([3, 3]),
    }
    indexes = (tables | changes).values()
    inputs, gradients = torch.randn(10, 4), torch.randn(10, 3)
    with pytest.raises(ValueError, match=message):
        if is_gradient:
            hmi_kernels.grouped_weight_gradient(inputs, gradients, *indexes, arena_size=32)
        else:
            hmi_kernels.grouped_product(inputs, torch.randn(32), *indexes, output_size=3)


def test_gradients_of_matrices_that_overlap_are_refused(implementation: str) -> None:
    batch = make_products([3, 4], [0, 1], [(4, 3), (4, 3)])
    batch.slot_offsets[1] = batch.slot_offsets[0] + 11
    batch.product(transposed=False)  # to share weights is allowed
    with pytest.raises(ValueError, match="overlap"):
        batch.weight_gradient()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": torch.randn(6, 4).half()}, TypeError, "arena"),
        ({"inputs": torch.randn(4, 6).T}, ValueError, "dense rows"),
        ({"slot_rows": torch.tensor([4])}, TypeError, "slot_rows"),
        ({"slot_columns": int32([3, 3])}, ValueError, "slot_columns"),
        ({"output_size": -1}, ValueError, "output_size"),
    ],
)
def test_arguments_of_another_kind(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "inputs": torch.randn(6, 4),
        "arena": torch.randn(12),
        "segment_offsets": torch.tensor([0, 6]),
        "segment_slots": int32([0]),
        "slot_offsets": torch.tensor([0]),
        "slot_rows": int32([4]),
        "slot_columns": int32([3]),
        "output_size": 3,
    }
    with pytest.raises(error, match=re.escape(message)):
        hmi_kernels.grouped_product(**(arguments | changes))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_and_their_gradients(transposed: bool) -> None:
    """In float64, on the reference: each op is the other's derivative."""
    batch = make_products([2, 0, 3], [1, 0, 0], [(4, 3), (2, 3)], dtype=torch.float64, before=1)
    rows, other = (side.clone().requires_grad_() for side in batch.sides(transposed))
    arena = batch.arena.clone().requires_grad_()

    def product(rows: torch.Tensor, arena: torch.Tensor) -> torch.Tensor:
        return hmi_kernels.grouped_product(
            rows, arena, *batch.indexes(), output_size=other.shape[1], transposed=transposed
        )

    def gradient(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        return hmi_kernels.grouped_weight_gradient(inputs, gradients, *batch.indexes(), arena_size=len(arena))

    torch.autograd.gradcheck(product, (rows, arena))
    torch.autograd.gradgradcheck(product, (rows, arena), fast_mode=True)
    if not transposed:
        torch.autograd.gradcheck(gradient, (rows, other))
        torch.autograd.gradgradcheck(gradient, (rows, other), fast_mode=True)


def test_nothing_to_do(implementation: str) -> None:
    empty, none = torch.empty(0, 4), torch.tensor([0])
    indexes = (none, int32([]), torch.empty(0, dtype=torch.int64), int32([]), int32([]))
    assert hmi_kernels.grouped_product(empty, torch.empty(0), *indexes, output_size=3).shape == (0, 3)
    gradient = hmi_kernels.grouped_weight_gradient(empty, torch.empty(0, 3), *indexes, arena_size=5)
    assert torch.equal(gradient, torch.zeros(5))
