"""What does looking the lower half of the layers up cost in accuracy?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

from benchmarks.arguments import Arguments, read_arguments
from benchmarks.result import BenchmarkResult, Quantity
from hmi_engine.construct.training import TrainingSettings
from hmi_engine.demo.base_model import packaged_model
from hmi_engine.demo.environment import describe_machine, installed_versions
from hmi_engine.demo.tasks import DemoData, Task, documentation_data, folder_data
from hmi_engine.store import Store

__all__ = ["main"]

QUESTION = "What does looking the lower half of the layers up cost in accuracy?"
NOTES = (
    "Every variant trains bottleneck adapters and a head of its own by the same recipe, seeds and examples, "
    "and is scored on the same held-out texts through the layers that serve it. The mean is over seeds.",
    "K = 0 is the plain base model with adapters on all layers, as a server without tables runs it.",
    "K = N/2 looks the lower half up and has adapters on the upper half only; nothing is distilled.",
)


@dataclass(frozen=True)
class _Variant:
    name: str
    plot_layers: int | None
    miss: Literal["backoff", "exact"]


VARIANTS = (
    _Variant("K = 0", 0, "backoff"),
    _Variant("K = N/2, back-off", None, "backoff"),
    _Variant("K = N/2, exact", None, "exact"),
)


def _read(arguments: Arguments) -> DemoData:
    if arguments.data is not None:
        return folder_data(arguments.data, max_train=10**9, max_test=10**9)[0]
    if arguments.quick:
        return documentation_data(num_topics=1, background_words=0, max_train=200, max_test=100)
    return documentation_data()


def _accuracy(store: Store, task: Task, variant: _Variant, settings: TrainingSettings) -> float:
    trained = store.train_tenant(
        task.name,
        task.train,
        domain=task.domain,
        test_examples=task.test,
        settings=settings.model_copy(update={"miss": variant.miss}),
        replace=True,
    )
    if trained.report.test is None:
        raise ValueError(f"task {task.name} has no held-out texts")
    return trained.report.test.accuracy


def _score_all(
    store: Store, data: DemoData, variant: _Variant, seeds: Sequence[int], recipe: TrainingSettings
) -> dict[str, float]:
    """Mean accuracy over seeds by task."""
    scores = {}
    for task in data.tasks:
        settings = [recipe.model_copy(update={"seed": seed}) for seed in seeds]
        scores[task.name] = mean(_accuracy(store, task, variant, chosen) for chosen in settings)
        print(f"{task.name}, {variant.name}: {scores[task.name]:.1%}", flush=True)
    return scores


def measure(arguments: Arguments) -> BenchmarkResult:
    """Trains and scores every task in every variant."""
    data = _read(arguments)
    seeds = range(1 if arguments.quick else 2)
    recipe = TrainingSettings(max_epochs=2 if arguments.quick else 6, max_tokens=64)
    found: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        with (
            tempfile.TemporaryDirectory() as folder,
            Store.create(
                Path(folder) / "store", general=packaged_model(), plot_layers=variant.plot_layers
            ) as store,
        ):
            for domain in data.domains:
                store.add_domain(domain.name, iter(domain.texts), parent=domain.parent)
            found[variant.name] = _score_all(store, data, variant, seeds, recipe)
    return BenchmarkResult(
        name="accuracy",
        question=QUESTION,
        command=arguments.command,
        is_quick=arguments.quick,
        machine=describe_machine(),
        versions=installed_versions(),
        settings={"seeds": len(seeds), "text": data.source}
        | recipe.model_dump(mode="json", exclude_none=True),
        notes=NOTES,
        cases=(),
        quantities=tuple(_quantities(data.tasks, found)),
    )


def _quantities(tasks: Sequence[Task], found: dict[str, dict[str, float]]) -> list[Quantity]:
    quantities = []
    for task in tasks:
        quantities.append(_share(f"{task.name}: majority class", task.majority_share))
        quantities += [_share(f"{task.name}: {name}", scores[task.name]) for name, scores in found.items()]
    quantities += [
        _share(f"mean of all tasks: {name}", mean(scores.values())) for name, scores in found.items()
    ]
    return quantities


def _share(name: str, value: float) -> Quantity:
    return Quantity(name=name, value=value, unit="share")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments("accuracy", QUESTION, argv)
    measure(arguments).write(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
