"""The emulator's own kernels (``kernels/``), for its tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.build import EMULATOR_TESTS
from emulator.harness import active_module, using

__all__ = ["floats", "launch", "shim"]


def shim(variant: str = "plain", **settings: Any) -> Any:
    """Like :func:`emulator.harness.emulated`, with the tests' own kernels."""
    return using(variant, EMULATOR_TESTS, **settings)


def launch(
    kernel: str, output: NDArray[Any] | None = None, source: NDArray[Any] | None = None, parameter: int = 0
) -> Any:
    """Runs a kernel of the innermost :func:`shim`; returns its output."""
    addresses = [0 if array is None else array.ctypes.data for array in (output, source)]
    getattr(active_module(), kernel)(*addresses, parameter)
    return output


def floats(count: int, offset: int = 0) -> NDArray[np.float32]:
    """1, 2, 3, ...; ``offset`` floats after an address that is a multiple of 128 bytes."""
    aligned = np.empty(count + offset + 32, np.float32)
    begin = (-aligned.ctypes.data // 4) % 32 + offset
    aligned[begin : begin + count] = np.arange(1, count + 1)
    return aligned[begin : begin + count]
