"""Where a device's work is put, and in what order it runs: streams to copy, to gather and to compute.

All that touches a device's memory stands in ``with streams.on(name)``; what a host prepares for it, outside.
Work of one stream runs in the order in which it was put there, beside that of the others, and some time after
the host has gone on: who needs what another stream does lets his own wait for an event of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

import hmi_kernels

__all__ = [
    "Arrival",
    "CudaStreams",
    "DeviceGraph",
    "DeviceStreams",
    "HostStreams",
    "StreamEvent",
    "StreamName",
]

Captured = TypeVar("Captured")

StreamName = Literal["copy", "gather", "compute"]
"""``copy``: adapters; ``gather``: a batch's inputs and PLOT rows, and their merge; ``compute``: layers."""

STREAM_NAMES: tuple[StreamName, ...] = ("copy", "gather", "compute")


class StreamEvent(Protocol):
    """A place in a stream: all that was put there before."""

    def query(self) -> bool:
        """Whether all of it has run."""

    def synchronize(self) -> None:
        """Waits until it has."""


class DeviceGraph(Protocol):
    """Work that was captured: what a replay reads and writes lies where it lay then."""

    def replay(self) -> None:
        """Puts all of it on its stream once more, by one call."""


class DeviceStreams(Protocol):
    """The streams of one device. Safe to use from many threads."""

    device: torch.device
    is_asynchronous: bool
    """Whether the host goes on before what it put on a stream has run."""
    preferred_dtype: torch.dtype
    """What engines compute in there unless they are told otherwise."""
    has_graphs: bool
    """Whether ``capture`` can be called."""

    def on(self, stream: StreamName) -> AbstractContextManager[None]:
        """What the block does on the device is put on this stream."""

    def record(self, stream: StreamName) -> StreamEvent:
        """The event that all of this stream so far has run."""

    def wait(self, stream: StreamName, event: StreamEvent) -> None:
        """What is put on the stream from now on runs after the event. The host does not wait."""

    def copy(self, destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Puts copies on the stream ``copy``: contiguous tensors of equal sizes, here and in host memory."""

    def capture(self, stream: StreamName, work: Callable[[], Captured]) -> tuple[DeviceGraph, Captured]:
        """A graph of what ``work`` puts on the stream, which is not run, and the tensors for its results.

        ``work`` waits for no event and reads nothing on the host. It has run before: a kernel's first launch
        may do more. Raises RuntimeError on what cannot be captured.
        """

    def synchronize(self) -> None:
        """Waits until all that was put on the device has run."""

    def pinned(self, num_bytes: int) -> Tensor:
        """Host memory that is copied from and to the device beside other work: uint8 [num_bytes]."""


class _Done:
    """An event of a device that has done all when the host goes on."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class HostStreams:
    """The CPU: everything runs at once."""

    device = torch.device("cpu")
    is_asynchronous = False
    preferred_dtype = torch.float32
    has_graphs = False

    def on(self, stream: StreamName) -> AbstractContextManager[None]:
        """Changes nothing."""
        return nullcontext()

    def record(self, stream: StreamName) -> StreamEvent:
        """An event that is done."""
        return _Done()

    def wait(self, stream: StreamName, event: StreamEvent) -> None:
        """There is nothing to wait for."""

    def copy(self, destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copies, on as many threads as that is worth."""
        hmi_kernels.copy_batch_async(destinations, sources)

    def capture(self, stream: StreamName, work: Callable[[], Captured]) -> tuple[DeviceGraph, Captured]:
        """The CPU has none."""
        raise RuntimeError("the CPU has no graphs")

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def pinned(self, num_bytes: int) -> Tensor:
        """Ordinary memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)


class CudaStreams:
    """Streams of a GPU, by torch."""

    is_asynchronous = True
    has_graphs = True

    def __init__(self, device: torch.device) -> None:
        """Makes them on ``cuda:<index>``."""
        self.device = device
        with torch.cuda.device(device):
            # Not where torch only emulates it, in float32 and slower than that.
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        self.preferred_dtype = torch.bfloat16 if has_bfloat16 else torch.float16
        self._streams = {name: torch.cuda.Stream(device) for name in STREAM_NAMES}
        # Without compiled CUDA kernels (Triton alone) there are no batches of copies.
        self._has_batches = hmi_kernels.backends()["cuda"].available
        self._graph_memory: Any = None

    def on(self, stream: StreamName) -> AbstractContextManager[None]:
        """Makes it torch's current stream, and the device the current one."""
        context: AbstractContextManager[None] = torch.cuda.stream(self._streams[stream])
        return context

    def record(self, stream: StreamName) -> StreamEvent:
        """An event of torch."""
        event = torch.cuda.Event()
        event.record(self._streams[stream])
        return event

    def wait(self, stream: StreamName, event: StreamEvent) -> None:
        """The stream waits on the device."""
        assert isinstance(event, torch.cuda.Event)
        self._streams[stream].wait_event(event)

    def copy(self, destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """One call for all; sources stay alive until it has run."""
        if not destinations:
            return
        if self._has_batches:
            hmi_kernels.copy_batch_async(destinations, sources, stream=self._streams["copy"])
            return
        with self.on("copy"):  # from ordinary memory, which torch copies elsewhere before it returns
            for destination, source in zip(destinations, sources, strict=True):
                destination.copy_(source, non_blocking=True)

    def capture(self, stream: StreamName, work: Callable[[], Captured]) -> tuple[DeviceGraph, Captured]:
        """A CUDA graph; all of them share memory for what lies between, as one stream runs them in turn."""
        if self._graph_memory is None:
            self._graph_memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on with copies meanwhile.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(
                graph,
                pool=self._graph_memory,
                stream=self._streams[stream],
                capture_error_mode="thread_local",
            ),
        ):
            results = work()
        return _CudaGraph(graph, self._streams[stream]), results

    def synchronize(self) -> None:
        """Waits for the device: for torch's own stream too."""
        torch.cuda.synchronize(self.device)

    def pinned(self, num_bytes: int) -> Tensor:
        """Page-locked memory of torch's."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class _CudaGraph:
    """A graph of torch, replayed on the stream that it was captured of."""

    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        self._graph, self._stream = graph, stream

    def replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()


class Arrival:
    """When the parameters that one batch of copies brings are on the device: by layer, then the heads."""

    def __init__(self, layers: Mapping[int, StreamEvent] | None, everything: StreamEvent) -> None:
        """Of events that the adapters of a layer have come, by its index, and that everything has.

        Without ``layers`` nothing is known to have come before everything has.
        """
        self._layers = layers
        self.everything = everything
        self._has_come = False

    def before_layer(self, index: int) -> StreamEvent | None:
        """What a layer has to wait for; None where no adapter of it comes."""
        return self.everything if self._layers is None else self._layers.get(index)

    @property
    def has_come(self) -> bool:
        """Whether nobody has to wait any more."""
        self._has_come = self._has_come or self.everything.query()
        return self._has_come
