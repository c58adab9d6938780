"""What does training many tenants of one domain together save?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.arguments import Arguments, read_arguments
from benchmarks.peers.peft_training import PeftTrainer
from benchmarks.result import BenchmarkResult, Case, Ratio, System, Table
from hmi_engine.construct.bootstrap import bootstrap_intervals
from hmi_engine.construct.joint_training import TenantExamples
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.demo.base_model import packaged_distillation, packaged_model
from hmi_engine.demo.tasks import PARENT_DOMAIN, DemoData, documentation_data, folder_data
from hmi_engine.demo.timing import interleave
from hmi_engine.errors import HmiError
from hmi_engine.knowledge.examples import Example
from hmi_engine.store import Store

__all__ = ["main", "measure"]

QUESTION = "What does training many tenants of one domain together save?"
NOTES = (
    "A job is all tenants from labelled texts to a trained and tested adapter and head: tokens, training "
    "with the validation split judged after each epoch, the best epoch kept, the test texts predicted. "
    "Stores and tables are made before.",
    "Every system has the same texts, split sizes, epochs, batch size, longest text and schedule; nothing is "
    "stopped early. Tenants are disjoint parts of the tasks' training texts; a task's tenants share its test "
    "texts.",
    "PEFT trains one tenant after the other: transformers' model, LoRA of query and value, pooler and "
    "classifier, a data loader that pads to the longest text of the batch; on all layers, and on the upper "
    "layers alone, below which no gradient flows. HMI's LoRA is at the same places of the same upper layers. "
    "Of epochs with equal accuracy on the validation split every system keeps that of the least loss.",
    "Looked up: the lower half of the layers comes from the domain's table, with back-off; the base is the "
    "distilled form that HMI brings along. Computed: a store of the plain base without tables, whose lower "
    "half is computed once for each text.",
    "Accuracy is the mean over tenants; its 95 % interval is bootstrapped over tenants.",
)
BATCH_SIZE = 32


@dataclass(frozen=True)
class _Sizes:
    tenants: int
    train: int
    test: int
    epochs: int
    repetitions: int


FULL = _Sizes(tenants=32, train=96, test=100, epochs=4, repetitions=1)
QUICK = _Sizes(tenants=4, train=40, test=20, epochs=1, repetitions=1)


@dataclass(frozen=True)
class _Tenant:
    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]


Job = Callable[[], list[float]]
"""Trains and tests all tenants; returns the accuracy of each."""


def _read(arguments: Arguments) -> DemoData:
    if arguments.data is not None:
        return folder_data(arguments.data, max_train=10**9, max_test=10**9)[0]
    if arguments.quick:
        return documentation_data(num_topics=1, background_words=0)
    return documentation_data(background_words=0, max_train=10**9)


def _tenants(data: DemoData, sizes: _Sizes) -> list[_Tenant]:
    """Parts of the tasks in turn, until there are enough; a part has every label twice at least."""
    parts: list[list[_Tenant]] = []
    for task in data.tasks:
        starts = range(0, len(task.train) - sizes.train + 1, sizes.train)
        cut = [task.train[start : start + sizes.train] for start in starts]
        tenants = [
            _Tenant(f"{task.name}-{number}", part, _known(task.test, part)[: sizes.test])
            for number, part in enumerate(cut)
            if _is_learnable(part)
        ]
        parts.append(tenants)
    in_turn = [own[place] for place in range(max(map(len, parts))) for own in parts if place < len(own)]
    if len(in_turn) < sizes.tenants:
        raise ValueError(f"the texts are enough for {len(in_turn)} tenants, not for {sizes.tenants}")
    return in_turn[: sizes.tenants]


def _is_learnable(examples: Sequence[Example]) -> bool:
    labels = [example.label for example in examples]
    return len(set(labels)) > 1 and min(map(labels.count, set(labels))) > 1


def _known(examples: Sequence[Example], train: Sequence[Example]) -> tuple[Example, ...]:
    labels = {example.label for example in train}
    return tuple(example for example in examples if example.label in labels)


def _ours(store: Store, tenants: Sequence[_Tenant], settings: TrainingSettings, together: int) -> Job:
    given = [
        TenantExamples(tenant.name, tenant.train, test_examples=tenant.test, settings=settings)
        for tenant in tenants
    ]

    def run() -> list[float]:
        outcomes = store.train_tenants(given, domain=_domain(store), together=together, replace=True)
        return [_accuracy(outcome) for outcome in outcomes.values()]

    return run


def _one_by_one(store: Store, tenants: Sequence[_Tenant], settings: TrainingSettings) -> Job:
    def run() -> list[float]:
        return [
            _accuracy(
                store.train_tenant(
                    tenant.name,
                    tenant.train,
                    domain=_domain(store),
                    test_examples=tenant.test,
                    settings=settings,
                    replace=True,
                )
            )
            for tenant in tenants
        ]

    return run


def _accuracy(outcome: object) -> float:
    if isinstance(outcome, HmiError):
        raise outcome
    test = outcome.report.test  # type: ignore[attr-defined]
    return float(test.values["accuracy"])


def _peft(trainer: PeftTrainer, tenants: Sequence[_Tenant]) -> Job:
    return lambda: [float(np.mean(trainer.train(tenant.train, tenant.test))) for tenant in tenants]


def _domain(store: Store) -> str:
    return PARENT_DOMAIN if PARENT_DOMAIN in store.domains else next(iter(store.domains))


def _jobs(
    looked_up: Store, computed: Store, tenants: Sequence[_Tenant], sizes: _Sizes, model: Path
) -> dict[str, tuple[str, Job]]:
    """(description, job) by name."""
    recipe = {
        "max_epochs": sizes.epochs,
        "patience": sizes.epochs,
        "batch_size": BATCH_SIZE,
        "max_tokens": 64,
    }
    lora, bottleneck = (TrainingSettings(kind=kind, **recipe) for kind in ("lora", "bottleneck"))
    upper = tuple(looked_up.general.upper_layers)
    plain = lora.model_copy(update={"layers": upper})
    everyone = len(tenants)
    return {
        "HMI together, LoRA": (
            "LoRA on upper layers, lower half looked up, all tenants in one batch",
            _ours(looked_up, tenants, lora, everyone),
        ),
        "HMI together, bottleneck": (
            "bottlenecks (the default), lower half looked up, all tenants in one batch",
            _ours(looked_up, tenants, bottleneck, everyone),
        ),
        "HMI together, computed": (
            "LoRA on upper layers, lower half computed once for each text",
            _ours(computed, tenants, plain, everyone),
        ),
        "HMI one by one, LoRA": (
            "LoRA on upper layers, lower half looked up, one tenant after the other",
            _one_by_one(looked_up, tenants, lora),
        ),
        "PEFT, all layers": ("LoRA on all layers", _peft(PeftTrainer(model, None, lora), tenants)),
        "PEFT, upper layers": ("LoRA on upper layers", _peft(PeftTrainer(model, upper, lora), tenants)),
    }


def measure(arguments: Arguments) -> BenchmarkResult:
    """Trains all tenants in every way, in turn."""
    sizes = QUICK if arguments.quick else FULL
    data = _read(arguments)
    tenants, model = _tenants(data, sizes), packaged_model()
    accuracies: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        stores = [
            Store.create(Path(folder) / "looked-up", general=model, distilled=packaged_distillation()),
            Store.create(Path(folder) / "computed", general=model, plot_layers=0),
        ]
        try:
            stores[0].add_domain(PARENT_DOMAIN, iter(_corpus(data)))
            jobs = _jobs(*stores, tenants, sizes, model)

            def timed(name: str, job: Job) -> Callable[[int], None]:
                def run(_: int) -> None:
                    accuracies[name] = job()
                    print(f"{name}: mean accuracy {np.mean(accuracies[name]):.1%}", flush=True)

                return run

            seconds = interleave(
                {name: timed(name, job) for name, (_, job) in jobs.items()}, sizes.repetitions, warm_up=0
            )
        finally:
            for store in stores:
                store.close()
    return _result(arguments, sizes, data, jobs, seconds, accuracies)


def _corpus(data: DemoData) -> list[str]:
    """The text of all domains, each once."""
    return list(dict.fromkeys(text for domain in data.domains for text in domain.texts))


def _result(
    arguments: Arguments,
    sizes: _Sizes,
    data: DemoData,
    jobs: dict[str, tuple[str, Job]],
    seconds: dict[str, list[float]],
    accuracies: dict[str, list[float]],
) -> BenchmarkResult:
    systems = [
        System.of(name, description, seconds[name], [sizes.tenants] * len(seconds[name]), "tenants")
        for name, (description, _) in jobs.items()
    ]
    ours, others = systems[:3], systems[3:]
    ratios = tuple(Ratio.of(system, other) for system in ours for other in others)
    case = Case(name=f"{sizes.tenants} tenants", settings={}, systems=tuple(systems), ratios=ratios)
    return BenchmarkResult.of(
        arguments,
        "joint_training",
        QUESTION,
        settings={
            "tenants": sizes.tenants,
            "training texts": sizes.train,
            "test texts": sizes.test,
            "epochs": sizes.epochs,
            "batch size": BATCH_SIZE,
            "longest text": 64,
            "text": data.source,
        },
        notes=NOTES,
        cases=(case,),
        tables=(_accuracy_table(systems, accuracies),),
    )


def _accuracy_table(systems: Sequence[System], accuracies: dict[str, list[float]]) -> Table:
    rows = []
    for system in systems:
        values = np.asarray(accuracies[system.name])
        low, high = bootstrap_intervals(
            {"mean": lambda indices, own=values: own[indices].mean(axis=1)}, len(values)
        )["mean"]
        rows.append((system.name, float(values.mean()), low, high, float(np.median(system.seconds))))
    return Table(
        title="Accuracy on the test texts, and time",
        columns=("system", "accuracy", "low", "high", "seconds"),
        rows=tuple(rows),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments("joint_training", QUESTION, argv)
    result = measure(arguments)
    result.write(arguments.out)
    for line in result.ratio_lines():
        print(line)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
