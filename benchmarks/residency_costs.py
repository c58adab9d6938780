"""What it costs to bring a tenant into memory and to move one there: a fixed part and one by bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hmi_engine.knowledge.adapters import Site, random_adapter
from hmi_engine.knowledge.changes import NewTenant
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import ClassificationHead
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.knowledge.tenant_file import BlockLayout
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.memory.residency import AdapterResidency
from hmi_engine.memory.slot_tables import SlotTables
from hmi_engine.store import Store

__all__ = ["Cost", "measure_loads", "measure_moves", "mixed_tenants"]

_KINDS = ("bottleneck", "lora", "ia3")
_RANKS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Cost:
    """Microseconds for each, and nanoseconds for each byte of it."""

    fixed_microseconds: float
    nanoseconds_per_byte: float

    @property
    def fixed_bytes(self) -> float:
        """How many bytes take as long as the fixed part."""
        return 1000 * self.fixed_microseconds / self.nanoseconds_per_byte

    def seconds(self, count: int, num_bytes: int) -> float:
        """Of so many, of so many bytes together."""
        return count * self.fixed_microseconds / 1e6 + num_bytes * self.nanoseconds_per_byte / 1e9


def mixed_tenants(general: GeneralInfo, count: int) -> Iterator[NewTenant]:
    """Bottlenecks, LoRA and IA3 of all ranks in turn, as the traces' sizes are."""
    for number in range(count):
        adapter = random_adapter(general, _KINDS[number % 3], _RANKS[number // 3 % len(_RANKS)], seed=number)
        weight = torch.randn(4, general.hidden_size, generator=torch.Generator().manual_seed(number))
        head = ClassificationHead(("a", "b", "c", "d"), weight, torch.zeros(4), "cls")
        yield NewTenant(f"tenant-{number}", "general", adapter, head)


def measure_loads(base: Path, folder: Path, *, num_tenants: int, rounds: int, batch: int) -> Cost:
    """Loads tenants again and again into an arena that holds few of them; their files are in the file cache.

    The least time of ``rounds`` for each batch of ``batch`` tenants of one size, and a line through these.
    """
    with Store.create(folder / "store", general=base, plot_layers=0) as store:
        store.add_tenants(mixed_tenants(store.general, num_tenants))
        infos = sorted(store.tenants.values(), key=lambda info: info.bytes)
        batches = [infos[start : start + batch] for start in range(0, len(infos), batch)]
        largest = max(sum(map(_size, each)) for each in batches)
        residency = AdapterResidency(store.layout, store.catalog, store.general, 2 * largest)
        least = [float("inf")] * len(batches)
        order = np.random.default_rng(0)
        for _ in range(rounds + 1):  # the first reads headers
            for number in order.permutation(len(batches)).tolist():
                least[number] = min(least[number], _time_load(residency, batches[number]))
        residency.close()
    sizes = [sum(map(_size, each)) / len(each) for each in batches]
    return _line(sizes, [seconds / batch for seconds in least])


def _size(info: TenantInfo) -> int:
    return AdapterArena.allocated_bytes(info.bytes // 4)


def _time_load(residency: AdapterResidency, tenants: Sequence[TenantInfo]) -> float:
    """Seconds, or infinity where some were in memory."""
    loads = residency.statistics.loads
    started = time.perf_counter()
    with residency.holding(tenants):
        seconds = time.perf_counter() - started
    return seconds if residency.statistics.loads == loads + len(tenants) else float("inf")


def measure_moves(*, rounds: int) -> Cost:
    """Moves ranges of many sizes down an arena, and writes a LoRA tenant's entries in the tables anew."""
    sizes, least = [2**power for power in range(14, 21)], []
    slots = SlotTables()
    blocks = [
        BlockLayout(layer, site, 8, {"scale": 1.0}, 384, 384, 0, 6144)
        for layer in range(3)
        for site in (Site.QUERY, Site.VALUE)
    ]
    for size in sizes:
        seconds = float("inf")
        for _ in range(rounds):
            arena = AdapterArena(3 * size)
            arena.memory.fill_(1.0)
            first = arena.allocate(size // 4)
            arena.allocate(size // 4)
            arena.release(first or 0)
            slot = slots.assign(blocks, 0)
            started = time.perf_counter()
            moved = arena.slide(size // 2)
            slots.clear(slot)
            slot = slots.assign(blocks, size)
            seconds = min(seconds, time.perf_counter() - started)
            slots.clear(slot)
            assert moved
        least.append(seconds)
    return _line(sizes, least)


def _line(sizes: Sequence[float], seconds: Sequence[float]) -> Cost:
    """Least squares of relative deviations, so that the small count as much as the large."""
    known = np.isfinite(seconds)
    x, y = np.asarray(sizes)[known], np.asarray(seconds)[known]
    matrix = np.stack([np.ones_like(y), x], axis=1) / y[:, None]
    (fixed, per_byte), *_ = np.linalg.lstsq(matrix, np.ones_like(y), rcond=None)
    return Cost(1e6 * float(fixed), 1e9 * float(per_byte))
