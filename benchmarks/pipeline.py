"""How much of reading and searching does the pipeline hide behind compute, and what does that gain?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pydantic import JsonValue

import hmi_kernels
from benchmarks.arguments import Arguments, read_arguments, read_texts
from benchmarks.result import BenchmarkResult, Case, Ratio, System, Table
from benchmarks.stage_seconds import hidden_share_between, stage_seconds
from benchmarks.tenant_fleet import FLEET, fleet_tenants, tenant_name
from benchmarks.trace_figure import draw_trace
from hmi_engine.demo.base_model import packaged_model
from hmi_engine.demo.stream import cut_to_tokens
from hmi_engine.demo.timing import interleave
from hmi_engine.engine import Engine
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.request import Request
from hmi_engine.serving_core import EngineStatistics
from hmi_engine.store import Store

__all__ = ["main", "measure"]

QUESTION = "How much of reading and searching does the pipeline hide, and what does that gain?"
DOMAIN = "documentation"
MAX_TOKENS = 64
WARM_UP = 1
DEPTHS = (1, 2, 4)
ALL = "all in memory"
NOTES = (
    "Every request asks for another tenant, in turn of all, and each engine has memory for the tenants of "
    "about four batches: nearly every request finds its tenant cold. The ceiling has all tenants in memory.",
    "`pipeline_depth=1` schedules, reads, searches, computes and responds one after another; the others run "
    "the same steps with 2 or 4 batches in flight, and gave the same answers to 1e-5 before the timing.",
    "The disk is simulated by `hmi_kernels.set_read_latency`: each read sleeps so long in the thread that "
    "reads, beside the time that it really takes from the file cache; reads at the same time wait together "
    "and share the bandwidth. 'file cache' adds nothing.",
    "Hidden: of the seconds that fetching (finding room, reading) and searching took, the part that compute "
    "did not wait for. Without a pipeline it is 0 by construction.",
    "On a machine without a GPU, searching and what the processor does for reading take the same cores as "
    "compute: waiting can be hidden, work cannot.",
)


@dataclass(frozen=True)
class _Disk:
    name: str
    seconds: float = 0.0
    bytes_per_second: float | None = None

    @contextmanager
    def simulated(self) -> Iterator[None]:
        hmi_kernels.set_read_latency(self.seconds, self.bytes_per_second)
        try:
            yield
        finally:
            hmi_kernels.set_read_latency(0.0)


DISKS = (
    _Disk("file cache"),
    _Disk("5 ms, 200 MB/s", 0.005, 2e8),
    _Disk("20 ms, 100 MB/s", 0.020, 1e8),
)


@dataclass(frozen=True)
class _Plan:
    tenants: int
    requests: int
    repetitions: int
    plot_bytes: int
    disks: tuple[_Disk, ...]
    batch_tokens: int
    tenants_in_memory: int


QUICK = _Plan(48, 40, 2, 1 << 20, (DISKS[0], DISKS[-1]), 128, 16)
FULL = _Plan(1024, 512, 5, 64 << 20, DISKS, 1024, 128)


@dataclass
class _Requests:
    """Requests that ask for all tenants in turn, with texts that follow each other."""

    texts: Sequence[str]
    plan: _Plan

    def of(self, number: int) -> list[Request]:
        first = number * self.plan.requests
        return [
            Request(tenant_name(place % self.plan.tenants), text=self.texts[place % len(self.texts)])
            for place in range(first, first + self.plan.requests)
        ]


@dataclass
class _Contender:
    """An engine, and what it had done when the timed repetitions began."""

    engine: Engine
    description: str
    before: EngineStatistics | None = None

    def begin(self) -> None:
        self.before = self.engine.stats()

    def seen(self) -> _Seen:
        assert self.before is not None
        after = self.engine.stats()
        worked = stage_seconds(after, self.before)
        adapters, earlier = after.adapters or {}, self.before.adapters or {}
        hits, misses = (adapters[name] - earlier[name] for name in ("hits", "misses"))
        return _Seen(
            seconds=(
                worked["fetch"],
                worked["search"],
                worked["compute"],
                stage_seconds(after, self.before, of="waiting_seconds")["compute"],
            ),
            hidden_share=hidden_share_between(after, self.before) or 0.0,
            miss_ratio=misses / max(1, hits + misses),
        )


@dataclass(frozen=True)
class _Seen:
    """What one engine's stages did in the timed repetitions.

    Attributes:
        seconds: of fetching, searching and computing, and that compute waited.
        hidden_share: of the first two.
        miss_ratio: of the tenants that batches asked for.
    """

    seconds: tuple[float, float, float, float]
    hidden_share: float
    miss_ratio: float


def _answer(engine: Engine, requests: list[Request]) -> list[dict[str, float]]:
    responses = engine.run(requests)
    for response in responses:
        if response.error is not None:
            raise response.error
    return [response.scores for response in responses]


def _check_equal(contenders: Mapping[str, _Contender], requests: list[Request]) -> None:
    answers = {name: _answer(each.engine, requests) for name, each in contenders.items()}
    expected = answers.pop(ALL)
    for name, scores in answers.items():
        for ours, theirs in zip(scores, expected, strict=True):
            if any(abs(ours[label] - theirs[label]) > 1e-5 for label in theirs):
                raise AssertionError(f"{name} answers something else")


@contextmanager
def _contenders(store: Store, plan: _Plan, memory: int, trace: Path) -> Iterator[dict[str, _Contender]]:
    with ExitStack() as stack:

        def open_engine(**options: object) -> Engine:
            common = {"max_batch_tokens": plan.batch_tokens, "record_traffic": False}
            return stack.enter_context(Engine(store, **common, **options))

        contenders = {
            f"{depth} in flight": _Contender(
                open_engine(
                    pipeline_depth=depth, host_memory=memory, trace=trace if depth == DEPTHS[1] else None
                ),
                f"pipeline_depth={depth}" + (": one thing after another" if depth == 1 else ""),
            )
            for depth in DEPTHS
        }
        contenders[ALL] = _Contender(
            open_engine(pipeline_depth=1, host_memory="16GiB"), "nothing to read: the ceiling"
        )
        yield contenders


def _case(
    disk: _Disk, store: Store, memory: int, requests: _Requests, plan: _Plan, trace: Path
) -> tuple[Case, list[tuple[str | float, ...]]]:
    with _contenders(store, plan, memory, trace) as contenders:
        names = [tenant_name(number) for number in range(plan.tenants)]
        contenders[ALL].engine.prefetch(names)
        _check_equal(contenders, requests.of(0))
        for each in contenders.values():  # every layout is known from now on
            _answer(each.engine, [Request(name, text=requests.texts[0]) for name in names])
        with disk.simulated():

            def on_round(name: str) -> Callable[[int], None]:
                def run(number: int) -> None:
                    if number == WARM_UP:
                        contenders[name].begin()
                    _answer(contenders[name].engine, requests.of(number))

                return run

            seconds = interleave(
                {name: on_round(name) for name in contenders}, plan.repetitions, warm_up=WARM_UP
            )
        seen = {name: each.seen() for name, each in contenders.items()}
    work = [plan.requests] * plan.repetitions
    systems = {
        name: System.of(name, each.description, seconds[name], work, "requests")
        for name, each in contenders.items()
    }
    synchronous = systems[f"{DEPTHS[0]} in flight"]
    rows = [_row(disk, name, seen[name], plan) for name in contenders]
    case = Case(
        name=disk.name,
        settings={"miss_ratio": round(seen["1 in flight"].miss_ratio, 3)},
        systems=tuple(systems.values()),
        ratios=tuple(Ratio.of(each, synchronous) for each in systems.values() if each is not synchronous),
    )
    return case, rows


COLUMNS = (
    "disk, engine",
    "fetch, ms a request",
    "search, ms a request",
    "compute, ms a request",
    "compute waits, ms a request",
    "hidden, %",
    "miss ratio, %",
)


def _row(disk: _Disk, name: str, seen: _Seen, plan: _Plan) -> tuple[str | float, ...]:
    count = plan.requests * plan.repetitions
    each = [1e3 * value / count for value in seen.seconds]
    return (f"{disk.name}: {name}", *each, 100 * seen.hidden_share, 100 * seen.miss_ratio)


def measure(arguments: Arguments) -> BenchmarkResult:
    """Builds one store, and measures on each disk."""
    plan = QUICK if arguments.quick else FULL
    data = read_texts(arguments, max_words=60)
    cases: list[Case] = []
    rows: list[tuple[str | float, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with Store.create(Path(folder) / "store", general=packaged_model()) as store:
            corpus = chain.from_iterable(domain.texts for domain in data.domains)
            store.add_domain(DOMAIN, corpus, plot_bytes=plan.plot_bytes)
            store.add_tenants(fleet_tenants(store.general, DOMAIN, range(plan.tenants)))
            texts = [example.text for task in data.tasks for example in task.test]
            texts = cut_to_tokens(texts, store.encoder, MAX_TOKENS)
            sizes = [AdapterArena.allocated_bytes(info.bytes // 4) for info in store.tenants.values()]
            memory = plan.tenants_in_memory * sum(sizes) // len(sizes)
            settings: dict[str, JsonValue] = {
                "text": data.source,
                "tenants": plan.tenants,
                "fleet": [f"{kind} {rank}" if rank else kind for kind, rank in FLEET],
                "max_tokens": MAX_TOKENS,
                "max_batch_tokens": plan.batch_tokens,
                "adapter_memory": memory,
                "requests_per_repetition": plan.requests,
                "repetitions": plan.repetitions,
            }
            requests = _Requests(texts, plan)
            for disk in plan.disks:
                case, own_rows = _case(disk, store, memory, requests, plan, trace)
                cases.append(case)
                rows += own_rows
                print(f"{disk.name}: done", flush=True)
        if not arguments.quick:
            draw_trace(trace, Path("docs") / "figures" / "pipeline-trace.svg", seconds=0.5)
    return BenchmarkResult.of(
        arguments,
        "pipeline",
        QUESTION,
        settings=settings,
        notes=NOTES,
        cases=cases,
        tables=(Table(title="Where the time goes", columns=COLUMNS, rows=tuple(rows)),),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments("pipeline", QUESTION, argv)
    result = measure(arguments)
    result.write(arguments.out)
    for line in result.ratio_lines():
        print(line)
    for row in result.tables[0].rows:
        print(*(cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row), sep="  ")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
