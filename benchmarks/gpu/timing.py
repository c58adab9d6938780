"""Time on the device: by events, with the caches flushed before and the launches queued ahead.

A sample is: overwrite a buffer of twice the second-level cache; let the device idle (``torch.cuda._sleep``)
while the host queues the rest; event; the call; event. So a sample holds no time of the host, unless a call
queues more launches than the driver takes (1,024); what a call costs the host is measured apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.gpu.roofline import Peak
from hmi_engine.demo.timing import median

__all__ = ["Call", "DeviceTimer", "measure_peak", "measure_seconds"]

Call = Callable[[], object]

PROBE_CYCLES = 10_000_000
SLACK_SECONDS = 50e-6
LONGEST_SLEEP_SECONDS = 0.02
PEAK_COPY_BYTES = 1 << 30
PEAK_PRODUCT_SIZE = 8192
PEAK_REPETITIONS = 10


class DeviceTimer:
    """Times calls on one CUDA device, in turn, so that drift hits all alike."""

    def __init__(self, device: torch.device, *, repetitions: int) -> None:
        self._device = device
        self._repetitions = repetitions
        flush_bytes = 2 * max(torch.cuda.get_device_properties(device).L2_cache_size, 1 << 20)
        self._flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)
        self._cycles_per_second = PROBE_CYCLES / self._seconds(lambda: torch.cuda._sleep(PROBE_CYCLES))

    def eager(self, calls: Mapping[str, Call]) -> dict[str, list[float]]:
        """Seconds of each call, by name, one sample a repetition; each is called three times before."""
        hosts = {name: self.host(call) for name, call in calls.items()}
        return self._in_turn(calls, {name: 1.5 * host + SLACK_SECONDS for name, host in hosts.items()})

    def graphs(self, graphs: Mapping[str, torch.cuda.CUDAGraph]) -> dict[str, list[float]]:
        """Seconds of a replay of each graph."""
        return self._in_turn(
            {name: graph.replay for name, graph in graphs.items()}, dict.fromkeys(graphs, SLACK_SECONDS)
        )

    def host(self, call: Call) -> float:
        """Seconds for which a call keeps the host busy: the least of five, the device idle before each."""
        call()
        samples = []
        for _ in range(5):
            torch.cuda.synchronize(self._device)
            started = time.perf_counter()
            call()
            samples.append(time.perf_counter() - started)
        torch.cuda.synchronize(self._device)
        return min(samples)

    def capture(self, call: Call) -> torch.cuda.CUDAGraph | None:
        """A graph of one call, which has run before; None if the call cannot be captured."""
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            torch.cuda.synchronize(self._device)
            return None
        graph.replay()
        torch.cuda.synchronize(self._device)
        return graph

    def _in_turn(self, calls: Mapping[str, Call], sleeps: Mapping[str, float]) -> dict[str, list[float]]:
        names = list(calls)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(self._repetitions):
            shift = number % len(names) if names else 0
            for name in names[shift:] + names[:shift]:
                self._flush.zero_()
                sleep = min(sleeps[name], LONGEST_SLEEP_SECONDS)
                torch.cuda._sleep(int(sleep * self._cycles_per_second))
                seconds[name].append(self._seconds(calls[name]))
        return seconds

    def _seconds(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def measure_peak(device: torch.device) -> Peak:
    """The device's best as found: a copy of 1 GiB (read and written), a bfloat16 product of 8192^3."""
    buffers = torch.empty(2, PEAK_COPY_BYTES, dtype=torch.int8, device=device)
    copy = measure_seconds(lambda: buffers[0].copy_(buffers[1]))
    shape = (PEAK_PRODUCT_SIZE, PEAK_PRODUCT_SIZE)
    left, right = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = measure_seconds(lambda: left @ right)
    return Peak(2 * PEAK_COPY_BYTES / copy, 2 * PEAK_PRODUCT_SIZE**3 / product)


def measure_seconds(call: Call) -> float:
    """The median of ten calls, warm, for choices between ways and for peaks."""
    samples = []
    for number in range(PEAK_REPETITIONS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if number >= 3:
            samples.append(begin.elapsed_time(end) / 1e3)
    return median(samples)
