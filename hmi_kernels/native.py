"""The compiled module as ``native``, or something in its place that says why it is missing."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from hmi_kernels.settings import setting

__all__ = ["build_info", "native", "native_reason"]

native_reason = ""
"""Why the compiled module is missing; empty if it is there."""


class _MissingModule:
    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(f"hmi_kernels._C.{name} cannot be used: {native_reason}")


if TYPE_CHECKING:
    from hmi_kernels import _C as native  # noqa: N811 - its own name says nothing where it is used
else:
    # torch is imported above: its OpenMP threads are the team that the kernels join.
    try:
        from hmi_kernels import _C as native  # noqa: N811
    except ImportError as error:
        native = _MissingModule()
        native_reason = (
            f"it is not built for this Python ({error}); run `pip install .` with a C++17 compiler"
        )
    else:
        native.set_simd_level(setting("HMI_SIMD"))
        native.set_threads_mode(setting("HMI_THREADS"))


def build_info() -> dict[str, Any]:
    """What was compiled and what of it is in use, for bug reports and ``hmi doctor``.

    Keys: ``compiled`` (bool), ``reason`` (why not), ``machine``, ``torch``, ``num_threads`` (int); and if
    compiled ``compiler``, ``cuda_compiled`` (bool), ``cuda_architectures`` (str), ``simd_compiled`` and
    ``simd_available`` (lists of names), ``simd_active`` and ``threads_mode`` (``pool`` or ``openmp``).
    """
    info: dict[str, Any] = {
        "compiled": not native_reason,
        "reason": native_reason,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
    }
    if not native_reason:
        info |= {
            "compiler": native.compiler,
            "cuda_compiled": native.with_cuda,
            "cuda_architectures": native.cuda_architectures,
            "simd_compiled": native.compiled_simd_levels(),
            "simd_available": native.available_simd_levels(),
            "simd_active": native.simd_level(),
            "threads_mode": native.threads_mode(),
        }
    return info
