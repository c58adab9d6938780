"""How fast are many tenants added, opened, listed, found, verified and cleaned up?"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arguments import RESULTS
from benchmarks.made_up_tenants import TenantDrawer
from benchmarks.peers.adapter_folders import list_folders, save_folders
from benchmarks.recorded_command import recorded_command
from benchmarks.result import BenchmarkResult, Case, Quantity, Ratio, System
from benchmarks.tenant_store_phases import allocated_bytes, measure_store
from hmi_engine.demo.base_model import PACKAGE, packaged_model
from hmi_engine.demo.environment import describe_machine, installed_versions
from hmi_engine.errors import HmiError
from hmi_engine.knowledge.changes import TENANTS_PER_BATCH, NewTenant
from hmi_engine.store import Store

__all__ = ["main"]

NAME = "tenant_store"
QUESTION = "How fast are many tenants added, opened, listed, found, verified and cleaned up?"
OURS = "HMI store"
PLAIN, FLUSHED = "a folder for each", "a folder for each, flushed"
DESCRIPTIONS = {
    OURS: f"checked, checksummed, transactions of {TENANTS_PER_BATCH}; on the disk when each ends",
    PLAIN: "safetensors' save_file and a JSON file, as PEFT saves; what is written may be lost",
    FLUSHED: "the same, each file and folder flushed: on the disk when the next begins",
}
LISTING = {
    OURS: "what the catalog knows of every tenant, checked",
    PLAIN: "walks through the folders and parses each JSON file",
}
FLUSHED_AT_MOST, PLAIN_AT_MOST = 1000, 10_000
NOTES = (
    "Tenants are windows into one block of random numbers, so that drawing them costs next to nothing (the "
    "share of time is given). 'mixed': LoRA, bottlenecks, IA3 and BitFit in turn, on the upper three of "
    "MiniLM's six layers; 'small': LoRA of rank 2 on the last layer. Each has a head of four classes.",
    "The folders hold the same tensors. Nothing checks them, no checksum is kept, a tenant that is replaced "
    "may be half old and half new, and two programs that write at once may overwrite each other: what a "
    "store does costs time that folders don't spend. They are made for up to "
    f"{PLAIN_AT_MOST:,} tenants, flushed ones for up to {FLUSHED_AT_MOST:,}.",
    "Each addition runs once, in a folder of its own; nothing is removed before all additions are done, as "
    "ext4 is slow to make files where many were removed in the last minutes. Everything else is the median "
    "of five, on files that are in the page cache; verification, removal and collection run once.",
    "An engine is opened together with the base model and its tokenizer, which is nearly all of its time. "
    "Orphans are files whose entries are gone, as a crash between the two steps of a removal leaves them.",
)


@dataclass(frozen=True)
class _Scale:
    shape: str
    num_tenants: int

    @property
    def name(self) -> str:
        return f"{self.num_tenants:,} {self.shape} tenants"


SCALES = (
    _Scale("small", 10),
    _Scale("small", 100),
    _Scale("small", 1000),
    _Scale("small", 10_000),
    _Scale("small", 100_000),
    _Scale("mixed", 10_000),
)
QUICK_SCALES = (_Scale("small", 10), _Scale("mixed", 24))
LISTED = (10_000,)


def _timed(save: Callable[[Iterator[NewTenant]], object], tenants: Iterator[NewTenant]) -> float:
    started = time.perf_counter()
    save(tenants)
    return time.perf_counter() - started


def _copy_empty(origin: Path, path: Path) -> Path:
    """A store like ``origin``: the base model's files are linked, only the catalog is copied."""
    shutil.copytree(origin, path, copy_function=os.link)
    for file in [*path.glob("catalog.sqlite*"), path / "store.lock"]:
        file.unlink()
        shutil.copyfile(origin / file.name, file)
    return path


def _addition(scale: _Scale, drawer: TenantDrawer, store: Path, folders: Path) -> Case:
    numbers = range(scale.num_tenants)
    drawing = _timed(lambda tenants: sum(1 for _ in tenants), drawer(numbers))
    with Store.open(store) as opened:
        seconds = {OURS: _timed(opened.add_tenants, drawer(numbers))}
        if len(opened.tenants) != scale.num_tenants:
            raise HmiError(f"{store} holds {len(opened.tenants)} tenants, expected {scale.num_tenants}")
    total_bytes = sum(file.stat().st_size for file in (store / "tenants").rglob("*") if file.is_file())
    for name, sync, most in ((PLAIN, False, PLAIN_AT_MOST), (FLUSHED, True, FLUSHED_AT_MOST)):
        if scale.num_tenants <= most:
            root = folders / ("flushed" if sync else "plain")
            seconds[name] = _timed(
                lambda tenants: save_folders(root, tenants, sync=sync),  # noqa: B023 - called at once
                drawer(numbers),
            )
    systems = {
        name: System.of(name, DESCRIPTIONS[name], [taken], [scale.num_tenants], "tenants")
        for name, taken in seconds.items()
    }
    return Case(
        name=f"adding {scale.name}",
        settings={
            "bytes_of_a_tenant": total_bytes // scale.num_tenants,
            "MB_per_second": round(total_bytes / seconds[OURS] / 1e6, 1),
            "share_of_drawing": round(drawing / seconds[OURS], 3),
        },
        systems=tuple(systems.values()),
        ratios=tuple(Ratio.of(systems[OURS], system) for name, system in systems.items() if name != OURS),
    )


def _listing(scale: _Scale, store: Path, folders: Path, repetitions: int) -> Case:
    """Lists the store and the plain folders, in turn, each from nothing but what is on the disk."""

    def ours() -> int:
        with Store.open(store, read_only=True) as opened:
            return len({info.name: info for info in opened.tenants.values()})

    systems = {OURS: ours, PLAIN: lambda: len(list_folders(folders / "plain"))}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repetitions):
        for name, run in systems.items():
            started = time.perf_counter()
            if run() != scale.num_tenants:
                raise HmiError(f"{name} lists not all of {scale.num_tenants} tenants")
            seconds[name].append(time.perf_counter() - started)
    work = [scale.num_tenants] * repetitions
    measured = {name: System.of(name, LISTING[name], seconds[name], work, "tenants") for name in systems}
    return Case(
        name=f"opening and listing {scale.name}",
        settings={"repetitions": repetitions},
        systems=tuple(measured.values()),
        ratios=(Ratio.of(measured[OURS], measured[PLAIN]),),
    )


def _measure(
    root: Path, scales: Sequence[_Scale], plot_layers: int, repetitions: int
) -> tuple[list[Case], list[Quantity]]:
    origin = root / "origin"
    with Store.create(origin, general=packaged_model(), plot_layers=plot_layers) as store:
        drawers = {shape: TenantDrawer(store.general, shape) for shape in {scale.shape for scale in scales}}
    cases: list[Case] = []
    quantities: list[Quantity] = []
    places = [
        (scale, root / f"{number}.store", root / f"{number}.folders") for number, scale in enumerate(scales)
    ]
    for scale, path, folders in places:
        print(f"adding {scale.name}", file=sys.stderr)
        cases.append(_addition(scale, drawers[scale.shape], _copy_empty(origin, path), folders))
    for scale, path, folders in places:
        if scale.num_tenants in LISTED or scale == scales[-1]:
            cases.append(_listing(scale, path, folders, repetitions))
    for scale, path, folders in places:
        print(f"measuring {scale.name}", file=sys.stderr)
        quantities += measure_store(path, scale.num_tenants).quantities(scale.name)
        if (folders / "plain").exists():
            used = allocated_bytes(folders / "plain") / scale.num_tenants
            quantities.append(
                Quantity(name=f"{scale.name}: bytes on the disk, {PLAIN}", value=used, unit="a tenant")
            )
    return cases, quantities


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json", help="where the result goes")
    parser.add_argument(
        "--folder", type=Path, help="where stores are made and removed: on the disk to measure"
    )
    parser.add_argument("--most", type=int, default=100_000, help="leave larger numbers of tenants out")
    parser.add_argument("--quick", action="store_true", help="small sizes: proves that it runs, nothing else")
    options = parser.parse_args(argv)
    chosen = QUICK_SCALES if options.quick else SCALES
    scales = [scale for scale in chosen if scale.num_tenants <= options.most]
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="hmi-tenant-store-") as folder:
        # Without tables a store is made in a second.
        plot_layers, repetitions = (0, 2) if options.quick else (3, 5)
        cases, quantities = _measure(Path(folder), scales, plot_layers, repetitions)
        file_system = _file_system(Path(folder))
    BenchmarkResult(
        name=NAME,
        question=QUESTION,
        command=recorded_command(NAME, argv),
        is_quick=options.quick,
        machine=describe_machine(),
        versions=installed_versions(),
        settings={"base_model": PACKAGE, "plot_layers": plot_layers, "file_system": file_system},
        notes=NOTES,
        cases=tuple(cases),
        quantities=tuple(quantities),
    ).write(options.out)
    print(f"wrote {options.out}")


def _file_system(folder: Path) -> str:
    """Type of the file system, as Linux tells it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(place, kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    return max(holding, key=lambda mount: len(mount[0]))[1]


if __name__ == "__main__":
    main()
