"""Decoders on the GPU beside PEFT: the same tokens in float32 first, then times in bfloat16."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.generation import (
    OURS,
    PLAIN,
    RANK,
    Bench,
    Plan,
    all_systems,
    check_same_work,
    measure_concurrency,
    measure_peers,
)
from benchmarks.generation_peers import load_peft, write_adapters
from benchmarks.gpu.options import Options
from benchmarks.gpu.platform import choose_platform, current_commit, describe_device
from benchmarks.gpu.random_base import WORDS, number_texts, write_random_decoder
from benchmarks.result import BenchmarkResult
from hmi_engine.demo.environment import describe_machine, installed_versions
from hmi_engine.engine import Engine
from hmi_engine.store import Store

__all__ = ["measure"]

QUESTION = "How many tokens a second does a decoder generate on this GPU, beside transformers with PEFT?"
CORPUS_TEXTS = 20_000
NOTES = (
    "The base has GPT-2's shape and random weights; every tenant has a LoRA of rank 16 on queries, keys and "
    "values of the upper half. Prompts are numbers drawn by Zipf's law, none of them in the table's corpus.",
    "Greedy, a fixed number of tokens for each request. All systems: the same prompts and weights, in "
    "bfloat16.",
    "The K = 0 engine and both ways of PEFT gave the same tokens in float32 before anything was timed. "
    "K = N/2 computes another function.",
    "PEFT's own ways: `generate` for one tenant after another, and one padded batch with `adapter_names`.",
)
FULL = Plan(32, 64, (16, 48), 4, (1, 8, 32, 128), (), 0.0)
QUICK = Plan(32, 32, (16, 48), 2, (1, 32), (), 0.0)
DRY = Plan(2, 3, (2, 5), 1, (1, 2), (), 0.0)


def measure(options: Options, console: Console) -> BenchmarkResult:
    """Builds two stores, compares, then measures."""
    platform = choose_platform(is_dry=options.is_dry)
    plan = DRY if options.is_dry else QUICK if options.is_quick else FULL
    device = "cpu" if platform.is_dry else str(platform.device)
    with ExitStack() as stack:
        bench = _bench(Path(stack.enter_context(tempfile.TemporaryDirectory())), plan, options.is_dry)
        stores = {
            name: stack.enter_context(bench.store(bench.base.parent / f"store-{layers}", layers))
            for name, layers in ((OURS, None), (PLAIN, 0))
        }
        console.print("two stores built")
        peft = load_peft(bench.base, bench.adapters, bench.names, device=device)
        with _engine(stores[PLAIN], device, "float32") as engine:
            check_same_work(
                all_systems({PLAIN: engine}, peft, plan.new_tokens), bench.round(99, len(bench.names))
            )
        console.print("same tokens in float32")
        peft = peft.to(torch.float32 if platform.is_dry else torch.bfloat16)
        engines = {
            name: stack.enter_context(_engine(store, device, "auto")) for name, store in stores.items()
        }
        case = measure_peers(bench, all_systems(engines, peft, plan.new_tokens))
        curves = measure_concurrency(bench, engines)
        general = stores[OURS].general
    return BenchmarkResult(
        name="gpu generation",
        question=QUESTION,
        command=options.command,
        is_quick=options.is_quick or options.is_dry,
        machine=describe_machine(),
        versions=installed_versions(),
        settings={
            "commit": current_commit(),
            "device": None if (found := describe_device(platform)) is None else found.model_dump(),
            "layers": general.num_layers,
            "hidden_size": general.hidden_size,
            "plot_layers": general.plot_layers,
            "rank": RANK,
            **{key: value for key, value in asdict(plan).items() if isinstance(value, int)},
        },
        notes=NOTES,
        cases=(case,),
        curves=tuple(curves),
    )


def _bench(folder: Path, plan: Plan, is_tiny: bool) -> Bench:
    """The base, the tenants' adapters in PEFT's format, prompts and corpus."""
    base = write_random_decoder(folder / "base", is_tiny=is_tiny)
    names = tuple(f"tenant-{number}" for number in range(plan.tenants))
    with Store.create(folder / "sizes", general=base, plot_layers=0) as plain:
        half = plain.general.num_layers // 2
    write_adapters(base, folder / "adapters", names, rank=RANK, first_layer=half)
    low, high = plan.prompt_tokens
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(low, high + 1, (4 * max(plan.concurrencies),), generator=generator).tolist()
    weights = 1.0 / torch.arange(1, WORDS + 1)
    prompts = [
        # Ids of words come after those of the two special tokens.
        (2 + torch.multinomial(weights, length, replacement=True, generator=generator)).tolist()
        for length in lengths
    ]
    corpus = number_texts(100 if is_tiny else CORPUS_TEXTS, 40, seed=1)
    return Bench(plan, base, folder / "adapters", names, prompts, corpus)


@contextmanager
def _engine(store: Store, device: str, dtype: str) -> Iterator[Engine]:
    options = {"device_memory": "8GiB"} if device != "cpu" else {}
    with Engine(
        store, device=device, dtype=dtype, record_traffic=False, prefix_cache="off", **options
    ) as engine:
        yield engine
