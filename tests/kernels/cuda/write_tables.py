"""Writes the counted and compiled figures into docs/kernels.md (``make kernel-tables``)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from emulator.harness import emulated
from kernels.cuda import adapter_traffic, gemv_traffic, plot_traffic, vector_traffic
from kernels.cuda.compiled_facts import compiled_table
from kernels.cuda.gemv_traffic import TrafficRow

PAGE = Path(__file__).parents[3] / "docs" / "kernels.md"

RANKS = (16, 32, 64, 128, 256)
TILE_SHAPES = (
    # layer norm, hidden size, tokens a segment
    (None, 768, (16, 32, 64)),
    ("1,024 columns", 1024, (16, 32)),
    ("4,096 columns", 4096, (16,)),
)
GEMV_SHAPES = ((768, 16), (768, 64), (4096, 16), (4096, 64))


def traffic_table(rows: Sequence[TrafficRow]) -> str:
    """Markdown."""
    lines = [
        "| shape | launches | bytes moved | least | ratio | bank conflicts |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += (
        f"| {row.shape} | {row.launches} | {row.moved_bytes:,} | {row.least_bytes:,} | {row.ratio:.3f} "
        f"| {row.excess_wavefronts} |"
        for row in rows
    )
    return "\n".join(lines)


def tile_table() -> str:
    """What plan_adapter chooses for large batches, by rank; Markdown."""
    lines = [
        "| ranks together | layer norm | kernel | rows | stages | shared bytes | blocks an SM, sm_80 |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    with emulated() as module:
        shared_bytes = module.max_shared_bytes(0)
        for rank, (norm, size, lengths) in itertools.product(RANKS, TILE_SHAPES):
            for tokens in lengths:
                segments = 8 * 108
                shape = (tokens * segments, segments, size, size, 1, rank, norm is not None)
                plan = module.plan_adapter(*shape, shared_bytes)
                chosen = f"{plan.kernel} | {plan.tile_rows} | {plan.num_stages} | {plan.shared_bytes:,}"
                lines.append(f"| {rank} | {norm or 'no'} | {chosen} | {plan.blocks_per_multiprocessor} |")
    return "\n".join(dict.fromkeys(lines))  # slices have as many rows whatever a segment's length


def gemv_plan_table() -> str:
    """What plan_adapter chooses for segments of one token; Markdown."""
    lines = [
        "| adapter | segments | launches | shares of the depth | shares of the columns |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    with emulated() as module:
        for (size, rank), segments in itertools.product(GEMV_SHAPES, (1, 8, 64, 512)):
            plan = module.plan_adapter(
                segments, segments, size, size, 1, rank, False, module.max_shared_bytes(0)
            )
            chosen = f"{plan.launches} | {plan.splits} | {plan.column_chunks}"
            lines.append(f"| {size}, rank {rank} | {segments} | {chosen} |")
    return "\n".join(lines)


def vector_rows() -> list[TrafficRow]:
    """Biases move the same as scales."""
    return [row for row in vector_traffic.traffic_rows() if row.shape.startswith("scale")]


TABLES: dict[str, Callable[[], str]] = {
    "tile plan": tile_table,
    "tiles": lambda: traffic_table(adapter_traffic.traffic_rows()),
    "gemv plan": gemv_plan_table,
    "gemv": lambda: traffic_table(gemv_traffic.traffic_rows()),
    "vectors": lambda: traffic_table(vector_rows()),
    "plot": lambda: traffic_table([*plot_traffic.lookup_rows(), *plot_traffic.merge_rows()]),
    "compiled": compiled_table,
}


def replaced(page: str, name: str, table: str) -> str:
    """The page with the table between its marks. Raises ValueError if the marks are not there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{PAGE} has no marks for {name}")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", page)


def main() -> None:
    page = PAGE.read_text()
    for name, table in TABLES.items():
        page = replaced(page, name, table())
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
