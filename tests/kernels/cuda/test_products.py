"""Grouped products and their matrices' gradients on tensor cores, and the adapters' backward pass on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulator.harness import emulated, run_sanitized
from emulator.mutation import assert_every_site_matters
from hypothesis import given, settings
from kernels.product_cases import ProductBatch, make_products, product_batches
from kernels.test_deltas import DeltaBatch, delta_batches, make_deltas
from torch import Tensor

import hmi_kernels
from hmi_kernels import reference
from hmi_kernels.cuda import driver

DTYPES = (torch.float16, torch.bfloat16)
LENGTHS, SLOTS = [0, 5, 130, 1, 64, 17], [2, 0, 1, -1, 3, 1]
SHAPES = [(96, 16), (96, 64), (0, 16), (96, 8)]
FLOAT32 = 2.0**-23


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    with emulated():
        yield


def assert_rounded(found: Tensor, expected: Tensor, magnitudes: Tensor, depth: int) -> None:
    """Sums of ``depth`` products in float32, in any order, rounded once: see ``AdapterCase.expected``."""
    eps = torch.finfo(found.dtype).eps
    bound = (
        magnitudes * depth * FLOAT32 + (expected.abs() + magnitudes * depth * FLOAT32) * eps / 2 + 2.0**-25
    )
    assert ((found.double() - expected).abs() <= bound).all()


def magnitudes(batch: ProductBatch) -> ProductBatch:
    """The same batch of absolute values."""
    sizes = {name: getattr(batch, name).abs() for name in ("inputs", "arena", "output_gradients")}
    return ProductBatch(**(vars(batch) | sizes))


def check(batch: ProductBatch) -> None:
    sizes = magnitudes(batch)
    depth = 8 + max(len(batch.inputs), *batch.inputs.shape, *batch.output_gradients.shape)
    for transposed in (False, True):
        assert_rounded(
            batch.product(transposed=transposed),
            batch.expected_product(transposed=transposed),
            sizes.expected_product(transposed=transposed),
            depth,
        )
    expected = batch.expected_weight_gradient()
    assert_rounded(batch.weight_gradient(), expected, sizes.expected_weight_gradient(), depth)
    driver.raise_faults()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["in order", "reverse", "random"])
def test_equals_float64(dtype: torch.dtype, order: str) -> None:
    with emulated(order=order):
        check(make_products(LENGTHS, SLOTS, SHAPES, dtype=dtype, before=2, after=3, multiple=8))


@settings(max_examples=8, deadline=None)
@given(batch=product_batches(dtype=torch.float16, multiple=8))
def test_drawn(batch: ProductBatch) -> None:
    check(batch)


def test_no_unordered_accesses() -> None:
    with emulated("race"):
        check(make_products([70, 9, 66], [1, 0, 1], [(72, 16), (72, 80)], dtype=torch.float16, multiple=8))


def test_every_synchronization_is_needed() -> None:
    batch = make_products([150, 70], [0, 0], [(136, 72)], dtype=torch.float16, multiple=8)
    assert_every_site_matters(lambda: check(batch))


@pytest.mark.parametrize(
    ("table", "position", "value", "message"),
    [
        ("segment_offsets", 2, -1, "segment_offsets"),
        ("segment_offsets", 2, 10**6, "segment_offsets"),
        ("segment_slots", 1, 9, "segment_slots"),
        ("slot_offsets", 0, 2**40, "slot_offsets"),
        ("slot_rows", 0, 4096, "slot_rows"),
        ("slot_columns", 0, -8, "slot_rows or slot_columns"),
    ],
)
def test_values_out_of_bounds_are_reported(table: str, position: int, value: int, message: str) -> None:
    batch = make_products([9, 70, 20], [1, 0, 1], [(72, 16), (72, 80)], dtype=torch.float16, multiple=8)
    getattr(batch, table)[position] = value
    for run in (lambda: batch.product(transposed=False), batch.weight_gradient):
        try:
            run()
        except ValueError as error:  # of tables in host memory, which the emulator's are not
            assert message in str(error)
            continue
        if (
            run != batch.weight_gradient or table != "segment_slots"
        ):  # which owns nothing, and is not looked at
            with pytest.raises(ValueError, match=message):
                driver.raise_faults()


def test_what_the_kernels_do_not_take() -> None:
    batch = make_products([5], [0], [(16, 8)])
    with pytest.raises(ValueError, match="must be torch"):
        batch.product(transposed=False)
    batch = make_products([5], [0], [(16, 12)], dtype=torch.float16)
    with pytest.raises(ValueError, match="multiple"):
        batch.product(transposed=False)


def gradients_in_float64(batch: DeltaBatch) -> tuple[Tensor, ...]:
    wide = DeltaBatch(**vars(batch))
    wide.hidden_states, wide.arena = batch.hidden_states.double(), batch.arena.double()
    return wide.gradients(reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bottleneck", "LoRA"])
def test_deltas(dtype: torch.dtype, kind: str) -> None:
    sizes: dict[str, Any] = (
        {"activations": [1, 0, 3]} if kind == "bottleneck" else {"output_sizes": (264, 64)}
    )
    ranks = [[16, 8, 24]] if kind == "bottleneck" else [[16, 8, 24], [8, 0, 16]]
    batch = make_deltas([20, 0, 70, 3], [1, 0, 2, -1], ranks, size=256, dtype=dtype, **sizes)
    for found, expected in zip(batch.gradients(), gradients_in_float64(batch), strict=True):
        scale = expected.abs().max()
        assert (found.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * scale
    driver.raise_faults()


@settings(max_examples=4, deadline=None)
@given(batch=delta_batches(dtype=torch.float16, multiple=8, sizes=(256, 320)))
def test_drawn_deltas(batch: DeltaBatch) -> None:
    for found, expected in zip(batch.gradients(), gradients_in_float64(batch), strict=True):
        scale = max(float(expected.abs().max()), 2.0**-8)
        assert (found.double() - expected).abs().max() <= 8 * torch.finfo(torch.float16).eps * scale


def test_derivatives_of_matrices_of_any_size_are_refused() -> None:
    """Which the kernel of the product would leave at zero: see the next test for those that it takes."""
    batch = make_products([5, 9], [1, 0], [(16, 8), (3, 8)], dtype=torch.float16, multiple=8)
    batch.slot_offsets[1] += 3
    sides = batch.inputs.requires_grad_(), batch.output_gradients.requires_grad_()
    gradient = batch.weight_gradient()
    for side in sides:
        with pytest.raises(
            ValueError, match="backend cuda cannot run hmi::grouped_product: any_matrix is set"
        ):
            torch.autograd.grad(gradient.sum(), side, retain_graph=True)


def test_second_derivatives() -> None:
    batch = make_deltas(
        [20, 5, 7], [0, 1, -1], [[16, 8], [8, 8]], size=256, output_sizes=(264, 64), dtype=torch.float16
    )
    for found, expected in zip(second_gradients(batch), second_gradients_in_float64(batch), strict=True):
        assert expected.abs().max() > 0
        scale = expected.abs().max()
        assert (found.double() - expected).abs().max() <= 16 * torch.finfo(torch.float16).eps * scale
    driver.raise_faults()


def second_gradients(batch: DeltaBatch) -> tuple[Tensor, ...]:
    """Of the product of the gradients with fixed numbers."""
    inputs = [tensor.clone().requires_grad_() for tensor in (batch.hidden_states, batch.arena)]
    first = torch.autograd.grad(batch.delta(*inputs).square().mean(), inputs, create_graph=True)
    return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)


def second_gradients_in_float64(batch: DeltaBatch) -> tuple[Tensor, ...]:
    wide = DeltaBatch(**vars(batch))
    wide.hidden_states, wide.arena = batch.hidden_states.double(), batch.arena.double()
    with hmi_kernels.use_backend("reference"):
        return second_gradients(wide)


def test_second_derivatives_of_biases_are_refused() -> None:
    batch = make_deltas([20, 7], [1, 0], [[16, 8]], size=256, activations=[1, 2], dtype=torch.float16)
    with pytest.raises(ValueError, match="any_matrix is set"):
        second_gradients(batch)


def test_gradients_of_what_another_backend_ran_are_refused() -> None:
    """Too narrow for the kernels of the forward pass, so that nobody has asked for ranks that these take."""
    batch = make_deltas([20, 7], [1, 0], [[16, 12]], size=128, activations=[1, 2], dtype=torch.float16)
    hidden_states = batch.hidden_states.requires_grad_()
    with hmi_kernels.use_backend("reference"):
        delta = batch.delta(hidden_states, batch.arena)
    with pytest.raises(ValueError, match="any_matrix is set"):
        torch.autograd.grad(delta.sum(), hidden_states)


@pytest.mark.slow
def test_nothing_out_of_bounds() -> None:
    done = run_sanitized(
        """
import torch
from emulator.harness import emulated
from kernels.product_cases import make_products
with emulated("sanitize"):
    batch = make_products([70, 9, 66], [1, 0, 1], [(72, 16), (72, 80)], dtype=torch.float16, multiple=8)
    batch.product(transposed=False), batch.product(transposed=True), batch.weight_gradient()
"""
    )
    assert done.returncode == 0, done.stderr[-3000:]
