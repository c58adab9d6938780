"""Fixed memory through which batches go to a device: a ring of slots, each for one batch in flight."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from hmi_engine.memory.streams import DeviceStreams

__all__ = ["BatchSlot", "Shape", "SlotRing", "StagedBuffer", "views_of"]

_ALIGNMENT = 256
_FIRST_BYTES = 1 << 20

Shape = tuple[torch.Size | tuple[int, ...], torch.dtype]


def views_of(memory: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Parts of ``memory``, uint8 [bytes], one behind the other and each aligned for any kernel."""
    return [
        memory[start : start + _num_bytes(shape, dtype)].view(dtype).view(shape)
        for start, (shape, dtype) in zip(_starts(shapes), shapes, strict=False)
    ]


def _num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _starts(shapes: Sequence[Shape]) -> list[int]:
    """Where each begins, and where one more would."""
    sizes = (-(-_num_bytes(*each) // _ALIGNMENT) * _ALIGNMENT for each in shapes)
    return list(accumulate(sizes, initial=0))


class StagedBuffer:
    """Page-locked memory of the host and as much of the device's: what is written there is copied here.

    It grows to what the largest batch needs, and then stays. Not thread-safe.
    """

    def __init__(self, streams: DeviceStreams) -> None:
        """Has no memory yet."""
        self._streams = streams
        self._host = self._device = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def lay_out(self, shapes: Sequence[Shape]) -> list[tuple[Tensor, Tensor]]:
        """For each shape and dtype a tensor in host memory, to be written before ``send``, and its copy's.

        What was laid out before must not be in use any more.
        """
        self._used = _starts(shapes)[-1]
        self._reserve(self._used)
        return list(zip(views_of(self._host, shapes), views_of(self._device, shapes), strict=True))

    @property
    def laid_out(self) -> Tensor:
        """What was laid out last, as it is on the device: uint8 [bytes], whose parts ``views_of`` gives."""
        return self._device[: self._used]

    def send(self) -> None:
        """Puts the copy of all that was laid out on the stream ``gather``."""
        with self._streams.on("gather"):
            self._device[: self._used].copy_(self._host[: self._used], non_blocking=True)

    def upload(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Lays out, writes and sends tensors of host memory; returns those of the device."""
        places = self.lay_out([(tensor.shape, tensor.dtype) for tensor in tensors])
        for tensor, (host, _) in zip(tensors, places, strict=True):
            host.copy_(tensor)
        self.send()
        return [device for _, device in places]

    def _reserve(self, num_bytes: int) -> None:
        if num_bytes <= self._host.numel():
            return
        capacity = max(_FIRST_BYTES, 1 << (num_bytes - 1).bit_length())
        self._host = self._streams.pinned(capacity)
        self._device = torch.empty(capacity, dtype=torch.uint8, device=self._streams.device)


class BatchSlot:
    """What one batch in flight needs.

    Attributes:
        inputs: token ids, offsets, row references, tables of its adapters.
        rows: PLOT rows that do not lie on the device.
        graph_tables: what graphs of its layers read beside hidden states.

    All go by the stream ``gather``: by ``copy`` they would come after the adapters of all layers.
    """

    def __init__(self, streams: DeviceStreams) -> None:
        """Memory is taken when batches need it."""
        self.inputs = StagedBuffer(streams)
        self.rows = StagedBuffer(streams)
        self.graph_tables = StagedBuffer(streams)
        self._streams = streams
        self._results = torch.empty(0)

    def results(self, num_elements: int) -> Tensor:
        """Page-locked float32 [num_elements] for what the batch gives."""
        if num_elements > self._results.numel():
            self._results = self._streams.pinned(4 << (num_elements - 1).bit_length()).view(torch.float32)
        return self._results[:num_elements]


class SlotRing:
    """As many slots as there may be batches in flight. Thread-safe."""

    def __init__(self, streams: DeviceStreams, num_slots: int) -> None:
        """All are free."""
        self._free = [BatchSlot(streams) for _ in range(num_slots)]
        self._lock = threading.Lock()

    def take(self) -> BatchSlot:
        """A free slot; raises RuntimeError if there are more batches in flight than slots."""
        with self._lock:
            if not self._free:
                raise RuntimeError("more batches are in flight than there are slots")
            return self._free.pop(0)

    def give_back(self, slot: BatchSlot) -> None:
        """Frees a slot whose batch has ended, on the device too."""
        with self._lock:
            self._free.append(slot)
