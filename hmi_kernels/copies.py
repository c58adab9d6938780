"""Batches of copies between host and device, and events that say how far a stream has come."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hmi_kernels.cuda import driver
from hmi_kernels.native import native

__all__ = ["COPY_METHODS", "CopyEvent", "copy_batch_async", "release_finished", "wait_for_copies"]

COPY_METHODS = ("auto", "loop", "batch", "kernel")


class CopyEvent:
    """A place in a stream: copies under way, or what :meth:`record` was called after.

    Streams are named by their handle or as ``torch.cuda.Stream``; None is torch's current stream. Without a
    GPU, and before the first :meth:`record`, an event is done.
    """

    def __init__(self) -> None:
        self._event: Any = None

    def record(self, stream: int | torch.cuda.Stream | None = None) -> None:
        """From now on this event is all that was submitted to the stream so far.

        Raises CudaError. Does nothing where CUDA cannot be used.
        """
        if driver.reason():
            return
        # A new one: copies under way are kept by the old.
        event = driver.module().Event()
        if isinstance(stream, torch.cuda.Stream):
            with torch.cuda.device(stream.device):
                event.record(stream.cuda_stream)
        else:
            event.record(_handle(stream, None))
        self._event = event

    def wait(self, stream: int | torch.cuda.Stream | None = None) -> None:
        """Lets whatever is submitted to the stream from now on wait for this event. The host does not wait.

        Raises CudaError.
        """
        if self._event is not None:
            self._event.wait(_handle(stream, self._event.device))

    def query(self) -> bool:
        """Whether it is done. Raises CudaError if something that the device did has failed."""
        return self._event is None or bool(self._event.query())

    def synchronize(self) -> None:
        """Waits until it is done. Raises CudaError if something that the device did has failed."""
        if self._event is not None:
            self._event.synchronize()

    def keep(self, *tensors: Tensor) -> None:
        """Keeps tensors, and so their memory, until the event is done.

        For work other than :func:`copy_batch_async` that reads memory of a :class:`PinnedPool` or writes to
        it: record an event after the work, and let it keep the tensors.
        """
        if self._event is not None:
            _under_way.append(_UnderWay(self._event, tensors))


def copy_batch_async(
    destinations: Sequence[Tensor],
    sources: Sequence[Tensor],
    *,
    stream: int | torch.cuda.Stream | None = None,
    method: str = "auto",
) -> CopyEvent:
    """Starts copying ``sources[i]`` to ``destinations[i]``, all in one call, and returns without waiting.

    Semantics: ``destinations[i].view(bytes)[:] = sources[i].view(bytes)`` in stream order. Both must stay as
    they are until the event is done; they are kept alive until then. To overlap copies with compute, make
    one call per layer and let the compute stream wait for each layer's event in turn::

        copied = [copy_batch_async(slots[l], blocks[l], stream=copy_stream) for l in layers]
        for l in layers:
            copied[l].wait(compute_stream)
            ...

    and before the destinations are overwritten, let the copy stream wait for an event recorded on the
    compute stream after their last use. While the stream is captured into a CUDA graph, keeping the tensors
    alive is the caller's duty, for as long as the graph is used.

    Args:
        destinations, sources: equally many contiguous tensors, of any dtype and shape; each pair of the same
            number of bytes. On one GPU or in host memory. If all are in host memory, they are copied at
            once. Sources should be page-locked (:class:`PinnedPool`): from other memory the host copies.
        stream: handle or torch stream of the tensors' GPU; None for torch's current stream on it.
        method: ``loop`` (a copy each), ``batch`` (one ``cudaMemcpyBatchAsync``: needs CUDA 12.8 and a stream
            that is neither the legacy default nor captured), ``kernel`` (a kernel gathers them from
            page-locked memory: best for many small ones), ``auto`` (by the table in
            ``csrc/cuda/copy_batch.cu``).

    Raises, before anything is copied, TypeError on what is no tensor; ValueError on different numbers or
    sizes, gaps in memory, destinations that share memory with one another or with a source, several GPUs,
    another GPU's stream, an unknown method or one that cannot be used; RuntimeError if CUDA cannot be used.
    Raises CudaError if CUDA refuses; copies that were started have then ended.
    """
    tensors = (*destinations, *sources)
    _check(destinations, sources, method)
    release_finished()
    pieces = (
        [tensor.data_ptr() for tensor in destinations],
        [tensor.data_ptr() for tensor in sources],
        [tensor.nbytes for tensor in sources],
    )
    event = CopyEvent()
    device = _gpu_of(tensors)
    if device is None and not driver.is_emulated():
        _require_host_arguments(stream, method)
        native.copy_pieces(*pieces)
        return event
    handle = _handle(stream, device)
    event._event, _ = driver.module().copy_batch(*pieces, method, handle)
    if not driver.module().is_capturing(handle):
        event.keep(*tensors)
    return event


def release_finished() -> None:
    """Lets go of tensors whose copies are done, as whatever starts copies or asks a pool for memory does."""
    # Without a lock, since to drop a tensor may run anybody's code, this function too.
    for entry in tuple(_under_way):
        if entry.event.query():
            with contextlib.suppress(ValueError):  # another thread was faster
                _under_way.remove(entry)


def wait_for_copies() -> None:
    """Waits for all copies under way, on all streams, and lets go of their tensors."""
    for entry in tuple(_under_way):
        entry.event.synchronize()
    release_finished()


class _UnderWay:
    """Equal to nothing but itself, so that it can be found in a list without comparing tensors."""

    def __init__(self, event: Any, tensors: tuple[Tensor, ...]) -> None:
        self.event = event
        self.tensors = tensors


_under_way: list[_UnderWay] = []


def _check(destinations: Sequence[Tensor], sources: Sequence[Tensor], method: str) -> None:
    if method not in COPY_METHODS:
        raise ValueError(f"method must be one of {', '.join(COPY_METHODS)}, not {method!r}")
    if len(destinations) != len(sources):
        raise ValueError(f"there are {len(destinations)} destinations but {len(sources)} sources")
    for name, tensors in (("destinations", destinations), ("sources", sources)):
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{index}] must be a tensor, not {type(tensor).__name__}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{index}] must be contiguous: call .contiguous() on it")
    for index, (destination, source) in enumerate(zip(destinations, sources, strict=True)):
        if destination.nbytes != source.nbytes:
            raise ValueError(
                f"destinations[{index}] has {destination.nbytes} bytes, but sources[{index}] {source.nbytes}"
            )


def _gpu_of(tensors: Sequence[Tensor]) -> int | None:
    """The index of the one GPU that tensors lie on, None if all are in host memory."""
    devices = {tensor.device for tensor in tensors} - {torch.device("cpu")}
    if not devices:
        return None
    if len(devices) > 1 or (device := devices.pop()).type != "cuda":
        found = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise ValueError(f"destinations and sources must be in host memory and on one GPU, not on {found}")
    if reason := driver.reason():
        raise RuntimeError(f"copies from and to a GPU cannot be used: {reason}")
    return device.index


def _require_host_arguments(stream: int | torch.cuda.Stream | None, method: str) -> None:
    if stream is not None:
        raise ValueError("stream must be None: all tensors are in host memory, where copies have no stream")
    if method not in ("auto", "loop"):
        raise ValueError(f"method {method} cannot be used: all tensors are in host memory")


def _handle(stream: int | torch.cuda.Stream | None, device: int | None) -> int:
    """The address of a stream; raises ValueError if it is known to be another device's."""
    if isinstance(stream, torch.cuda.Stream):
        if device is not None and stream.device.index != device:
            raise ValueError(f"stream is on {stream.device}, but the tensors are on cuda:{device}")
        return int(stream.cuda_stream)
    if stream is not None:
        return stream
    return 0 if driver.is_emulated() else int(torch.cuda.current_stream(device).cuda_stream)
