"""An engine on the GPU, from text to answers, beside PEFT and one model per tenant: checked, then timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from rich.console import Console

from benchmarks.gpu.options import Options
from benchmarks.gpu.pipeline_share import PipelinePlan, measure_pipeline
from benchmarks.gpu.platform import Platform, choose_platform, current_commit, describe_device
from benchmarks.gpu.random_base import number_texts, write_random_base
from benchmarks.peers import OneModelPerTenant, Peer, PeftMixedBatch, PeftOneAtATime
from benchmarks.result import BenchmarkResult, Case, Ratio, System
from benchmarks.same_work import add_bare_twins, check_adapters_count, check_same_work, copy_tenants
from benchmarks.tenant_fleet import fleet_tenants, tenant_name
from hmi_engine.demo.building import add_random_tenants
from hmi_engine.demo.environment import describe_machine, installed_versions
from hmi_engine.demo.peers import HmiPeer, tune
from hmi_engine.demo.peers.export import export_tenants
from hmi_engine.demo.peers.interface import ServedTenant
from hmi_engine.demo.peers.transformers_batch import TransformersPeer
from hmi_engine.demo.tasks import Task
from hmi_engine.demo.timing import interleave
from hmi_engine.engine import Engine
from hmi_engine.knowledge.examples import Example
from hmi_engine.request import Request
from hmi_engine.store import Store

__all__ = ["DRY", "FULL", "PREFIX", "Plan", "measure", "open_store", "request_rounds"]

QUESTION = "How fast is a whole engine on this GPU, from text to answers, beside what people use today?"
DOMAIN = "numbers"
PREFIX = "mixed"
TOLERANCE = 5e-3
"""Of probabilities in float32: 2e-3 was seen on an H200, where products are summed in other orders."""
RANK = 16
HALF, PLAIN, MANY = "HMI, K = N/2", "HMI, K = 0", "HMI, K = N/2, 1,024 tenants"
LAUNCHED = "HMI, K = N/2, without CUDA graphs"
NOTES = (
    "The base has BERT-base's shape and random weights; so have tenants, LoRA of rank 16 on query and value "
    "of the upper half. Texts are numbers drawn by Zipf's law, none of them in the table's corpus.",
    "All systems: the same texts, tokenizer (inside the timed part) and weights, in bfloat16.",
    "The K = 0 engine and PEFT gave the same probabilities to 5e-3, in float32, before anything was timed. "
    "K = N/2 computes another function, for which HMI's tenants are trained.",
    "PEFT's forward passes hold as many texts, sorted by length, as a search beforehand found fastest; so do "
    "those of one model per tenant.",
    "1,024 tenants: LoRA, bottlenecks, IA3 and BitFit of many ranks in turn, all resident.",
)


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    tenants: int
    requests: int
    words: int
    repetitions: int
    table_bytes: int
    pipeline: PipelinePlan


FULL = Plan(32, 1024, 40, 9, 96 << 20, PipelinePlan(1024, 1024, 4096, 400, 7))
QUICK = Plan(16, 512, 40, 5, 16 << 20, PipelinePlan(256, 256, 2048, 100, 3))
DRY = Plan(2, 4, 5, 1, 1 << 20, PipelinePlan(12, 12, 30, 8, 1))


def measure(options: Options, console: Console) -> BenchmarkResult:
    """Builds two stores, then measures throughput, then what the pipeline hides."""
    platform = choose_platform(is_dry=options.is_dry)
    plan = DRY if options.is_dry else QUICK if options.is_quick else FULL
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hmi-gpu-serving-")))
        base = write_random_base(folder / "base", is_tiny=options.is_dry)
        stores = {
            name: stack.enter_context(open_store(folder / name, base, layers, plan))
            for name, layers in (("half", None), ("plain", 0))
        }
        copy_tenants(_small_tenants(stores["half"]), stores["half"], stores["plain"])
        console.print("two stores built")
        cases = _throughput(stores["half"], stores["plain"], folder, platform, plan)
        console.print(cases[0].model_dump_json(include={"systems": {"__all__": {"name", "rate"}}}))
        texts = number_texts(plan.pipeline.requests, plan.words, seed=3)
        requests = [Request(_cold(number, plan), text) for number, text in enumerate(texts)]
        quantities = measure_pipeline(stores["half"], requests, platform, plan.pipeline)
        general = stores["half"].general
        settings: dict[str, JsonValue] = {
            "commit": current_commit(),
            "device": None if (device := describe_device(platform)) is None else device.model_dump(),
            "layers": general.num_layers,
            "hidden_size": general.hidden_size,
            "plot_layers": general.plot_layers,
            "rank": RANK,
            **{key: value for key, value in asdict(plan).items() if key != "pipeline"},
        }
    return BenchmarkResult(
        name="gpu serving",
        question=QUESTION,
        command=options.command,
        is_quick=options.is_quick or options.is_dry,
        machine=describe_machine(),
        versions=installed_versions(),
        settings=settings,
        notes=NOTES,
        cases=tuple(cases),
        quantities=quantities,
    )


@contextmanager
def open_store(path: Path, base: Path, plot_layers: int | None, plan: Plan) -> Iterator[Store]:
    """A store; where layers are looked up with the tenants that all systems serve, and the many others."""
    with Store.create(path, general=str(base), plot_layers=plot_layers) as store:
        corpus = number_texts(8 * plan.requests, plan.words, seed=1)
        # Without layers to look up a domain is no more than a name.
        store.add_domain(DOMAIN, corpus, plot_bytes=plan.table_bytes if store.general.plot_layers else 0)
        if store.general.plot_layers:
            example = tuple(Example("1 2", label) for label in ("first", "second"))
            task = Task(PREFIX, DOMAIN, "", example, example)
            add_random_tenants(store, [task], plan.tenants, rank=RANK, pooling="pooler", prefix=PREFIX)
            store.add_tenants(fleet_tenants(store.general, DOMAIN, range(plan.pipeline.tenants)))
        yield store


def _cold(number: int, plan: Plan) -> str:
    return tenant_name(number % plan.pipeline.tenants)


def _small_tenants(store: Store) -> list[str]:
    return [name for name in store.tenants if name.startswith(f"{PREFIX}/")]


def _throughput(half: Store, plain: Store, folder: Path, platform: Platform, plan: Plan) -> list[Case]:
    names = _small_tenants(half)
    rounds = request_rounds(names, plan)
    device = "cpu" if platform.is_dry else str(platform.device)
    dtype = torch.float32 if platform.is_dry else torch.bfloat16
    served = export_tenants(half, names, folder / "exported")
    _check(plain, served[:2], rounds[0], device)
    with ExitStack() as stack:
        engines: list[Engine] = []

        def engine(store: Store, **options: bool) -> Engine:
            opened = _engine(store, device, "auto", **options)
            engines.append(stack.enter_context(opened))
            return opened

        peers: list[Peer] = [
            HmiPeer(
                engine(half), name=HALF, description="half of the layers looked up, three batches in flight"
            ),
            HmiPeer(engine(plain), name=PLAIN, description="every layer computed, three batches in flight"),
            HmiPeer(
                engine(half, device_graphs=False),
                name=LAUNCHED,
                description="layers launched kernel by kernel",
            ),
            *(
                peer(plain.general_folder, plain.encoder, device=device, dtype=dtype)
                for peer in (PeftMixedBatch, PeftOneAtATime, OneModelPerTenant)
            ),
        ]
        for peer in peers:
            peer.prepare(served)
        _tune(peers, rounds[0], plan)
        many = [
            [Request(_cold(number, plan), request.text) for number, request in enumerate(requests)]
            for requests in rounds
        ]
        fleet = engine(half)
        fleet.prefetch([request.tenant for request in many[0]])

        def on_round(
            run: Callable[[Sequence[Request]], object], of: list[list[Request]]
        ) -> Callable[[int], object]:
            return lambda number: run(of[1 + number])

        timed = {peer.name: on_round(peer.run, rounds) for peer in peers}
        timed[MANY] = on_round(fleet.run, many)
        seconds = interleave(timed, plan.repetitions, warm_up=1)
        ours = (HALF, PLAIN, LAUNCHED, MANY)
        stages = {name: each.stats().stages for name, each in zip(ours, engines, strict=True)}
    systems = _systems(peers, seconds, plan)
    return [
        Case(
            name=f"{plan.tenants} tenants mixed, {plan.requests} texts a call",
            settings={
                "texts_per_forward_pass": {
                    peer.name: peer.max_sequences for peer in peers if isinstance(peer, TransformersPeer)
                },
                "stages": stages,
            },
            systems=tuple(systems.values()),
            ratios=tuple(Ratio.of(systems[HALF], each) for name, each in systems.items() if name != HALF),
        )
    ]


def request_rounds(names: Sequence[str], plan: Plan) -> list[list[Request]]:
    """New texts for each repetition, for warming up and for the search before; tenants in turn."""
    rounds = []
    for number in range(plan.repetitions + 2):
        texts = number_texts(plan.requests, plan.words, seed=10 + number)
        rounds.append([Request(names[place % len(names)], text) for place, text in enumerate(texts)])
    return rounds


def _systems(peers: Sequence[Peer], seconds: Mapping[str, Sequence[float]], plan: Plan) -> dict[str, System]:
    work = [float(plan.requests)] * plan.repetitions
    descriptions = {peer.name: peer.description for peer in peers} | {MANY: "each text of another tenant"}
    return {name: System.of(name, descriptions[name], seconds[name], work, "texts") for name in seconds}


def _engine(store: Store, device: str, dtype: str, **options: bool) -> Engine:
    memory = {"device_memory": "8GiB"} if device != "cpu" else {}
    return Engine(
        store, device=device, dtype=dtype, pipeline_depth=3, record_traffic=False, **memory, **options
    )


def _check(store: Store, served: Sequence[ServedTenant], requests: Sequence[Request], device: str) -> None:
    """Raises HmiError if the engine and PEFT differ where they compute the same, in float32."""
    twins = add_bare_twins(store, [tenant.name for tenant in served])
    requests = [request for request in requests if request.tenant in twins]
    with _engine(store, device, "float32") as engine:
        ours = HmiPeer(engine, name=PLAIN, description="")
        theirs = PeftMixedBatch(store.general_folder, store.encoder, device=device)
        theirs.prepare(served)
        check_adapters_count(ours, requests, twins, tolerance=TOLERANCE)
        check_same_work(ours, theirs, requests, tolerance=TOLERANCE)
        theirs.close()


def _tune(peers: Sequence[Peer], requests: Sequence[Request], plan: Plan) -> None:
    sizes = [size for size in (256, 128, 64, 32) if size <= plan.requests] or [plan.requests]
    for peer in peers:
        if isinstance(peer, TransformersPeer):
            tune(peer, requests, candidates=sizes)
