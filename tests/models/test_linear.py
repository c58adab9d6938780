"""Shared linear layers against torch's own, in each of the ways that they may run."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from hmi_engine.models import linear
from hmi_engine.models.linear import SharedLinear, with_products_in


def rows_and_layer(num_rows=37, inputs=48, outputs=96):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator)
    return torch.randn(num_rows, inputs, generator=generator), SharedLinear(weight, bias)


@pytest.fixture(params=["packed where the processor can", "plain"])
def way(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(linear, "has_packed_matmul", lambda: False)
        monkeypatch.setattr(linear, "has_bfloat16_products", lambda: False)


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.no_grad()
def test_equals_torch_in_float64(way, dtype, tolerance, gelu):
    rows, layer = rows_and_layer()
    found = layer.in_dtype(dtype)(rows, gelu=gelu)
    wanted = functional.linear(rows.double(), layer.weight.double(), layer.bias.double())
    if gelu is not None:
        wanted = functional.gelu(wanted, approximate=gelu)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_rows_of_the_weights_dtype_stay_so(way):
    rows, layer = rows_and_layer()
    half = layer.in_dtype(torch.bfloat16)
    assert half(rows.bfloat16()).dtype is torch.bfloat16
    torch.testing.assert_close(half(rows.bfloat16()).float(), half(rows))


@torch.no_grad()
def test_a_copy_with_other_products_leaves_the_rest_alone():
    class Owner:
        def __init__(self):
            self.rows, self.layer = rows_and_layer()

    owner = Owner()
    changed = with_products_in(owner, torch.bfloat16)
    assert changed.rows is owner.rows
    assert changed.layer.weight.dtype is torch.bfloat16
    assert owner.layer.weight.dtype is torch.float32
