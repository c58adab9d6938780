"""The tier between files and a device's arena: tenants' parameters in host memory, page-locked for a GPU."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

import hmi_kernels
from hmi_engine.errors import HmiError, OverloadedError
from hmi_engine.memory.eviction import DemandQueue, FrequencyPerByte, Tickets
from hmi_engine.memory.residency_statistics import HostStatistics
from hmi_engine.memory.streams import Arrival, DeviceStreams, HostStreams, StreamEvent
from hmi_engine.memory.tenant_reader import Digest, TenantReader, WantedParameters, digest_of

__all__ = ["HostTier"]


class HostTier:
    """Keeps parameters that files gave, under a byte budget; a :class:`ParameterSource` for an arena.

    It is asked for what the arena lacks, so its frequencies are those of the arena's misses: what the arena
    holds all the time is not wanted here, and leaves first. One thread at a time loads; the others need not
    wait while it reads.
    """

    def __init__(self, reader: TenantReader, budget_bytes: int, streams: DeviceStreams | None = None) -> None:
        """Empty; the arena is on the device of ``streams``, by default the CPU."""
        self._reader = reader
        self._streams = streams or HostStreams()
        self._pool = hmi_kernels.PinnedPool(budget_bytes)
        self._blocks: dict[Digest, Tensor] = {}
        self._queue = DemandQueue[Digest](FrequencyPerByte())
        self._statistics = HostStatistics()
        self._lock = threading.RLock()  # not held while files are read

    @property
    def statistics(self) -> HostStatistics:
        """Counts, and what is in memory now."""
        self._statistics.resident_tenants = len(self._blocks)
        self._statistics.resident_bytes = self._pool.bytes_in_use
        self._statistics.reserved_bytes = self._pool.bytes_reserved
        return self._statistics

    def load(self, wanted: Sequence[WantedParameters]) -> list[HmiError | Arrival | None]:
        """Copies parameters to their destinations; reads first what is not here, as much at once as fits.

        Copies to a GPU are under way when this returns; their arrivals say when they have come.
        """
        missing, known = self._load_known(wanted)
        results: list[HmiError | Arrival | None] = [known] * len(wanted)
        while missing:
            with self._lock:
                blocks = self._take_blocks([wanted[number] for number in missing])
            if not blocks:
                results[missing[0]] = self._too_large(wanted[missing[0]])
                missing = missing[1:]
                continue
            wave, missing = missing[: len(blocks)], missing[len(blocks) :]
            for number, outcome in zip(wave, self._read([wanted[n] for n in wave], blocks), strict=True):
                results[number] = outcome
            del blocks  # or evicting what lies in them would free nothing for the next wave
        return results

    def _load_known(self, wanted: Sequence[WantedParameters]) -> tuple[list[int], Arrival | None]:
        """Copies what is here; returns the numbers of the others, and when what is here has come."""
        with self._lock:
            here = [each for each in wanted if digest_of(each.info) in self._blocks]
            arrival = self._copy(here, [self._blocks[digest_of(each.info)] for each in here])
            for each in here:
                self._queue.used(digest_of(each.info), each.layout.data_bytes)
            missing = [n for n, each in enumerate(wanted) if digest_of(each.info) not in self._blocks]
            self._statistics.hits += len(here)
            self._statistics.misses += len(missing)
            return missing, arrival

    def expect(self, digests: Sequence[Digest]) -> Tickets[Digest]:
        """Notes what queued requests will need; it stays as long as something else can go."""
        with self._lock:
            first = self._queue.next_number
            try:
                return self._queue.expect(digests)
            except BaseException:  # such as Ctrl-C's: nobody knows the tickets
                self._queue.forget_from(first)
                raise

    def release(self, tickets: Tickets[Digest]) -> None:
        """Forgets requests that have run or will not."""
        with self._lock:
            self._queue.release(tickets)

    def digests(self) -> list[Digest]:
        """Whose parameters are here."""
        with self._lock:
            return list(self._blocks)

    def forget(self, digest: Digest) -> None:
        """Drops parameters that nobody will ask for again."""
        with self._lock:
            self._queue.forget(digest)
            self._blocks.pop(digest, None)

    def close(self) -> None:
        """Gives all memory back."""
        with self._lock:
            self._blocks.clear()
            self._pool.close()

    def _take_blocks(self, wanted: Sequence[WantedParameters]) -> list[Tensor]:
        """Memory for as many of ``wanted``, from the first on, as fit together."""
        blocks: list[Tensor] = []
        for each in wanted:
            block = self._take_block(each.layout.num_elements)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _take_block(self, num_elements: int) -> Tensor | None:
        while True:
            try:
                return self._pool.empty(num_elements, self._reader.dtype)
            except (hmi_kernels.PoolExhaustedError, hmi_kernels.CudaError):
                hmi_kernels.wait_for_copies()  # which keep memory of tenants that were evicted before
                victim = self._queue.evict()
                if victim is None:  # unless an exception came before it was offered, or left
                    victim = next(iter(self._blocks), None)
                if victim is None:
                    return None
                del self._blocks[victim]
                self._statistics.evictions += 1

    def _read(
        self, wave: Sequence[WantedParameters], blocks: Sequence[Tensor]
    ) -> list[HmiError | Arrival | None]:
        """Reads files into blocks, and copies what was read; what failed leaves nothing behind."""
        read = [each._replace(destination=block) for each, block in zip(wave, blocks, strict=True)]
        errors = self._reader.load(read)
        good = [number for number, error in enumerate(errors) if error is None]
        with self._lock:
            arrival = self._copy([wave[n] for n in good], [blocks[n] for n in good])
            for number in good:
                digest = digest_of(wave[number].info)
                self._blocks[digest] = blocks[number]
                self._queue.used(digest, wave[number].layout.data_bytes)
                self._queue.offer(digest)
        return [arrival if error is None else error for error in errors]

    def _copy(self, wanted: Sequence[WantedParameters], blocks: Sequence[Tensor]) -> Arrival | None:
        """Copies blocks to their destinations: to a GPU a layer of all tenants, then the next, then heads."""
        destinations = [each.destination for each in wanted]
        if not self._streams.is_asynchronous or not wanted:
            self._streams.copy(destinations, blocks)
            return None
        pieces: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        heads: list[tuple[Tensor, Tensor]] = []
        for each, block in zip(wanted, blocks, strict=True):
            end = 0
            for layer, (start, end) in each.layout.layer_spans.items():
                pieces[layer].append((each.destination[start:end], block[start:end]))
            if end < len(block):
                heads.append((each.destination[end:], block[end:]))
        events: dict[int, StreamEvent] = {}
        for layer in sorted(pieces):
            self._streams.copy(*zip(*pieces[layer], strict=True))
            events[layer] = self._streams.record("copy")
        if heads:
            self._streams.copy(*zip(*heads, strict=True))
        return Arrival(events, self._streams.record("copy"))

    def _too_large(self, wanted: WantedParameters) -> OverloadedError:
        return OverloadedError(
            f"tenant {wanted.info.name!r} needs {wanted.layout.data_bytes} bytes of host memory, more than "
            f"all {self._pool.budget_bytes} bytes; give the engine more host_memory"
        )
