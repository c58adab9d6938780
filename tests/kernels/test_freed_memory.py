"""Memory that tensors free is there for the next ones, without a page fault."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import hmi_kernels

TUNABLES = "GLIBC_TUNABLES"
OF_MALLOC = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "HMI_KEEP_FREED_MEMORY", TUNABLES)
MEBIBYTES = 12
TENSORS = 4
PAGES = TENSORS * MEBIBYTES * 256
SCRIPT = f"""
import resource
import torch
import hmi_kernels

def batch():
    tensors = [torch.ones({MEBIBYTES} << 18) for _ in range({TENSORS})]

print(hmi_kernels.keep_freed_memory())
for _ in range(20):  # the heap grows until it fits
    batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    batch()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


def observed(**variables: str) -> tuple[bool, float]:
    """Whether memory is kept in a process of such an environment, and page faults of a batch of tensors."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_MALLOC} | variables
    lines = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    return lines[0] == "True", float(lines[1])


def has_glibc() -> bool:
    return "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and bool(
        os.confstr("CS_GNU_LIBC_VERSION")
    )


@pytest.mark.skipif(not has_glibc(), reason="another malloc")
def test_batches_find_the_memory_of_those_before():
    kept, faults = observed()
    assert kept
    assert faults < PAGES / 100
    kept, _ = observed(HMI_KEEP_FREED_MEMORY="0")
    assert not kept


@pytest.mark.skipif(not has_glibc(), reason="another malloc")
def test_page_faults_are_counted():
    """Else the test above could not fail.

    glibc maps every tensor anew here. Left to itself it gives memory back only where nothing in use
    lies above it, which differs from one machine to the next.
    """
    kept, faults = observed(MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept
    assert faults > PAGES * 0.9


@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {TUNABLES: "glibc.malloc.mmap_threshold=131072"},
    ],
)
def test_what_the_environment_says_is_left_alone(variables):
    kept, _ = observed(**variables)
    assert not kept


def test_another_value_is_refused(monkeypatch):
    hmi_kernels.keep_freed_memory.cache_clear()
    monkeypatch.setenv("HMI_KEEP_FREED_MEMORY", "always")
    with pytest.raises(ValueError, match="HMI_KEEP_FREED_MEMORY must be one of auto, 0, 1"):
        hmi_kernels.keep_freed_memory()
