"""How many tenants does one machine serve from little memory, and what does that cost?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from benchmarks.arguments import Arguments, read_arguments, read_texts
from benchmarks.result import BenchmarkResult, Case, Curve, Quantity, Ratio, System, Table
from benchmarks.tenant_fleet import FLEET, Traffic, draw_requests, fleet_tenants, tenant_name
from benchmarks.tenant_workers import BATCH, Answered, EngineOptions, EngineProcess, drop_file_cache
from hmi_engine.demo.base_model import packaged_model
from hmi_engine.demo.stream import cut_to_tokens
from hmi_engine.demo.timing import interleave
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.store import Store

__all__ = ["main", "measure"]

QUESTION = "How many tenants does one machine serve from little memory, and what does that cost?"
DOMAIN = "documentation"
MAX_TOKENS = 64
WARM_UP = 1
_FIRST_SEED, _WARM_UP_SEED = 7_000, 1_000_000
_REQUESTS_PER_PLACE = 2
ALL = "all in memory"
SHARES = {ALL: 1.0, "10 % in memory": 0.1, "5 % in memory": 0.05}
AHEAD = "5 % in memory, queues of 512"
TEN = "the first 10 tenants"
NOTES = (
    "Every tenant has weights of its own. In turn: LoRA of rank 4, 8 and 16 on query and value, bottlenecks "
    "of width 8, 16 and 32, IA3, BitFit, all on the upper layers, each with a head of four classes.",
    f"Requests come in calls of {BATCH} of one text each, the next call when the one before has been "
    "answered; a request's latency is that of its call. Queues of 512 show the engine so many at once.",
    "Each engine runs in a process of its own and waits idle while another is measured. RSS is what the "
    "operating system says of that process, with Python, torch, model and the mapped tables.",
    "The share in memory is that of the bytes that all tenants take in the arena. Files that are read lie in "
    "the operating system's file cache, as on any machine with memory to spare, but where 'cold' says that "
    "it was told to forget them before each repetition.",
    "Warm: each engine has answered {warm_up} requests of the same law before, or twice as many as tenants "
    "fit, if that is more; where all fit every tenant was loaded.",
    "Growth: the same store with more and more tenants, beside its first 10 alone in the same minutes.",
)


@dataclass(frozen=True)
class _Plan:
    """Sizes of a run; ``calls`` are those of a repetition, ``growth_calls`` those of growth's."""

    growth: tuple[int, ...]
    full: int
    calls: int
    growth_calls: int
    repetitions: int
    warm_up_requests: int
    plot_bytes: int


QUICK = _Plan((10, 40), 40, 2, 2, 2, 64, 1 << 20)
FULL = _Plan((10, 1_000, 10_000, 100_000), 10_000, 20, 8, 7, 3_000, 64 << 20)


@dataclass
class _Bench:
    plan: _Plan
    store: Path
    texts: list[str]
    quantities: list[Quantity] = field(default_factory=list)
    rows: list[tuple[str | float, ...]] = field(default_factory=list)
    arena_bytes: int = 0
    num_tenants: int = 0

    def rounds(self, traffic: Traffic, calls: int) -> list[list[tuple[str, str]]]:
        """Requests of every repetition, all different."""
        return [
            draw_requests(traffic, self.texts, calls * BATCH, _FIRST_SEED + number)
            for number in range(WARM_UP + self.plan.repetitions)
        ]

    @contextmanager
    def engine(
        self, share: float, traffic: Traffic, requests_per_call: int = BATCH
    ) -> Iterator[EngineProcess]:
        """An engine that holds a share of all tenants' bytes, warmed up by traffic of the same law."""
        budget = max(int(share * self.arena_bytes), 4 << 20)
        process = EngineProcess(EngineOptions(self.store, budget, requests_per_call))
        try:
            if share >= 1:
                process.prefetch([tenant_name(number) for number in range(traffic.num_tenants)])
            count = self.plan.warm_up_requests
            if share < 1:
                count = max(count, int(_REQUESTS_PER_PLACE * share * traffic.num_tenants))
            process.answer(draw_requests(traffic, self.texts, count, _WARM_UP_SEED))
            yield process
        finally:
            process.close()


def _add_tenants(bench: _Bench, count: int) -> None:
    """Adds tenants up to ``count`` and takes the bytes that all of them take in an arena."""
    with Store.open(bench.store) as store:
        present = bench.num_tenants
        store.add_tenants(fleet_tenants(store.general, DOMAIN, range(present, count)))
        sizes = [AdapterArena.allocated_bytes(info.bytes // 4) for info in store.tenants.values()]
    bench.num_tenants = count
    bench.arena_bytes = sum(sizes)


@dataclass(frozen=True)
class _Contender:
    description: str
    share: float
    traffic: Traffic
    requests_per_call: int = BATCH


def _case(
    bench: _Bench,
    name: str,
    contenders: Mapping[str, _Contender],
    baseline: str,
    calls: int,
    *,
    is_cold: bool = False,
) -> Case:
    """Engines in turn on requests of one law; all get the same requests where their law is the same."""
    answered: dict[str, list[Answered]] = {label: [] for label in contenders}
    with ExitStack() as stack:
        engines = {
            label: stack.enter_context(bench.engine(each.share, each.traffic, each.requests_per_call))
            for label, each in contenders.items()
        }
        rounds = {label: bench.rounds(each.traffic, calls) for label, each in contenders.items()}

        def on_round(label: str) -> Callable[[int], None]:
            return lambda number: answered[label].append(engines[label].answer(rounds[label][number]))

        def forget() -> None:
            if is_cold:
                drop_file_cache(bench.store / "tenants")

        forget()
        seconds = interleave(
            {label: on_round(label) for label in contenders},
            bench.plan.repetitions,
            warm_up=WARM_UP,
            on_repetition=forget,
        )
    work = [calls * BATCH] * bench.plan.repetitions
    systems = {
        label: System.of(label, each.description, seconds[label], work, "requests")
        for label, each in contenders.items()
    }
    bench.rows.extend(
        _row(f"{name}: {label}", system, answered[label][WARM_UP:]) for label, system in systems.items()
    )
    return Case(
        name=name,
        settings={"tenants": bench.num_tenants, "adapter_bytes_of_all": bench.arena_bytes},
        systems=tuple(systems.values()),
        ratios=tuple(
            Ratio.of(system, systems[baseline]) for label, system in systems.items() if label != baseline
        ),
    )


COLUMNS = (
    "engine",
    "requests/s",
    "latency p50, ms",
    "latency p99, ms",
    "miss ratio, %",
    "read per call, KiB",
    "RSS, MiB",
)


def _row(name: str, system: System, answered: Sequence[Answered]) -> tuple[str | float, ...]:
    latencies = np.array(list(chain.from_iterable(each.latencies for each in answered)))
    hits, misses = sum(each.hits for each in answered), sum(each.misses for each in answered)
    return (
        name,
        system.rate.value,
        1e3 * float(np.quantile(latencies, 0.5)),
        1e3 * float(np.quantile(latencies, 0.99)),
        100 * misses / max(1, hits + misses),
        sum(each.bytes_read for each in answered) / max(1, len(latencies)) / 2**10,
        answered[-1].resident_bytes / 2**20,
    )


def _capped(traffic: Traffic) -> dict[str, _Contender]:
    described = {
        label: _Contender(f"arena of {share:.0%} of the tenants' bytes", share, traffic)
        for label, share in SHARES.items()
    }
    ahead = _Contender("the same arena; Engine.run gets 512 requests a call", 0.05, traffic, 512)
    return described | {AHEAD: ahead}


def _full_cases(bench: _Bench) -> list[Case]:
    """The fleet under each law, and with a cold file cache."""
    count = bench.num_tenants
    zipf, uniform = Traffic(count, 1.0), Traffic(count, 0.0)
    cold = {label: each for label, each in _capped(zipf).items() if label != AHEAD}
    calls = bench.plan.calls
    return [
        _case(bench, f"{count:,} tenants, Zipf(1)", _capped(zipf), ALL, calls),
        _case(bench, f"{count:,} tenants, uniform", _capped(uniform), ALL, calls),
        _case(bench, f"{count:,} tenants, Zipf(1), cold file cache", cold, ALL, calls, is_cold=True),
    ]


def _growth_case(bench: _Bench) -> Case:
    count = bench.num_tenants
    zipf = Traffic(count, 1.0)
    ten = _Contender("all of them in memory", 1.0, Traffic(min(10, count), 1.0))
    contenders = {
        TEN: ten,
        ALL: _Contender("Zipf(1) over all tenants", 1.0, zipf),
        "5 % in memory": _Contender("Zipf(1) over all tenants", 0.05, zipf),
    }
    return _case(bench, f"growth to {count:,} tenants", contenders, TEN, bench.plan.growth_calls)


def _curves(cases: Sequence[Case], plan: _Plan) -> list[Curve]:
    growth = [case for case in cases if case.name.startswith("growth")]
    return [
        Curve(
            figure="growth",
            name=label,
            x_label="tenants",
            y_label="requests/s over those with the first 10 tenants alone",
            x=tuple(float(count) for count in plan.growth),
            y=tuple(
                next(ratio.times.value for ratio in case.ratios if ratio.faster == label) for case in growth
            ),
            y_unit="times",
        )
        for label in (ALL, "5 % in memory")
    ]


def measure(arguments: Arguments) -> BenchmarkResult:
    """Builds one store that grows, and measures at each size."""
    plan = QUICK if arguments.quick else FULL
    data = read_texts(arguments, max_words=60)
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        with Store.create(path, general=packaged_model()) as store:
            corpus = chain.from_iterable(domain.texts for domain in data.domains)
            store.add_domain(DOMAIN, corpus, plot_bytes=plan.plot_bytes)
            texts = [example.text for task in data.tasks for example in task.test]
            texts = cut_to_tokens(texts, store.encoder, MAX_TOKENS)
            model_bytes = sum(file.bytes for file in store.catalog.general_files())
            settings: dict[str, JsonValue] = {
                "text": data.source,
                "held_out_texts": len(texts),
                "max_tokens": MAX_TOKENS,
                "plot_layers": store.general.plot_layers,
                "fleet": [f"{kind} {rank}" if rank else kind for kind, rank in FLEET],
                "calls_per_repetition": plan.calls,
                "repetitions": plan.repetitions,
            }
        bench = _Bench(plan, path, texts)
        for count in plan.growth:
            _add_tenants(bench, count)
            print(f"{count:,} tenants, {bench.arena_bytes / 2**20:,.0f} MiB", flush=True)
            cases.append(_growth_case(bench))
            if count == plan.full:
                full = _full_cases(bench)
                bench.quantities.extend(_model_per_tenant(count, model_bytes, bench.arena_bytes))
    return BenchmarkResult.of(
        arguments,
        "tenants",
        QUESTION,
        settings=settings,
        notes=tuple(note.replace("{warm_up}", f"{plan.warm_up_requests:,}") for note in NOTES),
        cases=(*full, *cases),
        quantities=tuple(bench.quantities),
        tables=(Table(title="Latency, misses and memory", columns=COLUMNS, rows=tuple(bench.rows)),),
        curves=tuple(_curves(cases, plan)),
    )


def _model_per_tenant(count: int, model_bytes: int, arena_bytes: int) -> list[Quantity]:
    tenant_bytes = arena_bytes / count
    return [
        Quantity(
            name=f"a model per tenant, {count:,} of them", value=count * model_bytes / 2**30, unit="GiB"
        ),
        Quantity(name=f"adapters and heads of {count:,} tenants", value=arena_bytes / 2**30, unit="GiB"),
        Quantity(name="a tenant's bytes over the model's", value=tenant_bytes / model_bytes, unit="share"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments("tenants", QUESTION, argv)
    result = measure(arguments)
    result.write(arguments.out)
    for line in result.ratio_lines():
        print(line)
    for row in result.tables[0].rows:
        print(*(cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row), sep="  ")
    for quantity in result.quantities:
        print(f"{quantity.name}: {quantity.value:.3g} {quantity.unit}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
