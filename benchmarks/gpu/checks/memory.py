"""Out of memory, and values out of bounds: told by a typed error, and the next call works."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

import hmi_kernels
from benchmarks.gpu.checks.program import CheckFailedError, faults_raised, run_check
from hmi_kernels import CudaError, PinnedPool, PoolClosedError, PoolExhaustedError

if TYPE_CHECKING:
    from benchmarks.gpu.platform import Platform

KIB = 1 << 10
MORE_THAN_ADDRESSABLE = 1 << 47
"""Bytes: all addresses of a process of x86-64. Less might be granted, page by page, until none is left."""
HIDDEN_SIZE = 256


def check(platform: Platform) -> str:
    """Each way to run out, then the same op with the same result as before."""
    with platform.backend("cuda"), faults_raised(platform):
        before = _scaled(platform, slot=0)
        for what, run_out in (
            ("pool over budget", _exhaust_pool),
            ("page-locked memory", _exhaust_host),
            ("device memory", _exhaust_device),
            ("slot out of bounds", _name_a_slot_that_is_not_there),
            ("closed pool", _use_a_closed_pool),
        ):
            run_out(platform)
            if not torch.equal(_scaled(platform, slot=0), before):
                raise CheckFailedError(f"after {what} an op gives another result")
    what = "page-locked" if platform.is_dry else "page-locked and device"
    return f"a pool and {what} memory ran out, a fault was reported; every call after that works"


def _scaled(platform: Platform, slot: int) -> torch.Tensor:
    device = platform.device
    rows = torch.ones(4, HIDDEN_SIZE, dtype=torch.float16, device=device)
    arena = torch.arange(HIDDEN_SIZE, device=device).to(torch.float16)
    offsets, starts = torch.tensor([0, 4], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    slots = torch.tensor([slot], dtype=torch.int32, device=device)
    hmi_kernels.grouped_scale(rows, arena, offsets, slots, starts)
    return rows


@contextlib.contextmanager
def _fails(error: type[Exception], what: str) -> Iterator[None]:
    try:
        yield
    except error:
        return
    raise CheckFailedError(f"{what} raised no {error.__name__}")


def _require_memory(pool: PinnedPool) -> None:
    if pool.empty([KIB]).fill_(1).sum() != KIB:
        raise CheckFailedError("memory of the pool does not hold what was written")


def _exhaust_pool(platform: Platform) -> None:
    with PinnedPool(64 * KIB) as pool:
        with _fails(PoolExhaustedError, "a request over the budget"):
            pool.empty(65 * KIB, torch.uint8)
        _require_memory(pool)


def _exhaust_host(platform: Platform) -> None:
    with PinnedPool(2 * MORE_THAN_ADDRESSABLE) as pool:
        if platform.is_dry:
            from hmi_kernels.cuda import driver

            driver.module().emulator.fail_next("cudaHostAlloc", 1, 2)
        with _fails(CudaError, "page-locking more than there are addresses"):
            pool.empty(4 * KIB if platform.is_dry else MORE_THAN_ADDRESSABLE, torch.uint8)
        _require_memory(pool)


def _exhaust_device(platform: Platform) -> None:
    if platform.is_dry:
        return
    total = torch.cuda.get_device_properties(platform.device).total_memory
    with _fails(torch.OutOfMemoryError, "allocating twice the device's memory"):
        torch.empty(2 * total, dtype=torch.uint8, device=platform.device)


def _name_a_slot_that_is_not_there(platform: Platform) -> None:
    rows = _scaled(platform, slot=7)
    platform.synchronize()
    with _fails(ValueError, "a slot out of bounds"):
        hmi_kernels.raise_faults()
    if not bool((rows == 1).all()):
        raise CheckFailedError("rows of a segment whose slot is out of bounds were changed")


def _use_a_closed_pool(platform: Platform) -> None:
    pool = PinnedPool(64 * KIB)
    pool.close()
    with _fails(PoolClosedError, "a closed pool"):
        pool.empty([1])


if __name__ == "__main__":
    sys.exit(run_check(check))
