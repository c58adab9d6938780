"""What the kernels compute with: matrix products, rounding, activations."""

from __future__ import annotations

import triton
import triton.language as tl

from hmi_kernels.settings import is_triton_interpreted

__all__ = ["activate", "dot", "rounded"]

INTERPRETED = tl.constexpr(is_triton_interpreted())


@triton.jit
def dot(left: tl.tensor, right: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """``sums + left @ right`` with sums in float32; float32 factors are not shortened to tf32."""
    if INTERPRETED:
        left = left.to(tl.float32)  # the interpreter would multiply the bits of bfloat16
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def rounded(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 values in ``dtype``, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)  # the interpreter would cut the low half off
        bits = tl.where(values == values, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)  # noqa: PLR0124
        values = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    # Without libdevice, so that it runs everywhere. Near 0 the quotient would lose digits: a series there.
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    quotient = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    return tl.where(tl.abs(x) < 0.25, series, quotient)


@triton.jit
def activate(x: tl.tensor, activation: tl.tensor) -> tl.tensor:
    """The activation of that number in ``hmi_kernels.ACTIVATIONS``, of float32 values."""
    result = x
    if activation == 0:
        result = tl.where(x < 0.0, 0.0, x)  # keeps NaN
    elif activation == 1:
        result = 0.5 * x * (1.0 + tl.erf(x * 0.70710678118654752))
    elif activation == 2:
        result = x / (1.0 + tl.exp(-x))
    elif activation == 3:
        result = 0.5 * x * (1.0 + _tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)))
    else:
        result = _tanh(x)
    return result
