"""The environment variables that hmi_kernels reads; this is the only place that reads them.

- ``HMI_BACKEND``: ``auto`` (default), ``cuda``, ``triton``, ``cpu`` or ``reference``.
- ``HMI_SIMD``: ``auto`` (default), ``portable``, ``avx2`` or ``avx512``: the level of the CPU kernels.
- ``HMI_THREADS``: ``auto`` (default), ``pool`` or ``openmp``: whose threads the CPU kernels run on.
- ``HMI_TRITON_TUNE``: ``0`` (default; ``auto`` is the same) or ``1``: whether Triton kernels of the ops that
  serve try their configurations on each new shape, which takes seconds; else they take the first.
- ``HMI_KEEP_FREED_MEMORY``: ``auto`` (default; ``1`` is the same) or ``0``: whether malloc keeps what batches
  free, see :func:`hmi_kernels.keep_freed_memory`; not where glibc's own variables set the thresholds,
  ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_`` and ``GLIBC_TUNABLES``.
- ``TRITON_INTERPRET`` (Triton's own): 1 runs the Triton kernels on the CPU, for tests.
"""

from __future__ import annotations

import os

BACKEND_NAMES = ("cuda", "triton", "cpu", "reference")

_CHOICES = {
    "HMI_BACKEND": ("auto", *BACKEND_NAMES),
    "HMI_SIMD": ("auto", "portable", "avx2", "avx512"),
    "HMI_THREADS": ("auto", "pool", "openmp"),
    "HMI_TRITON_TUNE": ("auto", "0", "1"),
    "HMI_KEEP_FREED_MEMORY": ("auto", "0", "1"),
}


def setting(name: str) -> str:
    """The variable's value, ``auto`` if it is unset or empty. Raises ValueError on a value it cannot have."""
    value = os.environ.get(name) or "auto"
    if value not in _CHOICES[name]:
        raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}, not {value!r}")
    return value


def chooses_own_malloc_thresholds() -> bool:
    """Whether the environment says when glibc's malloc gives memory back to the system."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(
        f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}" in tunables
        for name in ("trim_threshold", "mmap_threshold")
    )


def is_triton_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
