"""Which tenants should stay in memory? Policies over traces of requests, and how the arena wastes nothing."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.arguments import Arguments, read_arguments
from benchmarks.residency_costs import Cost, measure_loads, measure_moves
from benchmarks.residency_policies import (
    Belady,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    Policy,
    S3Fifo,
    WTinyLfu,
)
from benchmarks.residency_simulation import (
    FirstFit,
    Outcome,
    QueueKnown,
    in_bytes,
    simulate,
    simulate_arena,
)
from benchmarks.residency_traces import TRACES, Trace, draw_trace
from benchmarks.result import BenchmarkResult, Curve, Quantity
from hmi_engine.demo.base_model import packaged_model
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.memory.eviction import FIXED_COST_BYTES, HALF_LIFE_TURNOVERS, FrequencyPerByte
from hmi_engine.memory.placement import MOST_MOVED
from hmi_engine.memory.ranges import RangeAllocator

__all__ = ["POLICIES", "Plan", "main", "measure"]

NAME = "residency"
QUESTION = "Which tenants should stay in memory?"
OURS = "HMI"
QUEUES = (64, 1024)
TABLE_SHARE = 0.05
FIXED_COSTS = (50, 200, 800, 3_200, 1_000_000)
"""Kilobytes; with the last one misses alone count."""
NOTES = (
    "A simulation: requests come one after another, each needs its tenant in memory, and a policy says who "
    "leaves. Tenants are of MiniLM's shape: bottlenecks, LoRA and IA3 on three layers, ranks 2 to 64, each "
    "as large as in an arena. What is not in memory at first counts as missed.",
    "Traces are drawn by law with a fixed seed: Zipf(1), Zipf(0.8), uniform; drifting: every 20 requests two "
    "tenants change places in popularity, one of them drawn among the popular; scans: five times someone "
    "asks each tenant once, in turn, between every second request.",
    "HMI's policy is frequency with exponential decay, times the cost of a miss, over bytes held; 'queue of "
    "n' knows the next n requests too, as an engine knows the requests of its call. Belady knows all, and is "
    "optimal where all are equally large; where they are not, who keeps many small ones can miss less often.",
    "LRU, LFU, S3-FIFO and W-TinyLFU do what their papers say, in bytes, but for one thing: every request's "
    "tenant is admitted, as it has to be in memory to run.",
    "Loading time is misses and bytes read by the costs of a load that are given below, measured with an "
    "engine's residency on this machine: files in the operating system's file cache, eight tenants a batch.",
    "The arena: first or best fit; where what is free lies in pieces, more tenants are evicted, or tenants "
    "are moved together, up to a share of the size that is needed. Loading time then includes moving.",
)


def _policies(trace: Trace, capacity: int) -> dict[str, Callable[[], Policy]]:
    return {
        "LRU": LeastRecentlyUsed,
        "LFU": LeastFrequentlyUsed,
        "S3-FIFO": lambda: S3Fifo(capacity),
        "W-TinyLFU": lambda: WTinyLfu(capacity),
        OURS: FrequencyPerByte,
        **{f"{OURS}, queue of {length:,}": _queue_known(trace, length) for length in QUEUES},
        "Belady": lambda: Belady(trace.tenants),
    }


def _queue_known(trace: Trace, length: int) -> Callable[[], Policy]:
    return lambda: QueueKnown(trace.tenants, length)


POLICIES = tuple(_policies(Trace("", [], []), 0))
"""Their names."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        tenants: how many there are.
        requests: of each trace.
        shares: of all bytes, that memory holds.
        half_lives: tried, in turnovers of the memory.
        arena_shares: of all bytes, that the arena holds.
        arena_requests: the first ones of each trace, which the arena is tried with.
        loads: tenants, rounds and tenants a batch of the measurement of loads.
    """

    tenants: int
    requests: int
    shares: tuple[float, ...]
    half_lives: tuple[float, ...]
    arena_shares: tuple[float, ...]
    arena_requests: int
    loads: tuple[int, int, int]


FULL = Plan(
    tenants=10_000,
    requests=200_000,
    shares=(0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0),
    half_lives=(0.25, 0.5, 1, 2, 4, 16),
    arena_shares=(0.02, 0.05, 0.2),
    arena_requests=60_000,
    loads=(576, 10, 8),
)
QUICK = Plan(
    tenants=300,
    requests=2_000,
    shares=(0.1, 0.5, 1.0),
    half_lives=(0.5, 1, 2),
    arena_shares=(0.1,),
    arena_requests=1_000,
    loads=(48, 2, 8),
)


@dataclass(frozen=True, eq=False)
class _Traced:
    trace: Trace
    total: int
    requested: int

    @classmethod
    def draw(cls, name: str, plan: Plan) -> _Traced:
        trace = draw_trace(name, plan.tenants, plan.requests, seed=0)
        sizes = [AdapterArena.allocated_bytes(size // 4) for size in trace.sizes]
        trace = Trace(name, trace.tenants, sizes)
        return cls(trace, sum(sizes), sum(sizes[key] for key in trace.tenants))

    def first(self, requests: int) -> _Traced:
        """The same with its first requests alone."""
        tenants = self.trace.tenants[:requests]
        return replace(self, trace=Trace(self.trace.name, tenants, self.trace.sizes))

    def capacity(self, share: float) -> int:
        return int(share * self.total)

    @property
    def label(self) -> str:
        return self.trace.name.replace("_", " ")


def _compare(traced: _Traced, plan: Plan, load: Cost) -> tuple[list[Curve], list[Quantity]]:
    """Every policy in every memory: how often it misses, and how much it reads."""
    outcomes: dict[str, list[Outcome]] = {}
    for share in plan.shares:
        capacity = traced.capacity(share)
        for name, make in _policies(traced.trace, capacity).items():
            outcomes.setdefault(name, []).append(simulate(traced.trace, make(), capacity))
    curves = [
        _curve(traced, plan, name, "requests that miss", [each.misses / each.requests for each in found])
        for name, found in outcomes.items()
    ] + [
        _curve(traced, plan, name, "bytes read", [each.bytes_read / traced.requested for each in found])
        for name, found in outcomes.items()
    ]
    place = plan.shares.index(_table_share(plan))
    quantities = [
        Quantity(
            name=f"{traced.label}, {plan.shares[place]:.0%} in memory, {name}: loading",
            value=_loading(found[place], load),
            unit="ms per 1,000 requests",
        )
        for name, found in outcomes.items()
    ]
    return curves, quantities


def _curve(traced: _Traced, plan: Plan, name: str, what: str, shares: Sequence[float]) -> Curve:
    return Curve(
        figure=f"{traced.trace.name}-{what.split(maxsplit=1)[0]}",
        name=name,
        x_label=f"memory, % of all bytes, {traced.label}",
        y_label=f"share of {what}",
        x=tuple(100 * share for share in plan.shares),
        y=tuple(shares),
    )


def _loading(outcome: Outcome, load: Cost, move: Cost | None = None) -> float:
    """Milliseconds per 1,000 requests."""
    seconds = load.seconds(outcome.misses, outcome.bytes_read)
    if move is not None:
        seconds += move.seconds(outcome.moves, outcome.bytes_moved)
    return 1e6 * seconds / outcome.requests


def _half_lives(traced: _Traced, plan: Plan, load: Cost) -> Curve:
    """What another half-life would cost."""
    policies = [lambda each=each: FrequencyPerByte(half_life=each) for each in plan.half_lives]
    return Curve(
        figure="half_life",
        name=traced.label,
        x_label=f"half-life, evictions per 100 tenants in memory, of {_table_share(plan):.0%} of all bytes",
        y_label="loading time over the best half-life's",
        x=tuple(100 * half_life for half_life in plan.half_lives),
        y=_over_best(traced, plan, load, policies),
        y_unit="times",
    )


def _fixed_costs(traced: _Traced, plan: Plan, load: Cost) -> Curve:
    """What another weight of misses beside bytes would cost."""
    policies = [lambda each=each: FrequencyPerByte(fixed_cost_bytes=1000 * each) for each in FIXED_COSTS]
    return Curve(
        figure="fixed_cost",
        name=traced.label,
        x_label=f"fixed cost of a miss in the policy, kB; {_table_share(plan):.0%} of all bytes in memory",
        y_label="loading time over the best fixed cost's",
        x=tuple(map(float, FIXED_COSTS)),
        y=_over_best(traced, plan, load, policies),
        y_unit="times",
    )


def _over_best(
    traced: _Traced, plan: Plan, load: Cost, policies: Sequence[Callable[[], Policy]]
) -> tuple[float, ...]:
    """Loading times over the least of them."""
    capacity = traced.capacity(_table_share(plan))
    found = [_loading(simulate(traced.trace, make(), capacity), load) for make in policies]
    return tuple(each / min(found) for each in found)


def _table_share(plan: Plan) -> float:
    return min(plan.shares, key=lambda each: abs(each - TABLE_SHARE))


def _arena(traced: _Traced, share: float, load: Cost, move: Cost) -> Iterator[Quantity]:
    """How each way to place tenants uses an arena."""
    granules = traced.capacity(share) // in_bytes(1)
    ways: dict[str, tuple[type[RangeAllocator], float]] = {
        "first fit, evict on": (FirstFit, 0.0),
        "best fit, evict on": (RangeAllocator, 0.0),
        f"best fit, move up to {MOST_MOVED:g} of the size needed (HMI)": (RangeAllocator, MOST_MOVED),
        "best fit, move as much as that": (RangeAllocator, 1.0),
        "best fit, always move": (RangeAllocator, math.inf),
    }
    free_of_fragments = simulate(traced.trace, FrequencyPerByte(), granules * in_bytes(1))
    where = f"arena, {traced.label}, {share:.0%} in memory"
    yield Quantity(
        name=f"{where}, were there no fragments: loading",
        value=_loading(free_of_fragments, load),
        unit="ms per 1,000 requests",
    )
    for way, (allocator, most) in ways.items():
        outcome = simulate_arena(traced.trace, FrequencyPerByte(), allocator(granules), most_moved=most)
        yield Quantity(name=f"{where}, {way}: in use", value=outcome.used_share, unit="share")
        yield Quantity(
            name=f"{where}, {way}: loading", value=_loading(outcome, load, move), unit="ms per 1,000 requests"
        )


def _costs(plan: Plan, base: Path) -> tuple[Cost, Cost, list[Quantity]]:
    num_tenants, rounds, batch = plan.loads
    with tempfile.TemporaryDirectory() as folder:
        load = measure_loads(base, Path(folder), num_tenants=num_tenants, rounds=rounds, batch=batch)
    move = measure_moves(rounds=2 * rounds)
    quantities = []
    for name, cost in (("load", load), ("move", move)):
        quantities += [
            Quantity(name=f"a {name}, fixed", value=cost.fixed_microseconds, unit="us"),
            Quantity(name=f"a {name}, by bytes", value=1000 * cost.nanoseconds_per_byte, unit="us per MB"),
        ]
    fixed = load.fixed_bytes / 1e3
    quantities.append(Quantity(name="bytes that take as long as a load's fixed part", value=fixed, unit="kB"))
    return load, move, quantities


def measure(plan: Plan, arguments: Arguments, base: Path) -> BenchmarkResult:
    """Costs on this machine, with the model in folder ``base``; then all traces under all policies."""
    load, move, quantities = _costs(plan, base)
    curves: list[Curve] = []
    constants: list[Curve] = []
    arena: list[Quantity] = []
    total = 0
    for name in TRACES:
        traced = _Traced.draw(name, plan)
        total = traced.total
        drawn, found = _compare(traced, plan, load)
        curves += drawn
        quantities += found
        constants += [_half_lives(traced, plan, load), _fixed_costs(traced, plan, load)]
        if name in ("zipf_1", "drifting_zipf_1"):
            for share in plan.arena_shares:
                arena += _arena(traced.first(plan.arena_requests), share, load, move)
        print(f"{traced.label}: done")
    return BenchmarkResult.of(
        arguments,
        NAME,
        QUESTION,
        settings={
            "tenants": plan.tenants,
            "requests": plan.requests,
            "requests_to_the_arena": plan.arena_requests,
            "bytes_of_all_tenants": total,
            "fixed_cost_of_a_miss_in_the_policy": f"{FIXED_COST_BYTES / 1e3:.0f} kB",
            "half_life_in_the_policy": f"{HALF_LIFE_TURNOVERS:g} turnovers",
        },
        notes=NOTES,
        quantities=(*quantities, *arena),
        curves=(*curves, *constants),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments(NAME, QUESTION, argv)
    result = measure(QUICK if arguments.quick else FULL, arguments, packaged_model())
    result.write(arguments.out)
    for quantity in result.quantities:
        print(quantity)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
