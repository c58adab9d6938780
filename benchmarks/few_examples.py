"""How should a tenant be trained that has few examples?

Tenants of every set are trained on random parts of its training texts, in ways that differ in one thing, and
tested on the same test texts.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from benchmarks.accuracy_study.sets import ClassificationSet, StudySet, study_sets
from benchmarks.arguments import Arguments, read_arguments
from benchmarks.kept_steps import KeptSteps
from benchmarks.result import BenchmarkResult, Table
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.demo.base_model import packaged_distillation, packaged_model
from hmi_engine.knowledge.examples import Example, TaggedExample
from hmi_engine.store import Store

__all__ = ["main", "measure"]

NAME = "few_examples"
QUESTION = "How should a tenant be trained that has few examples?"
NOTES = (
    "Figures are means over draws: other training texts and another seed each. All ways of a draw have the "
    "same texts, of which 15 % are held out to choose the epoch, and the same test texts.",
    "Classification is judged by accuracy, tags by entity F1. Labels that a draw has once only are left out, "
    "also from its test texts. The majority is the accuracy of always saying the commonest label.",
    "Base: the distilled MiniLM that ships (K = 3), back-off, a table of the set's training texts, 64 tokens "
    "at most, adapters of rank 16. Training ends before the steps that are planned after --patience epochs "
    "without gain.",
    "Seconds: processor time of one training on one thread, from the texts to the tested tenant.",
)
MAX_TEST = 400

Item = Example | TaggedExample


@dataclass(frozen=True)
class _Sizes:
    examples: tuple[int, ...]
    draws: int


FULL = _Sizes(examples=(100, 400, 1000), draws=2)
QUICK = _Sizes(examples=(40,), draws=1)


@dataclass(frozen=True)
class Way:
    """How a tenant is trained: other settings than the usual ones."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


def _ten_epochs(batch_size: int) -> dict[str, Any]:
    return {"batch_size": batch_size, "max_epochs": 10, "patience": 2}


WAYS = (
    Way("10 epochs, batches of 32", _ten_epochs(32)),
    Way("10 epochs, batches of 8", _ten_epochs(8)),
    Way("as usual"),
    Way("as usual, mean over tokens", {"pooling": "mean"}),
    Way("LoRA, 10 epochs, batches of 32", {"kind": "lora"} | _ten_epochs(32)),
    Way("LoRA, as usual", {"kind": "lora"}),
)


@dataclass(frozen=True)
class Outcome:
    """A trained tenant.

    Attributes:
        value: the task's figure on the test texts.
        majority: accuracy of the commonest label; None of tags.
        planned_steps: of the training, had it not ended early.
        steps: that it took.
        seconds: processor time.
    """

    value: float
    majority: float | None
    planned_steps: int
    steps: int
    seconds: float


def _draw(labelled: StudySet, size: int, number: int) -> list[Item]:
    """Random training texts, without those whose label none of the others has."""
    pool: Sequence[Item] = labelled.train
    drawn = random.Random(number).sample(pool, min(size, len(pool)))
    counts = Counter(item.label for item in drawn if isinstance(item, Example))
    return [item for item in drawn if not isinstance(item, Example) or counts[item.label] > 1]


def _test(labelled: StudySet, drawn: Iterable[Item]) -> list[Item]:
    """Test texts with labels or tags that the draw has."""
    known = {label for item in drawn for label in _labels(item)}
    test: list[Item] = [item for item in labelled.test if known.issuperset(_labels(item))]
    return random.Random(0).sample(test, min(MAX_TEST, len(test)))


def _labels(item: Item) -> tuple[str, ...]:
    return (item.label,) if isinstance(item, Example) else tuple(item.tags)


def _train(store: Store, labelled: StudySet, size: int, number: int, way: Way) -> Outcome:
    drawn = _draw(labelled, size, number)
    is_classification = isinstance(labelled, ClassificationSet)
    settings = TrainingSettings(
        task="classification" if is_classification else "token_classification",
        max_tokens=64,
        seed=number,
        **way.fields,
    )
    started = time.process_time()
    report = store.train_tenant(
        "tenant",
        drawn,
        domain=labelled.name,
        test_examples=_test(labelled, drawn),
        settings=settings,
        replace=True,
    ).report
    seconds = time.process_time() - started
    used = report.settings
    assert report.test is not None and used.batch_size is not None and used.max_epochs is not None
    steps = math.ceil(report.num_training / used.batch_size)
    return Outcome(
        value=report.test.values[report.best_by],
        majority=report.test.values.get("majority_accuracy"),
        planned_steps=steps * used.max_epochs,
        steps=steps * len(report.history),
        seconds=seconds,
    )


Outcomes = dict[tuple[int, str, str], list[Outcome]]
"""By number of examples, way, and set."""


def _outcomes(store: Store, sets: Sequence[StudySet], sizes: _Sizes, kept: KeptSteps) -> Outcomes:
    found: Outcomes = {}
    for labelled in sets:
        store.add_domain(labelled.name, iter(labelled.training_texts()))
    for number, size, labelled in itertools.product(range(sizes.draws), sizes.examples, sets):
        for way in _ways(labelled):
            outcome = kept.take(
                f"{labelled.name}, {size}, {way.name}, {number}",
                Outcome,
                functools.partial(_train, store, labelled, size, number, way),
            )
            found.setdefault((size, way.name, labelled.name), []).append(outcome)
    return found


def _ways(labelled: StudySet) -> list[Way]:
    """Where every word has a tag there is nothing to pool."""
    is_pooled = isinstance(labelled, ClassificationSet)
    return [way for way in WAYS if is_pooled or "pooling" not in way.fields]


def _table(found: Outcomes, size: int, names: Sequence[str]) -> Table:
    """Figures of every way, and what it costs."""
    rows: list[tuple[str | float | None, ...]] = []
    for way in WAYS:
        given = [found.get((size, way.name, name), []) for name in names]
        everything = [outcome for own in given for outcome in own]
        rows.append(
            (
                way.name,
                *(_mean(outcome.value for outcome in own) for own in given),
                _mean(outcome.planned_steps for outcome in everything),
                _mean(outcome.steps for outcome in everything),
                _mean(outcome.seconds for outcome in everything),
            )
        )
    majorities = [
        [outcome.majority for outcome in found[size, WAYS[0].name, name] if outcome.majority is not None]
        for name in names
    ]
    rows.append(("majority", *map(_mean, majorities), None, None, None))
    return Table(
        title=f"{size} examples",
        columns=("way", *names, "steps planned", "steps taken", "seconds"),
        rows=tuple(rows),
    )


def _mean(values: Iterable[float]) -> float | None:
    given = list(values)
    return statistics.fmean(given) if given else None


def measure(arguments: Arguments, folder: Path) -> BenchmarkResult:
    """Trains in every way; what is done lies beside the result until all is."""
    sizes = QUICK if arguments.quick else FULL
    sets = study_sets(arguments.data, quick=arguments.quick)
    kept = KeptSteps(arguments.out, f"{arguments.data} {arguments.quick} {WAYS}")
    with Store.create(folder / "store", general=packaged_model(), distilled=packaged_distillation()) as store:
        found = _outcomes(store, sets, sizes, kept)
    kept.forget()
    names = [labelled.name for labelled in sets]
    settings: dict[str, JsonValue] = {"draws": sizes.draws, "most test texts": MAX_TEST}
    return BenchmarkResult.of(
        arguments,
        NAME,
        QUESTION,
        settings=settings,
        notes=NOTES,
        tables=[_table(found, size, names) for size in sizes.examples],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments(NAME, QUESTION, argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    result.write(arguments.out)
    print("\n".join(result.table_lines()))


if __name__ == "__main__":
    main()
