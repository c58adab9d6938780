"""Linear layers of the shared base model, with their weights laid out once for the machine they run on."""

from __future__ import annotations

import copy
import functools
from typing import TypeVar

import torch
from torch.nn import functional

__all__ = ["SharedLinear", "has_bfloat16_products", "has_packed_matmul", "rounded_rows", "with_products_in"]

Layer = TypeVar("Layer")


@functools.cache
def has_packed_matmul() -> bool:
    """Whether this torch reorders weights for oneDNN, whose matmul uses the widest SIMD of any processor.

    MKL, torch's default BLAS on x86-64, takes a slower path on processors that are not Intel's. torch offers
    the reordering to its own compiler only (``torch.compile`` with frozen weights), so its presence is tested
    by a small product against plain torch and everything falls back to ``torch.nn.functional.linear``.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    weight, bias, x = torch.randn(32, 16), torch.randn(32), torch.randn(3, 16)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "none")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(y, functional.gelu(functional.linear(x, weight, bias)), atol=1e-4)


def has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 (AVX512-BF16 or AMX), through the packed matmul."""
    return has_packed_matmul() and _has_bfloat16_instructions()


@functools.cache
def _has_bfloat16_instructions() -> bool:
    # Named so since torch 2.6; where they are gone nothing is known, and nothing lost but speed.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


ROW_STEPS = ((64, 4), (256, 8), (1024, 16))
"""Numbers of rows up to the first are rounded up to a multiple of the second; larger ones of:"""
LARGE_ROW_STEP = 32


def rounded_rows(count: int) -> int:
    """The next of the few numbers of rows that products should have, at most 31 more than ``count``.

    oneDNN compiles a product for each size that it meets. That takes half a millisecond, in which it would
    multiply ninety rows of 384 with a matrix for 1,536, for each of the eight or so products of a batch; and
    it keeps a thousand of them, so that batches of all sizes are mostly new to it. Where nothing is compiled
    this is ``count``.
    """
    if not has_packed_matmul():
        return count
    step = next((step for most, step in ROW_STEPS if count <= most), LARGE_ROW_STEP)
    return -(-count // step) * step


class SharedLinear:
    """``y = activation(x @ weight.T + bias)``; weight [out, in], bias [out], of one dtype.

    Under ``torch.no_grad`` on a CPU, of float32 or, where the processor has it, bfloat16, the product runs on
    a reordered copy of the weight, made at first use; otherwise through ``torch.nn.functional.linear``. Of an
    ``x`` of another dtype than the weights, only the product is in theirs, and ``y`` in that of ``x``.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight = weight.contiguous()
        self.bias = bias.contiguous()
        self._packed: torch.Tensor | None = None

    @classmethod
    def stacked(cls, parts: list[SharedLinear]) -> SharedLinear:
        """One layer whose output is the outputs of ``parts`` side by side."""
        return cls(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))

    def __call__(self, x: torch.Tensor, *, gelu: str | None = None) -> torch.Tensor:
        """x [T, in] -> [T, out]; ``gelu`` applies GELU in the same pass, ``"none"`` exactly or ``"tanh"``."""
        if x.dtype is self.weight.dtype:
            return self._product(x, gelu)
        return self._product(x.to(self.weight.dtype), gelu).to(x.dtype)

    def in_dtype(self, dtype: torch.dtype) -> SharedLinear:
        """The same layer with weights of another dtype."""
        return SharedLinear(self.weight.to(dtype), self.bias.to(dtype))

    def _product(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        if torch.is_grad_enabled() or not _is_packed(x):
            y = functional.linear(x, self.weight, self.bias)
            return y if gelu is None else functional.gelu(y, approximate=gelu)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
        activation = "none" if gelu is None else "gelu"
        algorithm = "none" if gelu is None else gelu
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, activation, [], algorithm
        )
        return result


def _is_packed(x: torch.Tensor) -> bool:
    """Whether the packed matmul takes it."""
    if x.device.type != "cpu":
        return False
    if x.dtype is torch.float32:
        return has_packed_matmul()
    return x.dtype is torch.bfloat16 and has_bfloat16_products()


def with_products_in(layer: Layer, dtype: torch.dtype) -> Layer:
    """A copy of a layer, or of another owner of shared linear layers, whose products are in ``dtype``.

    It shares everything else, and what lies between the products stays as it was.
    """
    changed = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, SharedLinear):
            setattr(changed, name, value.in_dtype(dtype))
    return changed
