"""Streams of the emulated CUDA runtime, for tests: work runs as late and in as bad an order as CUDA allows.

A program that orders its streams well gives the same result under every schedule of :data:`SCHEDULES`; one
that forgets an event, or uses a buffer again too early, gives a wrong one under some::

    def program(device: Device) -> None:
        copy, compute = device.stream(), device.stream()
        copied = copy_batch_async([slot], [pinned], stream=copy)
        copied.wait(compute)
        device.submit(compute, kernel)
        device.synchronize(compute)
        assert ...

    assert_right_under_all_schedules(program)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from emulator.harness import emulated
from hmi_kernels.copies import wait_for_copies

__all__ = [
    "ERRORS",
    "NUM_DEVICES",
    "SCHEDULES",
    "Device",
    "Schedule",
    "assert_right_under_all_schedules",
    "assert_wrong_under_some_schedule",
    "emulated_device",
]

NUM_DEVICES = 2
ERRORS = {"out of memory": 2, "launch failure": 719, "invalid value": 1}
"""Numbers of cudaError_t."""


class Schedule(NamedTuple):
    """When submitted work runs: ``immediate``, ``latest`` or ``random`` (by the seed)."""

    order: str
    seed: int = 0


SCHEDULES = (Schedule("immediate"), Schedule("latest"), *(Schedule("random", seed) for seed in range(10)))


class Device:
    """An emulated GPU as a test sees it. Streams are handles, as the functions of hmi_kernels take them."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self._runtime = module.emulator

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: int = 0) -> Tensor:
        """Device memory: torch takes it for host memory, the emulated runtime knows better. Full of NaN."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return torch.frombuffer(self._runtime.DeviceMemory(num_bytes, device), dtype=dtype).view(*shape)

    def stream(self, device: int = 0, *, is_blocking: bool = False) -> int:
        """A new stream; a blocking one is ordered with the legacy default stream, 0."""
        return int(self._runtime.create_stream(device, is_blocking))

    def destroy(self, stream: int) -> None:
        self._runtime.destroy_stream(stream)

    def submit(self, stream: int, kernel: Callable[[], object]) -> None:
        """Adds a kernel, written in Python, to the stream."""
        self._runtime.submit(stream, kernel)

    def synchronize(self, stream: int) -> None:
        self._runtime.synchronize(stream)

    def is_idle(self, stream: int) -> bool:
        """Whether all has run; asking may make one piece of work run."""
        return bool(self._runtime.is_idle(stream))

    def fail_next(self, function: str, error: str, count: int = 1) -> None:
        """Makes the next calls of a function of the CUDA runtime fail; ``cudaLaunchKernel`` for launches."""
        self._runtime.fail_next(function, count, ERRORS[error])

    def take_problems(self) -> list[str]:
        """What a correct program never does and CUDA would not have refused. Empties the list."""
        return list(self._runtime.take_problems())

    def take_last_error(self) -> int:
        """What cudaGetLastError says: the next launch would be blamed for it."""
        return int(self._runtime.last_error())

    @property
    def num_waits_for_unrecorded_events(self) -> int:
        return int(self._runtime.num_waits_for_unrecorded_events())

    @contextlib.contextmanager
    def captured(self, stream: int) -> Iterator[list[int]]:
        """Captures the stream; the list holds the executable graph afterwards."""
        graphs: list[int] = []
        self._runtime.begin_capture(stream)
        try:
            yield graphs
        finally:
            graphs.append(int(self._runtime.end_capture(stream)))

    def launch(self, graph: int, stream: int) -> None:
        self._runtime.launch_graph(graph, stream)


@contextlib.contextmanager
def emulated_device(schedule: Schedule = SCHEDULES[0], variant: str = "plain") -> Iterator[Device]:
    """Backend ``cuda`` on the emulator, with streams under the schedule.

    At the end all that is queued runs, and an AssertionError tells of problems that the test did not take.
    """
    with emulated(variant) as module:
        device = Device(module)
        device.take_problems()
        device.take_last_error()
        module.emulator.set_stream_order(*schedule)
        try:
            yield device
        finally:
            module.emulator.clear_injected_errors()
            module.emulator.set_stream_order("immediate", 0)  # runs what is queued
            wait_for_copies()
            problems = device.take_problems()
        assert not problems, problems


def assert_right_under_all_schedules(program: Callable[[Device], None]) -> None:
    """Runs the program, which asserts what it must, under every schedule."""
    for schedule in SCHEDULES:
        with emulated_device(schedule) as device:
            try:
                program(device)
            except AssertionError as error:
                raise AssertionError(f"under {schedule}: {error}") from error


def assert_wrong_under_some_schedule(program: Callable[[Device], None]) -> None:
    """Demands that a program with a mistake gives a wrong result under a schedule, or a problem."""
    for schedule in SCHEDULES:
        try:
            with emulated_device(schedule) as device:
                program(device)
        except AssertionError:
            return
    raise AssertionError("the program's mistake was not noticed under any schedule")
