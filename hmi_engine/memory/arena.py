"""One flat block of memory that holds the parameters of all resident tenants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from hmi_engine.memory.ranges import RangeAllocator
from hmi_engine.memory.streams import DeviceStreams, HostStreams

__all__ = ["AdapterArena"]

_GRANULE = 1024  # elements; of float32 whole pages, so that a load never shares one with another tenant


class AdapterArena:
    """A block of one dtype with best-fit allocation; what lies in pieces can be slid together.

    The operating system gives pages as tenants arrive, so an unused capacity costs nothing. Not thread-safe.
    """

    def __init__(
        self,
        capacity_bytes: int,
        streams: DeviceStreams | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """On the device of ``streams``, whose stream ``copy`` does all that is done here; default the CPU."""
        granules = capacity_bytes // (_GRANULE * dtype.itemsize)
        self._streams = streams or HostStreams()
        self.memory = torch.empty(granules * _GRANULE, dtype=dtype, device=self._streams.device)
        self._ranges = RangeAllocator(granules)

    @property
    def capacity_bytes(self) -> int:
        """Size of the block."""
        return self.memory.nbytes

    @property
    def used_bytes(self) -> int:
        """Bytes in allocated ranges."""
        return self._ranges.used * _GRANULE * self.memory.itemsize

    @property
    def free_bytes(self) -> int:
        """Bytes in free ranges, which may lie apart."""
        return self._ranges.free * _GRANULE * self.memory.itemsize

    def bytes_of(self, num_elements: int) -> int:
        """Bytes that an allocation of ``num_elements`` takes here."""
        return self.allocated_bytes(num_elements, self.memory.dtype)

    @staticmethod
    def allocated_bytes(num_elements: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that an allocation of ``num_elements`` takes in an arena of this dtype."""
        return _granules(num_elements) * _GRANULE * dtype.itemsize

    def allocate(self, num_elements: int) -> int | None:
        """Element offset of a free range, or None where no range is long enough."""
        start = self._ranges.allocate(_granules(num_elements))
        return None if start is None else start * _GRANULE

    def release(self, offset: int) -> None:
        """Gives back a range that ``allocate`` returned or ``slide`` moved."""
        self._ranges.release(offset // _GRANULE)

    def keep_only(self, allocated: Mapping[int, int]) -> None:
        """Frees all but some allocations, elements by offset, whatever state an exception has left."""
        self._ranges.keep_only(
            {offset // _GRANULE: _granules(num_elements) for offset, num_elements in allocated.items()}
        )

    def slide(
        self, num_elements: int, fixed: Iterable[int] = (), *, most: float = math.inf
    ) -> dict[int, int] | None:
        """Makes a free range of ``num_elements`` by moving others, contents and all, but none of ``fixed``.

        Returns the new offsets of what was moved, by the old ones; None, and nothing has moved, where this
        cannot be, or not by moving ``most`` elements.
        """
        moves = self._ranges.slide(
            _granules(num_elements), (offset // _GRANULE for offset in fixed), most=most / _GRANULE
        )
        if moves is None:
            return None
        for move in moves:
            source, target, length = (number * _GRANULE for number in move)
            with self._streams.on("copy"):  # by way of another copy, as the two may overlap
                self.memory[target : target + length] = self.memory[source : source + length].clone()
        return {move.start * _GRANULE: move.target * _GRANULE for move in moves}

    def clear_tail(self, offset: int, num_elements: int) -> None:
        """Sets to zero what an allocation has beyond its ``num_elements``."""
        with self._streams.on("copy"):
            self.memory[offset + num_elements : offset + _granules(num_elements) * _GRANULE] = 0.0

    def close(self) -> None:
        """Gives the memory back; nothing can be allocated any more."""
        self._streams.synchronize()
        self.memory = torch.empty(0, dtype=self.memory.dtype, device=self.memory.device)
        self._ranges = RangeAllocator(0)


def _granules(num_elements: int) -> int:
    return max(1, -(-num_elements // _GRANULE))
