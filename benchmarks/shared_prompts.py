"""What is gained where many tenants' prompts begin with the same instruction, and weights differ above it?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks.arguments import Arguments, read_arguments, read_texts
from benchmarks.generation import check_same_work, generate
from benchmarks.generation_model import base_model
from benchmarks.generation_peers import Prompts, write_adapters
from benchmarks.result import BenchmarkResult, Case, Quantity, Ratio, System
from hmi_engine.demo.timing import interleave
from hmi_engine.engine import Engine
from hmi_engine.store import Store

__all__ = ["main", "measure"]

NAME = "shared_prompts"
QUESTION = (
    "What is gained where many tenants' prompts begin with the same instruction, and their weights differ?"
)
DOMAIN = "documentation"
RANK = 16
SHARED, OWN = "beginnings shared", "each computes its own"
CACHE_MEMORY, WARM_UP = "192MiB", 3
"""So small that all of it has been written when the rounds that count begin: as after an hour's traffic."""

NOTES = (
    "A round: a first tenant's request, then one of each other tenant at once, {instruction} tokens of "
    "instruction that nobody has sent before and {question} of its own, answered by one token. So all of it "
    "is taking prompts in.",
    "Every tenant has a LoRA of rank {rank} from some layer on; a quarter of the layers is looked up. The "
    "layers between are the base's own, and are not computed again for an instruction that is known.",
    "Both engines gave the same tokens before anything was timed, and had written all of their caches.",
)


@dataclass(frozen=True)
class Plan:
    """Sizes of a run; layers are shares of the model's."""

    tenants: int
    instruction_tokens: int
    question_tokens: int
    repetitions: int
    first_layers: tuple[float, ...]


QUICK = Plan(4, 32, 4, 2, (0.5, 0.75))
FULL = Plan(32, 192, 16, 7, (0.5, 0.75))


def _rounds(plan: Plan, ids: Sequence[int], names: Sequence[str]) -> Callable[[int], Prompts]:
    """Prompts of the round of a number; the text is taken from one place after another."""
    starts = np.random.default_rng(0).permutation(len(ids) - plan.instruction_tokens)

    def prompts(number: int) -> Prompts:
        begin = int(starts[number])
        instruction = list(ids[begin : begin + plan.instruction_tokens])
        questions = [int(starts[-1 - number * len(names) - place]) for place in range(len(names))]
        return [
            (name, instruction + list(ids[at : at + plan.question_tokens]))
            for name, at in zip(names, questions, strict=True)
        ]

    return prompts


def _serve(engine: Engine, prompts: Prompts) -> list[list[int]]:
    return generate(engine, prompts[:1], 1) + generate(engine, prompts[1:], 1)


def _case(
    store: Store, plan: Plan, first_layer: int, prompts: Callable[[int], Prompts]
) -> tuple[Case, float]:
    """Both engines on the same rounds; and the share of the prompts' tokens that entered late."""
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                Engine(
                    store,
                    device="cpu",
                    record_traffic=False,
                    cache_memory=CACHE_MEMORY,
                    shared_prefix_memory=memory,
                )
            )
            for name, memory in ((SHARED, "64MiB"), (OWN, 0))
        }
        systems = {
            name: lambda number, engine=engine: _serve(engine, prompts(number))
            for name, engine in engines.items()
        }
        check_same_work({name: lambda asked, run=run: run(99) for name, run in systems.items()}, prompts(99))
        seconds = interleave(systems, plan.repetitions, warm_up=WARM_UP)
        counts = engines[SHARED].stats().generation or {}
    work = [plan.tenants * (plan.instruction_tokens + plan.question_tokens)] * plan.repetitions
    measured = [System.of(name, name, seconds[name], work, "tokens") for name in systems]
    general = store.general
    case = Case(
        name=f"adapters from layer {first_layer} of {general.num_layers} on",
        settings={"layers looked up": general.plot_layers, "rank": RANK},
        systems=tuple(measured),
        ratios=(Ratio.of(*measured),),
    )
    return case, counts["shared_tokens"] / counts["prompt_tokens"]


def _measure(
    plan: Plan, base: Path, folder: Path, share: float, corpus: Sequence[str], held_out: Sequence[str]
) -> tuple[Case, float]:
    """The case of tenants that adapt the layers above that share of them."""
    names = [f"tenant-{number}" for number in range(plan.tenants)]
    num_layers = AutoConfig.from_pretrained(base).num_hidden_layers
    first_layer = int(share * num_layers)
    write_adapters(base, folder / "adapters", names, rank=RANK, first_layer=first_layer)
    with Store.create(folder / "store", general=base, plot_layers=num_layers // 4) as store:
        store.add_domain(DOMAIN, corpus, plot_bytes="64MiB")
        for name in names:
            store.import_peft(folder / "adapters" / name, tenant=name, domain=DOMAIN)
        ids = [token for text in store.encoder.token_ids(held_out) for token in text]
        return _case(store, plan, first_layer, _rounds(plan, ids, names))


def measure(arguments: Arguments) -> BenchmarkResult:
    """Measures, and says with what and how."""
    plan = QUICK if arguments.quick else FULL
    data = read_texts(arguments, max_words=60)
    corpus = [text for domain in data.domains for text in domain.texts]
    held_out = [example.text for task in data.tasks for example in task.test]
    with tempfile.TemporaryDirectory() as folder:
        base = base_model(None, corpus, Path(folder) / "base", is_quick=arguments.quick)
        found = [
            _measure(plan, base, Path(folder) / str(share), share, corpus, held_out)
            for share in plan.first_layers
        ]
    return BenchmarkResult.of(
        arguments,
        NAME,
        QUESTION,
        settings={
            "text": data.source,
            "model": "random weights",
            "tenants": plan.tenants,
            "torch_threads": torch.get_num_threads(),
        },
        notes=tuple(
            note.format(instruction=plan.instruction_tokens, question=plan.question_tokens, rank=RANK)
            for note in NOTES
        ),
        cases=tuple(case for case, _ in found),
        quantities=tuple(
            Quantity(name=f"prompts' tokens that entered late, {case.name}", value=share, unit="share")
            for case, share in found
        ),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments(NAME, QUESTION, argv)
    result = measure(arguments)
    result.write(arguments.out)
    for case in result.cases:
        for system in case.systems:
            print(f"{case.name}, {system.name}: {system.rate.value:.0f} tokens/s")
        for ratio in case.ratios:
            print(f"{ratio.faster} over {ratio.baseline}: {ratio.times.value:.2f}")
    for quantity in result.quantities:
        print(quantity)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
