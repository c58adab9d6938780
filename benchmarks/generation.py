"""How many tokens a second do decoders of many tenants generate, beside transformers with PEFT?"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.arguments import Arguments, read_arguments, read_texts
from benchmarks.generation_load import TenantLoad, measure_tenants
from benchmarks.generation_model import base_model
from benchmarks.generation_peers import (
    Prompts,
    generate_mixed,
    generate_one_at_a_time,
    load_peft,
    write_adapters,
)
from benchmarks.result import BenchmarkResult, Case, Curve, Quantity, Ratio, System, Table
from hmi_engine.demo.timing import interleave
from hmi_engine.engine import Engine
from hmi_engine.errors import HmiError
from hmi_engine.generation.cache import KeyValueCache
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.request import Request
from hmi_engine.sampling import Sampling
from hmi_engine.store import Store

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "DOMAIN",
    "OURS",
    "PLAIN",
    "RANK",
    "Bench",
    "Plan",
    "all_systems",
    "check_same_work",
    "main",
    "measure",
    "measure_concurrency",
    "measure_peers",
]

NAME = "generation"
QUESTION = "How many tokens a second do decoders of many tenants generate, beside transformers with PEFT?"
DOMAIN = "documentation"
RANK = 16
OURS, PLAIN = "HMI, K = N/2", "HMI, K = 0"
ONE, MIXED = "PEFT one at a time", "PEFT mixed batch"
NOTES = (
    "Greedy, {new} tokens for each request, whatever the end token; prompts are held-out text of {low} to "
    "{high} tokens. Every tenant has a LoRA of rank {rank} on queries, keys and values of the upper half of "
    "the layers, made by PEFT and imported.",
    "All systems get the same prompts, and all cores. The K = 0 engine and both ways of PEFT gave the same "
    "tokens before anything was timed; K = N/2 computes another function, whose lower layers are looked up.",
    "PEFT's own ways: `generate` for one tenant after another, and one padded batch with `adapter_names`.",
    "Tenants as S-LoRA's evaluation has them (Sheng et al., MLSys 2024), scaled to this machine: Poisson "
    "arrivals, popularity by a power law, lengths of prompts and texts uniform from 8 to 64 tokens.",
)


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    tenants: int
    new_tokens: int
    prompt_tokens: tuple[int, int]
    repetitions: int
    concurrencies: tuple[int, ...]
    many_tenants: tuple[int, ...]
    load_seconds: float


QUICK = Plan(4, 4, (4, 8), 2, (1, 4), (2, 4), 1.0)
FULL = Plan(32, 64, (16, 48), 4, (1, 2, 4, 8, 16, 32, 64, 128), (5, 100, 1_000, 2_000), 12.0)


@dataclass(frozen=True)
class Bench:
    """What is measured with."""

    plan: Plan
    base: Path
    adapters: Path
    names: tuple[str, ...]
    prompts: list[list[int]]
    corpus: list[str]

    def store(self, folder: Path, plot_layers: int | None) -> Store:
        """A store of the tenants."""
        store = Store.create(folder, general=self.base, plot_layers=plot_layers)
        store.add_domain(DOMAIN, self.corpus, plot_bytes="64MiB" if store.general.plot_layers else 0)
        for name in self.names:
            store.import_peft(self.adapters / name, tenant=name, domain=DOMAIN)
        return store

    def round(self, number: int, count: int) -> Prompts:
        """Prompts of a repetition, of all tenants in turn; other ones in each."""
        first = number * count
        return [
            (self.names[i % len(self.names)], self.prompts[(first + i) % len(self.prompts)])
            for i in range(count)
        ]


def generate(engine: Engine, prompts: Prompts, count: int) -> list[list[int]]:
    """By HMI; raises the first error."""
    sampling = Sampling(max_tokens=count, ignore_end=True)
    responses = engine.run([Request(name, input_ids=ids, sampling=sampling) for name, ids in prompts])
    for response in responses:
        if response.error is not None:
            raise response.error
    return [list(response.token_ids) for response in responses]


Generate = Callable[[Prompts], list[list[int]]]


def all_systems(engines: Mapping[str, Engine], model: PeftModel, count: int) -> dict[str, Generate]:
    """By name what generates ``count`` tokens; ``model`` holds all tenants' adapters."""
    systems: dict[str, Generate] = {
        name: lambda prompts, engine=engine: generate(engine, prompts, count)
        for name, engine in engines.items()
    }
    systems[ONE] = lambda prompts: generate_one_at_a_time(model, prompts, count)
    systems[MIXED] = lambda prompts: generate_mixed(model, prompts, count)
    return systems


def check_same_work(systems: Mapping[str, Generate], prompts: Prompts) -> None:
    """Raises HmiError unless all give the same tokens, but for a few that rounding decides."""
    texts = {name: run(prompts) for name, run in systems.items()}
    first = next(iter(texts))
    for name, found in texts.items():
        equal = np.mean([mine == theirs for mine, theirs in zip(texts[first], found, strict=True)])
        if equal < 0.9:
            raise HmiError(f"{first} and {name} give the same text for {equal:.0%} of the prompts only")


def measure_peers(bench: Bench, systems: Mapping[str, Generate]) -> Case:
    """All systems on one batch of a request of each tenant."""
    count = bench.plan.new_tokens
    timed = {
        name: lambda number, run=run: run(bench.round(number, len(bench.names)))
        for name, run in systems.items()
    }
    seconds = interleave(timed, bench.plan.repetitions, warm_up=1)
    work = [len(bench.names) * count] * bench.plan.repetitions
    descriptions = {
        OURS: "engine, back-off, half of the layers looked up",
        PLAIN: "engine, all layers computed",
        ONE: "transformers.generate, set_adapter for each tenant",
        MIXED: "transformers.generate, adapter_names, left-padded",
    }
    measured = {name: System.of(name, descriptions[name], seconds[name], work, "tokens") for name in systems}
    ratios = [Ratio.of(measured[ours], measured[theirs]) for ours in (OURS, PLAIN) for theirs in (ONE, MIXED)]
    return Case(
        name=f"{len(bench.names)} requests of {len(bench.names)} tenants",
        settings={"new_tokens": count, "rank": RANK},
        systems=tuple(measured.values()),
        ratios=tuple(ratios),
    )


def measure_concurrency(bench: Bench, engines: dict[str, Engine]) -> list[Curve]:
    """Throughput and time for each output token against how many are served at a time."""
    plan = bench.plan
    throughput: dict[str, list[float]] = {name: [] for name in engines}
    latency: dict[str, list[float]] = {name: [] for name in engines}
    for concurrency in plan.concurrencies:
        timed = {
            name: lambda number, engine=engine, size=concurrency: generate(
                engine, bench.round(number, size), plan.new_tokens
            )
            for name, engine in engines.items()
        }
        seconds = interleave(timed, max(2, plan.repetitions - 2), warm_up=1)
        for name in engines:
            taken = float(np.median(seconds[name]))
            throughput[name].append(concurrency * plan.new_tokens / taken)
            latency[name].append(1e3 * taken / plan.new_tokens)
    x = tuple(map(float, plan.concurrencies))
    return [
        Curve(
            figure=figure,
            name=name,
            x_label="requests at a time",
            y_label=label,
            x=x,
            y=tuple(values[name]),
            y_unit="number",
        )
        for figure, label, values in (
            ("throughput", "tokens a second", throughput),
            ("time", "milliseconds for an output token", latency),
        )
        for name in engines
    ]


def matrix_product_share(engine: Engine, bench: Bench) -> float:
    """Of a decode step of one request of each tenant, the share of the products with shared weights."""
    prompts = bench.round(7, len(bench.names))
    generate(engine, prompts, 2)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()
        generate(engine, prompts, bench.plan.new_tokens)
        taken = time.perf_counter() - began
    products = sum(
        event.self_cpu_time_total
        for event in profiled.key_averages()
        if "linear" in event.key or event.key in ("aten::mm", "aten::addmm")
    )
    return 1e-6 * products / taken


@dataclass(frozen=True)
class _Found:
    """All that was measured, of models so large."""

    general: GeneralInfo
    case: Case
    curves: list[Curve]
    product_share: float
    loads: list[TenantLoad]
    cache_bytes: dict[str, int]
    text_source: str


def _run(arguments: Arguments, model: Path | None, plan: Plan) -> _Found:
    """Builds the stores, and measures."""
    data = read_texts(arguments, max_words=60)
    corpus = [text for domain in data.domains for text in domain.texts]
    held_out = [example.text for task in data.tasks for example in task.test]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        base = base_model(model, corpus, folder / "base", is_quick=arguments.quick)
        tenants = tuple(f"tenant-{number}" for number in range(plan.tenants))
        plain = stack.enter_context(Store.create(folder / "sizes", general=base, plot_layers=0))
        half = plain.general.num_layers // 2
        write_adapters(base, folder / "adapters", tenants, rank=RANK, first_layer=half)
        prompts = _prompts(plain, held_out, plan.prompt_tokens)
        bench = Bench(plan, base, folder / "adapters", tenants, prompts, corpus)
        stores = {
            OURS: stack.enter_context(bench.store(folder / "half", half)),
            PLAIN: stack.enter_context(bench.store(folder / "none", 0)),
        }
        engines = {
            system: stack.enter_context(Engine(store, record_traffic=False, prefix_cache="off"))
            for system, store in stores.items()
        }
        peft = load_peft(bench.base, bench.adapters, bench.names)
        systems = all_systems(engines, peft, plan.new_tokens)
        check_same_work(
            {name: systems[name] for name in (PLAIN, ONE, MIXED)}, bench.round(99, len(bench.names))
        )
        return _Found(
            general=stores[OURS].general,
            case=measure_peers(bench, systems),
            curves=measure_concurrency(bench, engines),
            product_share=matrix_product_share(engines[OURS], bench),
            loads=measure_tenants(
                stores[OURS], DOMAIN, prompts, plan.many_tenants, rank=RANK, seconds=plan.load_seconds
            ),
            cache_bytes={
                system: KeyValueCache.bytes_per_token(store.general) for system, store in stores.items()
            },
            text_source=data.source,
        )


def measure(arguments: Arguments, model: Path | None) -> BenchmarkResult:
    """Measures, and says with what and how."""
    plan = QUICK if arguments.quick else FULL
    found = _run(arguments, model, plan)
    return BenchmarkResult.of(
        arguments,
        NAME,
        QUESTION,
        settings={
            "text": found.text_source,
            "model": "random weights" if model is None else "trained by benchmarks.small_gpt2",
            "layers": found.general.num_layers,
            "hidden_size": found.general.hidden_size,
            "vocabulary": found.general.vocab_size,
            "tenants": plan.tenants,
            "torch_threads": torch.get_num_threads(),
        },
        notes=tuple(
            note.format(new=plan.new_tokens, low=plan.prompt_tokens[0], high=plan.prompt_tokens[1], rank=RANK)
            for note in NOTES
        ),
        cases=(found.case,),
        quantities=_quantities(found, plan),
        tables=(_load_table(found.loads),),
        curves=tuple(found.curves),
    )


def _quantities(found: _Found, plan: Plan) -> tuple[Quantity, ...]:
    most, fewest = found.loads[-1], found.loads[0]
    return (
        Quantity(name="keys and values of a token, K = N/2", value=found.cache_bytes[OURS], unit="bytes"),
        Quantity(name="keys and values of a token, K = 0", value=found.cache_bytes[PLAIN], unit="bytes"),
        Quantity(
            name=f"share of a decode step of {plan.tenants} requests in products with shared weights",
            value=found.product_share,
            unit="share",
        ),
        Quantity(
            name=f"throughput with {most.tenants} tenants over that with {fewest.tenants}",
            value=most.tokens_per_second / fewest.tokens_per_second,
            unit="share",
        ),
    )


def _prompts(store: Store, texts: Sequence[str], bounds: tuple[int, int]) -> list[list[int]]:
    """Beginnings of texts, of lengths drawn evenly."""
    generator = np.random.default_rng(0)
    prompts = []
    for ids in store.encoder.token_ids(list(texts)):
        length = int(generator.integers(bounds[0], bounds[1] + 1))
        if len(ids) >= length:
            prompts.append(ids[:length])
    return prompts


def _load_table(loads: Sequence[TenantLoad]) -> Table:
    rows = tuple(
        (
            f"{load.tenants:,} tenants",
            load.offered_per_second,
            load.tokens_per_second,
            1e3 * load.first_token_p50,
            1e3 * load.per_token_p50,
        )
        for load in loads
    )
    return Table(
        title="Poisson arrivals at twice the capacity, popularity by a power law",
        columns=(
            "tenants",
            "asked for, tokens/s",
            "computed, tokens/s",
            "first token p50, ms",
            "later token p50, ms",
        ),
        rows=rows,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result; ``--model`` names a folder of benchmarks.small_gpt2's making."""
    arguments, model = read_arguments_with_model(argv)
    result = measure(arguments, model)
    result.write(arguments.out)
    for case in result.cases:
        for system in case.systems:
            print(f"{system.name}: {system.rate.value:.0f} tokens/s")
        for ratio in case.ratios:
            print(f"{ratio.faster} over {ratio.baseline}: {ratio.times.value:.2f}")
    for quantity in result.quantities:
        print(quantity)
    print(f"wrote {arguments.out}")


def read_arguments_with_model(argv: Sequence[str] | None) -> tuple[Arguments, Path | None]:
    """The common options, and ``--model``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", type=Path)
    own, others = parser.parse_known_args(argv)
    arguments = read_arguments(NAME, QUESTION, others)
    if own.model is not None:
        arguments = replace(arguments, command=f"{arguments.command} --model {own.model}")
    return arguments, own.model


if __name__ == "__main__":
    main()
