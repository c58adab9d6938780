"""What an engine runs on, as far as the simulation knows it: what stages cost, and how data comes."""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hmi_engine.schedule.cost_model import StageCoefficients

__all__ = ["FREE", "Costs", "Disk", "Link", "Machine", "Tolls", "Variation"]

FREE = StageCoefficients(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Costs:
    """Seconds of processor time that each stage takes for a batch, alone on the machine.

    Attributes:
        admit: finding tenants, tokenising and queueing, on the admitting thread; of its requests' tokens.
        form: choosing a batch, and giving its answers to their callers, on the computing thread.
        fetch: beside the waiting for a disk and a link; tenants and bytes are those that were not in memory.
        search: n-grams, packing.
        compute: merge, layers, heads; bytes are those of the batch's weights.
        respond: labels, scores.
    """

    admit: StageCoefficients = FREE
    form: StageCoefficients = FREE
    fetch: StageCoefficients = FREE
    search: StageCoefficients = FREE
    compute: StageCoefficients = FREE
    respond: StageCoefficients = FREE


@dataclass(frozen=True)
class Variation:
    """What batches took to compute, over what their costs say.

    Costs are linear, and fitted so that stalls count for little: small batches take less than that, and some
    of any size take far longer. Queues behind those are what latency is made of.

    Attributes:
        tokens: ascending; a batch belongs to the last of these that it has.
        ratios: for each of them quantiles, all as far apart, of which one is drawn for a batch.
    """

    tokens: tuple[float, ...] = (0.0,)
    ratios: tuple[tuple[float, ...], ...] = ((1.0,),)

    @classmethod
    def of(cls, observed: Sequence[tuple[float, float]], *, group: int, quantiles: int) -> Variation:
        """Of tokens and ratios: quantiles of so many batches of like sizes at a time, or a few more."""
        ordered = sorted(observed)
        places = (np.arange(quantiles) + 0.5) / quantiles
        groups = np.array_split(np.array(ordered), max(1, len(ordered) // group))
        return cls(
            (0.0, *(float(each[0, 0]) for each in groups[1:])),
            tuple(tuple(np.quantile(each[:, 1], places).tolist()) for each in groups),
        )

    def draw(self, tokens: float, generator: np.random.Generator) -> float:
        """For a batch."""
        ratios = self._ratios(tokens)
        return ratios[int(generator.integers(len(ratios)))]

    def mean(self, tokens: float) -> float:
        """Of batches of this size."""
        ratios = self._ratios(tokens)
        return sum(ratios) / len(ratios)

    def _ratios(self, tokens: float) -> tuple[float, ...]:
        return self.ratios[max(0, bisect.bisect_right(self.tokens, tokens) - 1)]


@dataclass(frozen=True)
class Tolls:
    """Seconds that computing loses to what goes on beside it, over its share of the cores.

    Whoever wakes up gets a core at once, and the team of threads that computes waits for the one of its
    threads that had it; it is computing that stops, not those who wake up.

    Attributes:
        batch: of each batch that is served, over the same batch alone on the machine.
        tenant: for each tenant that is read, by threads that wake up for it when the disk has answered.
    """

    batch: float = 0.0
    tenant: float = 0.0

    def times(self, slowness: float) -> Tolls:
        """On a machine that is so many times as slow."""
        return Tolls(slowness * self.batch, slowness * self.tenant)


@dataclass(frozen=True)
class Disk:
    """Reads: bytes come one read after another, and each read is answered so much later.

    As ``hmi_kernels.set_read_latency`` simulates one for the real engine.

    Attributes:
        seconds_each: that an answer takes beside its bytes.
        bytes_per_second: of all reads together.
        in_flight: reads that wait at a time.
    """

    seconds_each: float = 0.0
    bytes_per_second: float = math.inf
    in_flight: int = 8

    def seconds(self, sizes: Sequence[int]) -> float:
        """Until reads of these sizes have ended, which begin in this order as threads become free."""
        threads = [0.0] * self.in_flight
        delivered = 0.0
        for size in sizes:
            delivered = max(delivered, threads[0]) + size / self.bytes_per_second
            heapq.heapreplace(threads, delivered + self.seconds_each)
        return max(threads)


@dataclass(frozen=True)
class Link:
    """Copies from host to device, one after another: seconds for each, and for its bytes."""

    seconds_each: float
    bytes_per_second: float

    def seconds(self, copies: int, num_bytes: int) -> float:
        """For so many copies of so many bytes together."""
        return copies * self.seconds_each + num_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Machine:
    """One engine's machine and options.

    Attributes:
        costs: of the stages.
        arena_bytes: for adapters where they are computed with.
        host_bytes: for the tier before it; None where what the arena lacks is read from disk.
        disk: reads.
        link: copies into the arena; None where reads go straight into it.
        cores: of the processor, shared by all threads.
        compute_cores: that compute asks for of these; 0 for a device of its own.
        contention: how many times as slow computing and the thread that prepares are, while they share
            cores, as their shares alone would make them.
        admission_contention: the same of computing and the thread that admits.
        tolls: what computing loses beside other threads; only where it takes cores.
        admission_delay: seconds until the admitting thread runs that has slept, while something computes.
            what arrives in this time is admitted together.
        variation: what batches took to compute, over what their costs say.
        upper_layers: of the model; of a batch's copies each layer waits for its own part only.
        depth: most batches in flight.
        max_batch_tokens: of a batch.
        latency_target: seconds, by which batches are sized as the engine does; None for the largest.
        looks_ahead: whether tenants of requests that wait are loaded before their batch is formed.
    """

    costs: Costs
    arena_bytes: int
    host_bytes: int | None = None
    disk: Disk = Disk()
    link: Link | None = None
    cores: float = math.inf
    compute_cores: float = 0.0
    contention: float = 1.0
    admission_contention: float = 1.0
    tolls: Tolls = Tolls()
    admission_delay: float = 0.0
    variation: Variation = Variation()
    upper_layers: int = 1
    depth: int = 2
    max_batch_tokens: int = 8192
    latency_target: float | None = None
    looks_ahead: bool = True

    @property
    def batch_bytes(self) -> int:
        """What a batch's tenants take at most, so that those in flight fit beside each other."""
        return self.arena_bytes // max(2, self.depth)
