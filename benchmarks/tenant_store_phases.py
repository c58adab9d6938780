"""What a store of many tenants is timed at: opening, listing, looking up, verifying, collecting garbage."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.made_up_tenants import made_up_name
from benchmarks.result import Quantity
from hmi_engine.demo.timing import median
from hmi_engine.engine import Engine
from hmi_engine.errors import HmiError
from hmi_engine.store import Store

__all__ = ["StoreFigures", "allocated_bytes", "measure_store"]

REPETITIONS = 5
LOOKUPS = 1000
REMOVED_SHARE = 0.1


@dataclass(frozen=True)
class StoreFigures:
    """Figures of a store of ``num_tenants``; times in seconds, the medians of :data:`REPETITIONS`."""

    num_tenants: int
    tenant_bytes: int
    open_store: float
    open_engine: float
    count: float
    list_all: float
    first_lookup: float
    kept_lookup: float
    kept_lookup_of_many: float
    verify: float
    remove: float
    collect: float
    num_collected: int
    disk_bytes: int
    catalog_bytes: int

    def quantities(self, name: str) -> list[Quantity]:
        """The figures as the report shows them."""
        each = self.num_tenants
        removed = max(1, self.num_collected)
        figures = (
            ("opening the store", self.open_store * 1e3, "ms"),
            ("opening the store and an engine", self.open_engine * 1e3, "ms"),
            ("how many there are, asked first", self.count * 1e3, "ms"),
            ("listing all, with what is known of each", self.list_all * 1e3, "ms"),
            ("looking one up, first time", self.first_lookup * 1e6, "us"),
            ("looking one up again", self.kept_lookup * 1e6, "us"),
            (
                f"looking {min(LOOKUPS, each):,} up again in one call",
                self.kept_lookup_of_many * 1e6,
                "us each",
            ),
            ("verifying all files", each / self.verify, "files/s"),
            ("verifying all files", self.tenant_bytes / self.verify / 1e6, "MB/s"),
            (f"removing {removed:,}", self.remove * 1e3, "ms"),
            (f"collecting {removed:,} orphans", self.collect * 1e3, "ms"),
            ("bytes on the disk", self.disk_bytes / each, "a tenant"),
            ("of them in the catalog", self.catalog_bytes / each, "a tenant"),
        )
        return [Quantity(name=f"{name}: {what}", value=value, unit=unit) for what, value, unit in figures]


def allocated_bytes(folder: Path) -> int:
    """What the files below a folder, and the folders, take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in [folder, *folder.rglob("*")])


def measure_store(path: Path, num_tenants: int) -> StoreFigures:
    """Times everything on a store of made-up tenants 0 to ``num_tenants`` - 1; removes a part of them.

    Raises:
        HmiError: the store is not sound, or holds not what it should; nothing should be reported then.
    """
    gc.collect()
    with Store.open(path) as store:
        tenant_bytes = sum(info.bytes for info in store.tenants.values())
    names = [
        made_up_name(number)
        for number in random.Random(1).sample(range(num_tenants), min(num_tenants, LOOKUPS))
    ]
    first, kept, of_many = _lookups(path, names)
    timed = {
        "open_store": _median(lambda: Store.open(path).close()),
        "open_engine": _median(lambda: _open_engine(path)),
        "count": _on_fresh(path, lambda store: len(store.tenants)),
        "list_all": _on_fresh(path, lambda store: sum(1 for _ in store.tenants.values())),
        "verify": _verify(path),
    }
    disk = allocated_bytes(path / "tenants")
    catalog = sum(file.stat().st_size for file in path.glob("catalog.sqlite*"))
    remove, collect, num_collected = _remove_and_collect(path, num_tenants)
    return StoreFigures(
        num_tenants=num_tenants,
        tenant_bytes=tenant_bytes,
        first_lookup=first,
        kept_lookup=kept,
        kept_lookup_of_many=of_many,
        remove=remove,
        collect=collect,
        num_collected=num_collected,
        disk_bytes=disk + catalog,
        catalog_bytes=catalog,
        **timed,
    )


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _median(function: Callable[[], object]) -> float:
    return median([_seconds(function) for _ in range(REPETITIONS)])


def _on_fresh(path: Path, function: Callable[[Store], object]) -> float:
    """Median time of ``function`` on a store that was just opened, and so knows nothing yet."""
    samples = []
    for _ in range(REPETITIONS):
        with Store.open(path, read_only=True) as store:
            samples.append(_seconds(lambda: function(store)))
    return median(samples)


def _open_engine(path: Path) -> None:
    with Store.open(path) as store, Engine(store, record_traffic=False):
        _ = store.encoder


def _lookups(path: Path, names: Sequence[str]) -> tuple[float, float, float]:
    """Seconds of one lookup: the first of a name, one that is kept, and one of many kept in one call."""

    def each(store: Store) -> None:
        for name in names:
            _ = store.tenants[name]

    first = _on_fresh(path, each)
    with Store.open(path, read_only=True) as store:
        each(store)
        kept = _median(lambda: each(store))
        of_many = _median(lambda: store.tenants.find(names))
    return first / len(names), kept / len(names), of_many / len(names)


def _verify(path: Path) -> float:
    with Store.open(path, read_only=True) as store:
        problems: list[object] = []
        seconds = _seconds(lambda: problems.extend(store.verify()))
    if problems:
        raise HmiError(f"{path} is not sound: {problems[0]}")
    return seconds


def _remove_and_collect(path: Path, num_tenants: int) -> tuple[float, float, int]:
    """Removes a part; of another part of that size only the entries, as a crash would, then collects them."""
    count = max(1, int(num_tenants * REMOVED_SHARE))
    first = [made_up_name(number) for number in range(count)]
    second = [made_up_name(number) for number in range(count, 2 * count)]
    with Store.open(path) as store:
        remove = _seconds(lambda: store.remove_tenants(first))
        store.catalog.remove_tenants(second)
        done: list[object] = []
        collect = _seconds(lambda: done.extend(store.collect_garbage()))
        if len(done) != count or len(store.tenants) != num_tenants - 2 * count:
            raise HmiError(f"{path}: collected {len(done)} files, expected {count}")
    return remove, collect, count
