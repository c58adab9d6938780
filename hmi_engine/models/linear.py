"""Linear layers of the shared base model, with their weights laid out once for the machine they run on."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

__all__ = ["SharedLinear", "has_packed_matmul"]


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


class SharedLinear:
    """``y = activation(x @ weight.T + bias)``; weight [out, in], bias [out], of one dtype.

    Under ``torch.no_grad`` on a CPU, of float32, the product runs on a reordered copy of the weight, made at
    first use; otherwise it runs through ``torch.nn.functional.linear``.
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
        is_float32_on_cpu = x.device.type == "cpu" and x.dtype is torch.float32
        if torch.is_grad_enabled() or not is_float32_on_cpu or not has_packed_matmul():
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
