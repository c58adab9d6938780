"""How fast is a batch that mixes 32 tenants, on held-out real text, beside what people use today?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
from pydantic import JsonValue

from benchmarks.arguments import Arguments, read_arguments, read_texts
from benchmarks.peers import OneModelPerTenant, Peer, PeftMixedBatch, PeftOneAtATime
from benchmarks.result import BenchmarkResult, Case, Quantity, Ratio, System
from benchmarks.same_work import add_bare_twins, check_adapters_count, check_same_work, copy_tenants
from hmi_engine.demo.base_model import PACKAGE, packaged_model
from hmi_engine.demo.building import add_random_tenants
from hmi_engine.demo.peers import HmiPeer, answer_stream, tune
from hmi_engine.demo.peers.export import export_tenants
from hmi_engine.demo.peers.transformers_batch import TransformersPeer
from hmi_engine.demo.stream import MixedStream, StreamSource, cut_to_tokens
from hmi_engine.demo.tasks import DemoData, Task
from hmi_engine.demo.timing import interleave
from hmi_engine.engine import Engine
from hmi_engine.knowledge.adapters import LORA_SITES
from hmi_engine.models.linear import has_bfloat16_products
from hmi_engine.request import Request, Response
from hmi_engine.store import Store

__all__ = ["main"]

QUESTION = "How fast is a batch that mixes 32 tenants, on held-out real text, beside what people use today?"
NUM_TENANTS = 32
RANK = 16
WIDE_RANK = 64
WIDE = f"LoRA of rank {WIDE_RANK} at every linear layer"
MAX_TOKENS = 64
MAX_WORDS = 60
WARM_UP = 1
DEFAULT, EXACT, NO_PLOT = "HMI back-off, K = N/2", "HMI exact, K = N/2", "HMI, K = 0"
HALF = f"{DEFAULT}, bfloat16"
NOTES = (
    "Every batch holds one request of each of 32 tenants, with random LoRA of rank 16 on query and value of "
    "the upper half of the layers and random heads, the same weights in every system.",
    "All systems get the same texts, tokenizer (inside the timed part), batches and threads. A repetition "
    "is new text to all of them, and none of it is in a table's corpus.",
    "The K = 0 engine and PEFT gave the same probabilities to 1e-3 before anything was timed; that the "
    "adapters change them by more was checked too. K = N/2 computes another function, for which HMI's "
    "tenants are trained; the peers compute all layers.",
    "Wide tenants have LoRA of rank 64 at every linear layer of the upper half: those that docs/accuracy.md "
    "measures.",
    "HMI exact has seen other held-out text of the same domains before: its overlay is warm from that.",
    "PEFT's forward passes hold as many texts, sorted by length, as a search beforehand found "
    "fastest; so do those of one model per tenant, whose word embeddings are held once.",
    "'plain torch linear' turns the oneDNN weight layout off that HMI's shared layers use, to show its part.",
    "'bfloat16', where the processor multiplies it: HMI's products with the shared weights (the option "
    "`dtype`), all of PEFT's model.",
)


@dataclass(frozen=True)
class _Sizes:
    repetitions: int
    batches: int
    traffic_batches: int
    plot_bytes: int

    @classmethod
    def of(cls, arguments: Arguments) -> _Sizes:
        if arguments.quick:
            return cls(repetitions=2, batches=1, traffic_batches=1, plot_bytes=8 << 20)
        return cls(repetitions=15, batches=3, traffic_batches=24, plot_bytes=256 << 20)


@contextmanager
def plain_linear() -> Iterator[None]:
    """Shared layers run through ``torch.nn.functional.linear`` inside the block."""
    with mock.patch("hmi_engine.models.linear.has_packed_matmul", lambda: False):
        yield


class PlainLinearPeer(HmiPeer):
    """HMI without the oneDNN weight layout."""

    def run(self, requests: Sequence[Request]) -> list[Response]:
        """Answers one batch."""
        with plain_linear():
            return super().run(requests)


class HalfPeftMixedBatch(PeftMixedBatch):
    """PEFT's mixed batch, all of it in bfloat16."""

    name = f"{PeftMixedBatch.name}, bfloat16"


def _build(directory: Path, data: DemoData, sizes: _Sizes, plot_layers: int | None) -> Store:
    """A store with the domains and their tables."""
    store = Store.create(directory, general=packaged_model(), plot_layers=plot_layers)
    for domain in data.domains:
        budget = sizes.plot_bytes if store.general.plot_layers else 0
        store.add_domain(domain.name, iter(domain.texts), parent=domain.parent, plot_bytes=budget)
    return store


def _add_tenants(half: Store, plain: Store, data: DemoData) -> None:
    """In both stores 32 small and 32 wide ones over all domains; in the first also 32 of one domain."""
    tasks = _one_task_per_domain(data)
    shared = add_random_tenants(half, tasks, NUM_TENANTS, rank=RANK, pooling="pooler", prefix="mixed")
    shared += add_random_tenants(
        half, tasks, NUM_TENANTS, rank=WIDE_RANK, sites=LORA_SITES, pooling="pooler", prefix="wide"
    )
    copy_tenants(shared, half, plain)
    add_random_tenants(
        half, [_largest_domain(data)], NUM_TENANTS, rank=RANK, pooling="pooler", prefix="alike"
    )


def _one_task_per_domain(data: DemoData) -> list[Task]:
    return list({task.domain: task for task in reversed(data.tasks)}.values())[::-1]


def _largest_domain(data: DemoData) -> Task:
    return max(data.tasks, key=lambda task: len(task.test))


def _texts(data: DemoData, store: Store) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for task in data.tasks:
        texts.setdefault(task.domain, []).extend(example.text for example in task.test)
    return {domain: cut_to_tokens(part, store.encoder, MAX_TOKENS) for domain, part in texts.items()}


def _measure(
    name: str,
    peers: Mapping[str, Callable[[Sequence[Request]], object]],
    descriptions: Mapping[str, str],
    rounds: Sequence[Sequence[Request]],
    settings: dict[str, JsonValue],
    baseline: str,
) -> Case:
    """One case: every system answers every round; the ratios compare ``baseline`` with all others."""

    def on_round(run: Callable[[Sequence[Request]], object]) -> Callable[[int], object]:
        return lambda number: run(rounds[number])

    timed = {peer: on_round(run) for peer, run in peers.items()}
    seconds = interleave(timed, len(rounds) - WARM_UP, warm_up=WARM_UP)
    work = [len(batch) for batch in rounds[WARM_UP:]]
    systems = {peer: System.of(peer, descriptions[peer], seconds[peer], work, "texts") for peer in peers}
    ratios = tuple(
        Ratio.of(systems[baseline], system) for peer, system in systems.items() if peer != baseline
    )
    return Case(name=name, settings=settings, systems=tuple(systems.values()), ratios=ratios)


def _streamer(peer: Peer) -> Callable[[Sequence[Request]], object]:
    return lambda requests: answer_stream(peer, requests, batch_size=NUM_TENANTS)


@dataclass
class _Bench:
    """Everything that the cases share."""

    data: DemoData
    sizes: _Sizes
    half: Store
    plain: Store
    folder: Path
    stack: ExitStack

    def tenants(self, prefix: str) -> dict[str, str]:
        return {
            name: info.domain for name, info in self.half.tenants.items() if name.startswith(f"{prefix}/")
        }

    def engine(self, store: Store, miss: Literal["backoff", "exact"], dtype: str = "auto") -> Engine:
        return self.stack.enter_context(Engine(store, miss=miss, dtype=dtype))


def _mixed_case(bench: _Bench) -> tuple[list[Case], list[Quantity]]:
    stream = MixedStream(StreamSource(bench.tenants("mixed"), _texts(bench.data, bench.half)))
    rounds = [stream.batches(bench.sizes.batches) for _ in range(WARM_UP + bench.sizes.repetitions)]
    traffic = stream.batches(max(1, min(bench.sizes.traffic_batches, stream.num_fresh_batches())))
    engines = {"backoff": bench.engine(bench.half, "backoff"), "exact": bench.engine(bench.half, "exact")}
    peers = {peer.name: peer for peer in _mixed_peers(bench, engines)}
    tuned = _prepare(bench, peers, "mixed", traffic[:NUM_TENANTS])
    answer_stream(peers[EXACT], traffic, batch_size=NUM_TENANTS)
    before = {miss: engine.stats().plot or {} for miss, engine in engines.items()}
    settings: dict[str, JsonValue] = {
        "tenants": NUM_TENANTS,
        "batches_per_repetition": bench.sizes.batches,
        "earlier_traffic_batches": len(traffic) // NUM_TENANTS,
        "texts_that_came_twice": stream.num_repeated,
        "texts_per_forward_pass": tuned,
    }
    case = _measure(
        "32 tenants mixed",
        {name: _streamer(peer) for name, peer in peers.items()},
        {name: peer.description for name, peer in peers.items()},
        rounds,
        settings,
        DEFAULT,
    )
    exact = next(system for system in case.systems if system.name == EXACT)
    compared = (PeftMixedBatch.name, OneModelPerTenant.name)
    others = [system for system in case.systems if system.name in compared]
    ratios = [*case.ratios, *(Ratio.of(exact, other) for other in others)]
    halves = {
        system.name: system for system in case.systems if system.name in (HALF, HalfPeftMixedBatch.name)
    }
    if halves:
        ratios.append(Ratio.of(halves[HALF], halves[HalfPeftMixedBatch.name]))
    case = case.model_copy(update={"ratios": tuple(ratios)})
    return [case], [*_hit_rates(engines, before), *_token_counts(bench.half, rounds)]


def _prepare(
    bench: _Bench, peers: Mapping[str, Peer], prefix: str, requests: Sequence[Request]
) -> dict[str, JsonValue]:
    """Loads the tenants into all peers and finds the forward passes of those that have such a choice.

    Returns texts per forward pass by name. Raises HmiError if the K = 0 engine and PEFT differ.
    """
    names = list(bench.tenants(prefix))
    served = export_tenants(bench.half, names, bench.folder / prefix)
    tuned: dict[str, JsonValue] = {}
    for name, peer in peers.items():
        peer.prepare(served)
        if isinstance(peer, TransformersPeer):
            tune(peer, requests)
            tuned[name] = peer.max_sequences
    check_adapters_count(peers[NO_PLOT], requests, add_bare_twins(bench.plain, names))
    check_same_work(peers[NO_PLOT], peers[PeftMixedBatch.name], requests)
    return tuned


def _wide_case(bench: _Bench) -> Case:
    """Tenants of the size whose accuracy docs/accuracy.md tells."""
    stream = MixedStream(StreamSource(bench.tenants("wide"), _texts(bench.data, bench.half)), seed=2)
    rounds = [stream.batches(bench.sizes.batches) for _ in range(WARM_UP + bench.sizes.repetitions)]
    small = next(iter(bench.tenants("mixed")))
    wide = next(iter(bench.tenants("wide")))
    peers: dict[str, Peer] = {
        DEFAULT: HmiPeer(bench.engine(bench.half, "backoff"), name=DEFAULT, description=WIDE),
        NO_PLOT: HmiPeer(bench.engine(bench.plain, "backoff"), name=NO_PLOT, description=WIDE),
        PeftMixedBatch.name: PeftMixedBatch(bench.half.general_folder, bench.half.encoder),
    }
    settings: dict[str, JsonValue] = {
        "rank": WIDE_RANK,
        "sites": "all-linear",
        "texts_per_forward_pass": _prepare(bench, peers, "wide", rounds[0][:NUM_TENANTS]),
        "bytes_per_tenant": bench.half.tenants[wide].bytes,
        "bytes_per_small_tenant": bench.half.tenants[small].bytes,
        "texts_that_came_twice": stream.num_repeated,
    }
    return _measure(
        f"32 tenants mixed, {WIDE}",
        {name: _streamer(peer) for name, peer in peers.items()},
        {name: peer.description for name, peer in peers.items()},
        rounds,
        settings,
        DEFAULT,
    )


def _mixed_peers(bench: _Bench, engines: Mapping[str, Engine]) -> list[Peer]:
    base, encoder = bench.half.general_folder, bench.half.encoder
    backoff_plain, no_plot = bench.engine(bench.half, "backoff"), bench.engine(bench.plain, "backoff")
    no_plot_plain = bench.engine(bench.plain, "backoff")
    torch_note = "the same with plain torch linear"
    halves: list[Peer] = []
    if has_bfloat16_products():
        half = bench.engine(bench.half, "backoff", "bfloat16")
        halves.append(HmiPeer(half, name=HALF, description="products with shared weights in bfloat16"))
        halves.append(HalfPeftMixedBatch(base, encoder, dtype=torch.bfloat16))
    return [
        HmiPeer(
            engines["backoff"],
            name=DEFAULT,
            description="default engine; a missing bigram is composed of its tokens",
        ),
        HmiPeer(engines["exact"], name=EXACT, description="missing bigrams are computed and kept"),
        HmiPeer(no_plot, name=NO_PLOT, description="every layer computed: a multi-adapter server"),
        PlainLinearPeer(backoff_plain, name=f"{DEFAULT}, plain torch linear", description=torch_note),
        PlainLinearPeer(no_plot_plain, name=f"{NO_PLOT}, plain torch linear", description=torch_note),
        PeftMixedBatch(base, encoder),
        PeftOneAtATime(base, encoder),
        OneModelPerTenant(base, encoder),
        *halves,
    ]


def _hit_rates(engines: Mapping[str, Engine], before: Mapping[str, dict[str, int]]) -> list[Quantity]:
    rates = []
    for miss, engine in engines.items():
        after = engine.stats().plot or {}
        windows = after["windows"] - before[miss]["windows"]
        hits = after["window_hits"] - before[miss]["window_hits"]
        rates.append(Quantity(name=f"bigrams found, {miss}", value=hits / max(1, windows), unit="share"))
    return rates


def _token_counts(store: Store, rounds: Sequence[Sequence[Request]]) -> list[Quantity]:
    requests = [request for batch in rounds for request in batch]
    lengths = [len(ids) for ids in store.encoder.token_ids([request.text or "" for request in requests])]
    batches = [lengths[start : start + NUM_TENANTS] for start in range(0, len(lengths), NUM_TENANTS)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    return [
        Quantity(name="tokens per text", value=sum(lengths) / len(lengths), unit="tokens"),
        Quantity(
            name="padding in a batch of one forward pass", value=1 - sum(lengths) / padded, unit="share"
        ),
    ]


def _alike_case(bench: _Bench) -> Case:
    """The same texts asked of 32 tenants and of one, in one domain: nothing but the tenants differs."""
    tenants = bench.tenants("alike")
    stream = MixedStream(StreamSource(tenants, _texts(bench.data, bench.half)), seed=1)
    rounds = [stream.batches(bench.sizes.batches) for _ in range(WARM_UP + bench.sizes.repetitions)]
    engine = bench.engine(bench.half, "backoff")
    engine.prefetch(list(tenants))
    only = next(iter(tenants))

    def many(requests: Sequence[Request]) -> None:
        for start in range(0, len(requests), NUM_TENANTS):
            engine.run(requests[start : start + NUM_TENANTS])

    def one(requests: Sequence[Request]) -> None:
        many([Request(only, request.text) for request in requests])

    settings: dict[str, JsonValue] = {"domain": tenants[only], "texts_that_came_twice": stream.num_repeated}
    names = ("32 tenants", "1 tenant")
    return _measure(
        "32 tenants over 1 tenant, same text",
        dict(zip(names, (many, one), strict=True)),
        dict.fromkeys(names, f"{DEFAULT}, batches of 32 texts"),
        rounds,
        settings,
        names[0],
    )


def measure(arguments: Arguments) -> BenchmarkResult:
    """Builds two stores and runs all cases."""
    sizes = _Sizes.of(arguments)
    data = read_texts(arguments, max_words=MAX_WORDS)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        half = stack.enter_context(_build(folder / "half", data, sizes, None))
        plain = stack.enter_context(_build(folder / "plain", data, sizes, 0))
        _add_tenants(half, plain, data)
        bench = _Bench(data, sizes, half, plain, folder, stack)
        cases, quantities = _mixed_case(bench)
        cases.append(_wide_case(bench))
        cases.append(_alike_case(bench))
        settings: dict[str, JsonValue] = {
            "model": PACKAGE,
            "text": data.source,
            "layers": half.general.num_layers,
            "plot_layers": half.general.plot_layers,
            "window": half.general.window,
            "rank": RANK,
            "max_tokens": MAX_TOKENS,
            "repetitions": sizes.repetitions,
            "table_bytes": {name: half.domains[name].bytes for name in half.domains},
            "corpus_tokens": {name: half.domains[name].corpus_tokens for name in half.domains},
        }
    return BenchmarkResult.of(
        arguments,
        "mixed",
        QUESTION,
        settings=settings,
        notes=NOTES,
        cases=cases,
        quantities=quantities,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments("mixed", QUESTION, argv)
    result = measure(arguments)
    result.write(arguments.out)
    for line in result.ratio_lines():
        print(line)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
