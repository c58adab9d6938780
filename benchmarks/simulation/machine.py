"""What an engine runs on, as far as the simulation knows it: what stages cost, and how data comes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hmi_engine.schedule.cost_model import StageCoefficients

__all__ = ["FREE", "Costs", "Machine", "Transfer"]

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
class Transfer:
    """How pieces of data come from a disk or over a link.

    Attributes:
        seconds_each: until a piece begins to come.
        bytes_per_second: of all together.
        in_flight: how many are waited for at a time.
    """

    seconds_each: float = 0.0
    bytes_per_second: float = math.inf
    in_flight: int = 1

    def seconds(self, pieces: int, num_bytes: int) -> float:
        """For so many pieces of so many bytes together: waiting in waves, then bytes one after another."""
        return math.ceil(pieces / self.in_flight) * self.seconds_each + num_bytes / self.bytes_per_second


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
        upper_layers: of the model; of a batch's copies each layer waits for its own part only.
        depth: most batches in flight.
        max_batch_tokens: of a batch.
        looks_ahead: whether tenants of requests that wait are loaded before their batch is formed.
    """

    costs: Costs
    arena_bytes: int
    host_bytes: int | None = None
    disk: Transfer = Transfer()
    link: Transfer | None = None
    cores: float = math.inf
    compute_cores: float = 0.0
    upper_layers: int = 1
    depth: int = 2
    max_batch_tokens: int = 8192
    looks_ahead: bool = True

    @property
    def batch_bytes(self) -> int:
        """What a batch's tenants take at most, so that those in flight fit beside each other."""
        return self.arena_bytes // max(2, self.depth)
