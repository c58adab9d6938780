"""What would 1 to 64 GPUs do with 10,000 and 1,000,000 tenants? A simulation, and how it is checked."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.arguments import Arguments, read_arguments
from benchmarks.kept_steps import KeptSteps
from benchmarks.load_cases import CONCURRENCY, LATENCY_TARGET, MOST_STOLEN
from benchmarks.load_fleet import Fleet, build_fleet
from benchmarks.result import BenchmarkResult, Curve, Quantity, Table
from benchmarks.simulation.calibration import Calibration, calibrate
from benchmarks.simulation.company import num_cores
from benchmarks.simulation.gpu import LINKS, STATED
from benchmarks.simulation.scenarios import LOAD, Forecast, Scenario, forecast
from benchmarks.simulation.validation import COLD_DISK, Agreement, Validation, validate

__all__ = ["Plan", "main", "measure"]

NAME = "simulate"
QUESTION = "What would 1 to 64 GPUs do with 10,000 and 1,000,000 tenants? (A simulation.)"
AIM = 0.15
NOTES = (
    "**Simulated, not measured**, but for the columns that say 'measured'. A discrete-event simulation "
    "(SimPy) runs the engine's own scheduler and eviction on simulated time; stages only take time, by "
    "costs that are fixed for a batch, and for each token, tenant and byte.",
    "The check: costs of the stages are measured on this machine, one batch at a time, and fitted with the "
    "engine's cost model; what is left of a loop without a pipeline is taken for queueing. Stages that run "
    "at a time share the processor's cores, and computing loses another part than its share to threads that "
    "work beside it: to the one that admits, and for each batch, as fitted to open loops at 30%, 50% and 70% "
    "of the capacity of an engine without a pipeline; to the one that prepares, as batches beside a thread "
    "that works all the time show; and for each tenant that is read, as batches beside a thread that has "
    "tenants read show. With these the simulation predicts runs that it has not seen: other requests, depths "
    "and loads, cold tenants. What batches of like sizes took to compute over what their costs say is drawn "
    "again for each batch. A measured run whose "
    "host took more than {most_stolen:.0%} of the processors' time is repeated, up to two times, and the one "
    "that lost least is taken. Hosts also become slower and faster: the same batches are timed before and "
    "after each run, and all costs are multiplied by what they took, over what they took in calibration. "
    "Each run is measured three times with the same requests, one after another; measured is the median, "
    "beside the least and the most, and predicted the median of the predictions of the three.",
    "Cold tenants: memory for 128 of them, uniform traffic, {concurrency} requests open; a disk of "
    "{disk_ms:g} ms and {disk_megabytes:.0f} MB/s, for the engine by `hmi_kernels.set_read_latency`.",
    "The GPUs: numbers of data sheets and assumptions, all in the table below, for BERT-base with half of "
    "its layers looked up. Every GPU has an engine and a host link of its own. What the processor does for a "
    "batch costs as measured here in Python, or a 16th of it, as with more processes or compiled code.",
    "Tenants go to engines by rendezvous hashing with bounded loads: none gets more than 1.25 times the mean "
    "of what is open, so that popular tenants are served by several.",
    "Throughput, hidden share and misses are those with always enough to do, from the middle of the run on; "
    "latencies those of Poisson arrivals at {load:.0%} of that throughput. Memory starts as after long "
    "service. Hidden: the share of fetching, searching and copying that compute did not wait for.",
)


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        tenants: of the fleet that is measured.
        rounds: of the measurement of costs.
        loop_seconds: of the measurement of queueing.
        validation: loads and seconds.
        simulated_tenants: of the GPUs' simulations.
        gpus: of these.
        requests: of each simulation, at least, and for each GPU.
        plot_bytes: of the table.
    """

    tenants: int
    rounds: int
    loop_seconds: float
    validation: Validation
    simulated_tenants: tuple[int, ...]
    gpus: tuple[int, ...]
    requests: tuple[int, int]
    plot_bytes: int


QUICK = Plan(80, 1, 1.5, Validation((0.6,), 1.5, 1), (1_000,), (1, 4), (8_000, 4_000), 1 << 20)
FULL = Plan(
    1_000,
    10,
    15.0,
    Validation((0.4, 0.6, 0.8, 1.2), 12.0, 3),
    (10_000, 1_000_000),
    (1, 4, 16, 64),
    (40_000, 3_200),
    64 << 20,
)


@dataclass(frozen=True)
class _Row:
    name: str
    scenario: Scenario


def _scaled(plan: Plan) -> list[_Row]:
    """Zipf(1) over all tenants: tenants, GPUs, links."""
    return [
        _Row(
            f"{tenants:,} tenants, {gpus} GPU{'s' if gpus > 1 else ''}, {link}",
            Scenario(
                tenants, gpus, speed, host_parts=16, requests=max(plan.requests[0], gpus * plan.requests[1])
            ),
        )
        for tenants in plan.simulated_tenants
        for link, speed in LINKS.items()
        for gpus in plan.gpus
    ]


def _varied(plan: Plan) -> list[_Row]:
    """One GPU, all tenants alike, so that nearly all are cold: what the pipeline gives, and what limits."""
    variants: dict[str, dict[str, float]] = {
        "3 in flight, each layer waits for its own copies": {},
        "3 in flight, the first layer waits for all copies": {"waits_for_layers": False},
        "1 in flight": {"depth": 1},
        "3 in flight, host work as measured": {"host_parts": 1},
    }
    return [
        _Row(
            f"{link}: {name}",
            Scenario(
                plan.simulated_tenants[0],
                1,
                speed,
                exponent=0.0,
                requests=plan.requests[0] // 2,
                **{"host_parts": 16, **options},  # type: ignore[arg-type]
            ),
        )
        for link, speed in LINKS.items()
        for name, options in variants.items()
    ]


COLUMNS = (
    "simulated",
    "requests/s",
    "hidden, %",
    "computing, % of the time",
    "miss ratio, %",
    f"p50 at {LOAD:.0%}, ms",
    f"p99 at {LOAD:.0%}, ms",
    "busiest engine over the mean",
)


def _table(title: str, found: dict[str, Forecast]) -> Table:
    rows = tuple(
        (
            name,
            each.requests_per_second,
            None if each.hidden_share is None else 100 * each.hidden_share,
            100 * each.compute_share,
            100 * each.miss_ratio,
            1e3 * each.p50,
            1e3 * each.p99,
            each.most_over_mean,
        )
        for name, each in found.items()
    )
    return Table(title=title, columns=COLUMNS, rows=rows)


def _agreement_table(agreements: Sequence[Agreement]) -> Table:
    rows = []
    for each in agreements:
        scale, unit = {"p50": (1e3, "ms"), "p99": (1e3, "ms"), "hidden share": (100.0, "%")}.get(
            each.figure, (1.0, "requests/s")
        )
        name = f"{each.case}: {each.figure}, {unit}"
        runs = (scale * each.measured, scale * min(each.runs), scale * max(each.runs))
        rows.append((name, *runs, scale * each.predicted, 100 * each.error))
    return Table(
        title="The simulation beside the real engine on this machine",
        columns=("run and figure", "measured", "least", "most", "predicted", "error, %"),
        rows=tuple(rows),
    )


def _stated_table() -> Table:
    rows = tuple((f"{name} ({each.origin})", each.value, each.unit) for name, each in STATED.items())
    return Table(
        title="What the simulation of GPUs takes as given", columns=("what", "value", "unit"), rows=rows
    )


def _cost_table(calibration: Calibration) -> Table:
    rows = [
        (name, 1e6 * cost.fixed, 1e6 * cost.per_token, 1e6 * cost.per_tenant, 1e9 * cost.per_byte)
        for name, cost in vars(calibration.costs).items()
    ]
    return Table(
        title="Costs of the stages on this machine, measured",
        columns=("stage", "a batch, us", "a token, us", "a tenant, us", "a byte, ns"),
        rows=tuple(rows),
    )


def _toll_table(calibration: Calibration) -> Table:
    rows = [(name, 1e6 * seconds) for name, seconds in vars(calibration.tolls).items()]
    return Table(
        title="What computing loses beside other threads, over sharing cores, measured",
        columns=("for each", "us"),
        rows=tuple(rows),
    )


def _curves(plan: Plan, rows: Sequence[_Row], found: dict[str, Forecast]) -> list[Curve]:
    return [
        Curve(
            figure="gpus",
            name=f"{tenants:,} tenants, {link}",
            x_label="GPUs",
            y_label="requests a second (simulated)",
            x=tuple(map(float, plan.gpus)),
            y=tuple(
                found[row.name].requests_per_second
                for row in rows
                if (row.scenario.tenants, row.scenario.bytes_per_second) == (tenants, speed)
            ),
            y_scale="log",
            y_unit="number",
        )
        for tenants in plan.simulated_tenants
        for link, speed in LINKS.items()
    ]


def _quantities(
    agreements: Sequence[Agreement], slowest_over_fastest: float, calibration: Calibration
) -> list[Quantity]:
    errors = np.array([abs(each.error) for each in agreements])
    between = np.array([each.is_between_runs for each in agreements])
    return [
        Quantity(name="median error of the predictions", value=float(np.median(errors)), unit="share"),
        Quantity(name="largest error of the predictions", value=float(errors.max()), unit="share"),
        Quantity(
            name=f"predictions within {AIM:.0%} of what was measured",
            value=float((errors <= AIM).mean()),
            unit="share",
        ),
        Quantity(
            name=f"predictions within {AIM:.0%}, or between the engine's own runs",
            value=float(((errors <= AIM) | between).mean()),
            unit="share",
        ),
        Quantity(
            name="the same batches between runs, slowest over fastest",
            value=slowest_over_fastest,
            unit="times",
        ),
        Quantity(name="cores that compute keeps busy", value=calibration.compute_cores, unit="cores"),
        Quantity(
            name="slowdown of compute beside a constant thread, over what sharing cores explains",
            value=calibration.contention,
            unit="times",
        ),
        Quantity(
            name="slowdown of compute beside the thread that admits, over what sharing cores explains",
            value=calibration.admission_contention,
            unit="times",
        ),
    ]


def _simulate(
    rows: Sequence[_Row], calibration: Calibration, fleet: Fleet, steps: KeptSteps
) -> dict[str, Forecast]:
    """Each in a process of its own, as many at a time as there are cores."""
    names = {
        row.name: "simulated-" + "".join(letter if letter.isalnum() else "-" for letter in row.name)
        for row in rows
    }
    with ProcessPoolExecutor(num_cores(), mp_context=get_context("spawn")) as pool:
        pending = {
            row.name: pool.submit(forecast, row.scenario, calibration.costs, fleet.num_tokens)
            for row in rows
            if not steps.has(names[row.name])
        }
        return {
            row.name: steps.take(names[row.name], Forecast, lambda row=row: pending[row.name].result())
            for row in rows
        }


def measure(arguments: Arguments) -> BenchmarkResult:
    """Measures costs, checks the simulation by the engine, and simulates what cannot be measured here."""
    plan = QUICK if arguments.quick else FULL
    steps = KeptSteps(arguments.out, json.dumps([asdict(plan), str(arguments.data)]))
    with tempfile.TemporaryDirectory() as folder:
        fleet = build_fleet(arguments, Path(folder), num_tenants=plan.tenants, plot_bytes=plan.plot_bytes)
        costs = partial(calibrate, fleet, rounds=plan.rounds, seconds=plan.loop_seconds, disk=COLD_DISK)
        calibration = steps.take("costs", Calibration, costs)
        agreements, slowest_over_fastest = validate(fleet, calibration, plan.validation, steps)
    scaled, varied = _scaled(plan), _varied(plan)
    by_gpus = _simulate(scaled, calibration, fleet, steps)
    cold = _simulate(varied, calibration, fleet, steps)
    steps.forget()
    return BenchmarkResult.of(
        arguments,
        NAME,
        QUESTION,
        settings={**fleet.settings, "latency_target": LATENCY_TARGET},
        notes=tuple(
            note.format(
                disk_ms=1e3 * COLD_DISK.seconds_each,
                disk_megabytes=COLD_DISK.bytes_per_second / 1e6,
                concurrency=CONCURRENCY,
                load=LOAD,
                most_stolen=MOST_STOLEN,
            )
            for note in NOTES
        ),
        quantities=tuple(_quantities(agreements, slowest_over_fastest, calibration)),
        tables=(
            _agreement_table(agreements),
            _table("Simulated, not measured: Zipf(1) over all tenants, a 16th of the host work", by_gpus),
            _table(
                f"Simulated, not measured: one GPU, {plan.simulated_tenants[0]:,} tenants asked for alike",
                cold,
            ),
            _cost_table(calibration),
            _toll_table(calibration),
            _stated_table(),
        ),
        curves=tuple(_curves(plan, scaled, by_gpus)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, simulates and writes the result."""
    arguments = read_arguments(NAME, QUESTION, argv)
    result = measure(arguments)
    result.write(arguments.out)
    print("\n".join(result.table_lines()))
    for quantity in result.quantities:
        print(quantity)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
