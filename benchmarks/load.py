"""What does an engine do under load, and what does one tenant's flood do to the others?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.arguments import Arguments, read_arguments
from benchmarks.kept_steps import KeptSteps
from benchmarks.load_cases import (
    CONCURRENCY,
    DEADLINE,
    LATENCY_TARGET,
    MOST_STOLEN,
    QUEUE_SECONDS,
    TIMEOUT,
    LoadPoint,
)
from benchmarks.load_fleet import build_fleet
from benchmarks.load_measurements import (
    EQUAL,
    FLOOD,
    HEAVY_TIMES,
    UNFAIR,
    LoadBench,
    LoadPlan,
    OpenLoop,
    measure_mixed,
    measure_open,
)
from benchmarks.load_outcomes import Summary, summarise
from benchmarks.result import BenchmarkResult, Case, Curve, Quantity, System, Table

__all__ = ["main", "measure"]

NAME = "load"
QUESTION = "What does the engine do under load, and what does one tenant's flood do to the others?"
NOTES = (
    "An `AsyncEngine` on this machine answers real held-out texts. Every tenant has weights of its own, of "
    "mixed kinds and ranks; all are in memory. `latency_target={latency_target:g}`, 2 batches in flight.",
    "Capacity: what it answers with {concurrency} requests always open. Open loop: the arrivals of a Poisson "
    "process, drawn beforehand, are sent at their times whatever the engine does; a latency counts from when "
    "its request was due. The machine's speed drifts; so the loads take turns in short runs, in another "
    "order each round, and each round begins with the capacity that its loads are shares of.",
    "A virtual machine's host gives processor time to others at times. A run that lost more than "
    "{most_stolen:.0%} of it is repeated, up to two times, and the one that lost least is taken, whatever it "
    "gave; how much it lost is told below.",
    "An answer within {deadline:g} s is good. Requests are sent with `timeout={timeout:g}`, and what "
    "{queue_seconds:g} s of capacity answer may be queued, as an operator with that deadline would set it. "
    "Goodput: good answers a second, over capacity.",
    "The load is sent by the main thread of the engine's process, which the engine does not use; so it takes "
    "from the machine what is given below, and nothing is lost to connections.",
    "The flood: of 100 tenants one sends {heavy} times as much as each of the others. What the others have "
    "is compared with what the same 99 have where all 100 send alike, at the same total load. First come "
    "first served: the same engine, but all tenants share one queue, one counter and one limit.",
)


QUICK = LoadPlan(24, (0.5, 1.2), 12, (0.8,), 1.5, 1.5, 1.5, 1, 1, 1 << 20)
FULL = LoadPlan(
    1_000, (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2), 100, (0.8, 1.2), 5.0, 6.0, 20.0, 10, 3, 64 << 20
)


COLUMNS = (
    "offered load",
    "offered/s",
    "answered/s",
    "goodput over capacity",
    "p50, ms",
    "p95, ms",
    "p99, ms",
    "refused, %",
    "expired, %",
)
MIXED_COLUMNS = ("the others' requests", *COLUMNS[1:3], *COLUMNS[4:])


def _figures(summary: Summary) -> list[float]:
    return [
        *(1e3 * seconds for seconds in (summary.p50, summary.p95, summary.p99)),
        100 * summary.refused_share,
        100 * summary.expired_share,
    ]


def _open_table(found: OpenLoop) -> Table:
    rows = []
    for load in found.points:
        summary = found.summary(load)
        head = (f"{load:.0%}", summary.offered, summary.answered, found.goodput(load))
        rows.append((*head, *_figures(summary)))
    return Table(
        title="Open loop, by share of the capacity that is offered", columns=COLUMNS, rows=tuple(rows)
    )


def _mixed_table(found: dict[tuple[float, str], list[LoadPoint]]) -> Table:
    rows = []
    for (load, name), points in found.items():
        summary = summarise([point.sample for point in points], DEADLINE)
        rows.append(
            (f"{load:.0%} of capacity: {name}", summary.offered, summary.answered, *_figures(summary))
        )
    return Table(title="One tenant's flood, and the others", columns=MIXED_COLUMNS, rows=tuple(rows))


def _curves(found: OpenLoop) -> list[Curve]:
    loads = tuple(found.points)
    summaries = [found.summary(load) for load in loads]
    x = tuple(100 * load for load in loads)
    latencies = [
        Curve(
            figure="latency",
            name=name,
            x_label="offered load, % of capacity",
            y_label="latency, ms",
            x=x,
            y=tuple(1e3 * vars(summary)[name] for summary in summaries),
            x_scale="linear",
            y_scale="log",
            y_unit="number",
        )
        for name in ("p50", "p95", "p99")
    ]
    goodput = Curve(
        figure="goodput",
        name="goodput",
        x_label="offered load, % of capacity",
        y_label=f"answers within {DEADLINE:g} s, over capacity",
        x=x,
        y=tuple(found.goodput(load) for load in loads),
        x_scale="linear",
        y_unit="times",
    )
    return [*latencies, goodput]


def _quantities(
    found: OpenLoop, mixed: dict[tuple[float, str], list[LoadPoint]], plan: LoadPlan
) -> list[Quantity]:
    kept, low, high = found.kept_beyond_capacity()
    least = "least goodput beyond capacity, over the peak of all loads"
    quantities = [
        Quantity(name=least, value=kept, unit="share"),
        Quantity(name=f"{least}: lower end of its 95 % interval", value=low, unit="share"),
        Quantity(name=f"{least}: upper end", value=high, unit="share"),
    ]
    for load in plan.mixed_loads:
        alone = summarise([point.sample for point in mixed[load, EQUAL]], DEADLINE)
        for name in (FLOOD, UNFAIR):
            beside = summarise([point.sample for point in mixed[load, name]], DEADLINE)
            quantities += [
                Quantity(
                    name=f"{load:.0%} of capacity, {name}: {quantile} of the others over that without it",
                    value=vars(beside)[quantile] / vars(alone)[quantile],
                    unit="times",
                )
                for quantile in ("p50", "p99")
            ]
    generators = [point.generator for points in found.points.values() for point in points]
    sent = sum(each.requests for each in generators)
    quantities += [
        Quantity(
            name="processor time of the load generator",
            value=1e6 * sum(each.thread_seconds for each in generators) / sent,
            unit="microseconds a request",
        ),
        Quantity(
            name="most that a core was busy with it",
            value=max(each.thread_seconds / each.seconds for each in generators),
            unit="share",
        ),
        Quantity(
            name="requests handed to the engine too late, median of the runs' 99th percentiles",
            value=1e3 * float(np.median([each.late_p99 for each in generators])),
            unit="ms",
        ),
    ]
    everything = [point for points in (*found.points.values(), *mixed.values()) for point in points]
    failed = sum(point.sample.failed for point in everything)
    return [
        *quantities,
        Quantity(
            name="processor time stolen by the machine's host, mean of the runs",
            value=float(np.mean([point.stolen for point in everything])),
            unit="share",
        ),
        Quantity(
            name=f"runs that lost more than {MOST_STOLEN:.0%} of it in every attempt",
            value=float(np.mean([point.stolen > MOST_STOLEN for point in everything])),
            unit="share",
        ),
        Quantity(name="requests that failed otherwise", value=float(failed), unit="requests"),
    ]


def measure(arguments: Arguments) -> BenchmarkResult:
    """Builds one store, and measures both questions on it."""
    plan = QUICK if arguments.quick else FULL
    steps = KeptSteps(arguments.out, json.dumps([asdict(plan), str(arguments.data)]))
    with tempfile.TemporaryDirectory() as folder:
        fleet = build_fleet(arguments, Path(folder), num_tenants=plan.tenants, plot_bytes=plan.plot_bytes)
        with ExitStack() as stack:
            found = measure_open(LoadBench(plan, fleet, steps, stack))
        with ExitStack() as stack:
            mixed = measure_mixed(LoadBench(plan, fleet, steps, stack))
    capacity = System.of(
        "HMI",
        f"AsyncEngine, {CONCURRENCY} requests always open",
        [plan.capacity_seconds] * len(found.capacities),
        [rate * plan.capacity_seconds for rate in found.capacities],
        "requests",
    )
    steps.forget()
    return BenchmarkResult.of(
        arguments,
        NAME,
        QUESTION,
        settings={
            **fleet.settings,
            "seconds_of_a_run": plan.open_seconds,
            "rounds": plan.rounds,
            "repetitions": plan.repetitions,
            "deadline": DEADLINE,
            "timeout": TIMEOUT,
        },
        notes=tuple(
            note.format(
                latency_target=LATENCY_TARGET,
                concurrency=CONCURRENCY,
                deadline=DEADLINE,
                timeout=TIMEOUT,
                queue_seconds=QUEUE_SECONDS,
                heavy=HEAVY_TIMES,
                most_stolen=MOST_STOLEN,
            )
            for note in NOTES
        ),
        cases=(Case(name="capacity, Zipf(1)", settings={"tenants": plan.tenants}, systems=(capacity,)),),
        quantities=tuple(_quantities(found, mixed, plan)),
        tables=(_open_table(found), _mixed_table(mixed)),
        curves=tuple(_curves(found)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments(NAME, QUESTION, argv)
    result = measure(arguments)
    result.write(arguments.out)
    print("\n".join(result.table_lines()))
    for quantity in result.quantities:
        print(quantity)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
