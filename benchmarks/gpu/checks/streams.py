"""Copies and kernels on two streams, through two buffers that are used again and again.

Round after round the host fills a page-locked buffer, one stream copies it to a buffer on the device, and
another adds it to rows with one of our kernels; events alone keep the three in order. The same without the
events must go wrong, or else this check could not see what it is for.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

import hmi_kernels
from benchmarks.gpu.checks.program import CheckFailedError, faults_raised, run_check
from hmi_kernels import CopyEvent, PinnedPool, copy_batch_async

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.platform import Platform

HIDDEN_SIZE, NUM_PIECES, NUM_TOKENS = 1024, 24, 3
NUM_BUFFERS = 2
ROUNDS, DRY_ROUNDS = 200, 4
METHODS = ("loop", "batch", "kernel", "auto")
COPY_DELAY_CYCLES, KERNEL_DELAY_CYCLES = 2_000_000, 1_000_000
"""About a millisecond: longer than a copy and a kernel take, so that what does not wait is early."""


class _Device(Protocol):
    """What the program needs of a GPU; ``compute_stream`` is the one that ``submit`` runs ops on."""

    compute_stream: int

    def new_stream(self) -> int: ...

    def empty(self, shape: Sequence[int]) -> Tensor: ...

    def submit(self, op: Callable[[], object]) -> None: ...

    def delay(self, stream: int, cycles: int) -> None: ...


class _Gpu:
    """The GPU by torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: list[torch.cuda.Stream] = []
        self.compute_stream = self.new_stream()

    def new_stream(self) -> int:
        self._streams.append(torch.cuda.Stream(self._device))
        return int(self._streams[-1].cuda_stream)

    def empty(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(tuple(shape), dtype=torch.float16, device=self._device)

    def submit(self, op: Callable[[], object]) -> None:
        with self._current(self.compute_stream):
            op()

    def delay(self, stream: int, cycles: int) -> None:
        with self._current(stream):
            torch.cuda._sleep(cycles)

    def _current(self, stream: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(torch.cuda.ExternalStream(stream, self._device))


class _Emulated:
    """The emulated GPU of the tests, where ops run on the default stream and schedules delay."""

    compute_stream = 0

    def __init__(self, device: Any) -> None:
        self._device = device

    def new_stream(self) -> int:
        return int(self._device.stream())

    def empty(self, shape: Sequence[int]) -> Tensor:
        memory = self._device.empty(shape, torch.float16)
        assert isinstance(memory, Tensor)
        return memory

    def submit(self, op: Callable[[], object]) -> None:
        op()

    def delay(self, stream: int, cycles: int) -> None:
        """The schedule does that."""


class _Relay:
    """Two page-locked buffers, two on the device, and rows that sum up what went through."""

    def __init__(self, device: _Device, pool: PinnedPool, delays: tuple[int, int]) -> None:
        self._device, self._delays = device, delays
        self._copy_stream, self._compute_stream = device.new_stream(), device.compute_stream
        shape = NUM_BUFFERS, NUM_PIECES, HIDDEN_SIZE
        self._pinned = pool.empty(shape, torch.float16).zero_()
        self._arenas = device.empty(shape)
        self._rows = device.empty((NUM_TOKENS, HIDDEN_SIZE))
        where = self._rows.device
        self._offsets = torch.tensor([0, NUM_TOKENS], device=where)
        self._slot = torch.zeros(1, dtype=torch.int32, device=where)
        self._block_offsets = torch.tensor([(NUM_PIECES - 1) * HIDDEN_SIZE], device=where)
        self._rows.zero_()
        self._arenas.zero_()
        self._copied = [CopyEvent() for _ in range(NUM_BUFFERS)]
        self._used = [CopyEvent() for _ in range(NUM_BUFFERS)]
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    def run(self, rounds: int, method: str, *, is_ordered: bool) -> float:
        """The sum of the values that arrived, as every element of the rows has it; NaN if they differ."""
        for number in range(rounds):
            buffer = number % NUM_BUFFERS
            if is_ordered:
                self._copied[buffer].synchronize()  # before the host overwrites what is being copied
                self._used[buffer].wait(self._copy_stream)
            self._pinned[buffer] = number % 8 + 1  # sums stay exact in float16
            self._device.delay(self._copy_stream, self._delays[0])
            self._copied[buffer] = copy_batch_async(
                list(self._arenas[buffer]),
                list(self._pinned[buffer]),
                stream=self._copy_stream,
                method=method,
            )
            if is_ordered:
                self._copied[buffer].wait(self._compute_stream)
            self._device.delay(self._compute_stream, self._delays[1])
            self._device.submit(self._adding(self._arenas[buffer].view(-1)))
            self._used[buffer].record(self._compute_stream)
        for event in (*self._copied, *self._used):
            event.synchronize()
        rows = self._rows.float().cpu()
        return float(rows[0, 0]) if bool((rows == rows[0, 0]).all()) else float("nan")

    def _adding(self, arena: Tensor) -> Callable[[], None]:
        def add() -> None:
            hmi_kernels.grouped_bias(self._rows, arena, self._offsets, self._slot, self._block_offsets)

        return add


def _expected(rounds: int) -> float:
    return float(sum(number % 8 + 1 for number in range(rounds)))


def _require_right(device: _Device, method: str, rounds: int, delays: tuple[int, int]) -> None:
    with PinnedPool(1 << 20) as pool:
        arrived = _Relay(device, pool, delays).run(rounds, method, is_ordered=True)
        hmi_kernels.wait_for_copies()
    if arrived != _expected(rounds):
        raise CheckFailedError(
            f"method {method}, delays {delays}: the sum is {arrived}, not {_expected(rounds)}"
        )


def _is_wrong_without_events(device: _Device, rounds: int, delays: tuple[int, int]) -> bool:
    with PinnedPool(1 << 20) as pool:
        arrived = _Relay(device, pool, delays).run(rounds, "loop", is_ordered=False)
        hmi_kernels.wait_for_copies()
    return arrived != _expected(rounds)


def check(platform: Platform) -> str:
    """The relay by every method, either stream late; then without events."""
    if platform.is_dry:
        return _check_emulated()
    delays = [(0, 0), (COPY_DELAY_CYCLES, 0), (0, KERNEL_DELAY_CYCLES)]
    with platform.backend("cuda"), faults_raised(platform):
        gpu = _Gpu(platform.device)
        for method in METHODS:
            for delay in delays:
                _require_right(gpu, method, ROUNDS if delay == (0, 0) else ROUNDS // 4, delay)
        if not _is_wrong_without_events(gpu, DRY_ROUNDS, delays[1]):
            raise CheckFailedError("without events the copies still came in time: this check sees nothing")
    return f"{len(METHODS)} methods, {ROUNDS} rounds and 2 x {ROUNDS // 4} delayed; wrong without events"


def _check_emulated() -> str:
    from emulator.device_streams import SCHEDULES, emulated_device  # type: ignore[import-not-found]

    noticed = 0
    for schedule in SCHEDULES:
        with emulated_device(schedule) as opened:
            device = _Emulated(opened)
            for method in METHODS:
                _require_right(device, method, DRY_ROUNDS, (0, 0))
            noticed += _is_wrong_without_events(device, DRY_ROUNDS, (0, 0))
    if not noticed:
        raise CheckFailedError(
            "without events nothing goes wrong under any schedule: this check sees nothing"
        )
    return (
        f"{len(METHODS)} methods under {len(SCHEDULES)} schedules of the emulated streams; "
        f"wrong without events under {noticed}"
    )


if __name__ == "__main__":
    sys.exit(run_check(check))
