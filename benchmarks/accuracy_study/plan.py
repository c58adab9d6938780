"""Which runs the accuracy study consists of, in which order, and how long each is expected to take."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from statistics import mean, median

from benchmarks.accuracy_study.methods import PLAIN, SHIPPED, FullFineTuning, Hierarchical, Method
from benchmarks.accuracy_study.records import RunRecords
from benchmarks.accuracy_study.sets import StudySet

__all__ = [
    "BATCH_SIZE",
    "MAX_TOKENS",
    "Plan",
    "Run",
    "base_identity",
    "expected_seconds",
    "num_epochs",
    "run_name",
    "taught_epochs",
]

BATCH_SIZE = 32
MAX_TOKENS = 64
NUM_LAYERS = 6

_TARGET_STEPS = 550
_TAUGHT_STEPS = 1500
_MIN_EPOCHS, _MAX_EPOCHS = 3, 10

_FULL_STEP_SECONDS, _ADAPTER_STEP_SECONDS = 1.5, 0.9
"""Of a step of 32 sequences of 64 tokens through six layers on one busy core, before any run has told."""


def num_epochs(labelled: StudySet, method: Method) -> int:
    """Epochs of a method on one set: about 550 steps, at least 3 and at most 10 epochs, or ``times`` that."""
    steps = -(-len(labelled.train) // BATCH_SIZE)
    times = method.times if isinstance(method, FullFineTuning) else 1
    return times * max(_MIN_EPOCHS, min(_MAX_EPOCHS, round(_TARGET_STEPS / steps)))


def taught_epochs(labelled: StudySet, num_unlabelled: int) -> int:
    """Epochs over a set and texts that a teacher labels: about 1,500 steps of twice and more the text."""
    steps = -(-(len(labelled.train) + num_unlabelled) // BATCH_SIZE)
    return max(_MIN_EPOCHS, min(_MAX_EPOCHS, round(_TAUGHT_STEPS / steps)))


@lru_cache
def base_identity(folder: Path) -> str:
    """Digest of a model's weights: a base that was distilled anew is another one."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """One training: a method with one learning rate on one set with one seed."""

    labelled: StudySet
    method: Method
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its file, without the suffix."""
        return run_name(self.labelled, self.method, self.learning_rate, self.seed)


def run_name(labelled: StudySet, method: Method, learning_rate: float, seed: int) -> str:
    """Name of a run's file, without the suffix."""
    return f"{labelled.name}.{method.slug}-lr{learning_rate:g}.seed{seed}"


@dataclass(frozen=True)
class Plan:
    """All runs, and what of them can be done now.

    Seed 0 tries every candidate of a method's learning rate; the other seeds take the one with the best
    development score, so they wait for seed 0. Where others than that one have been measured with every seed
    too, the best of these by the mean of their development scores is taken.

    Attributes:
        sets: the labelled sets.
        methods: in the order of their value.
        seeds: 0 and the following.
        distilled: folder of distilled bases by name; None where there are none.
        shipped: folders of the distilled bases that the project brings along, by K; empty before they are
            made.
        only: patterns of names of runs (``scierc.full-*``), of which any may match; empty for all.
    """

    sets: Sequence[StudySet]
    methods: Sequence[Method]
    seeds: Sequence[int]
    distilled: Path | None
    only: Sequence[str] = ()
    shipped: Mapping[int, Path] = field(default_factory=dict)

    def runs(self, records: RunRecords) -> list[Run]:
        """Every run whose learning rate is known, first the ones that matter most: seed 0 of all sets."""
        runs = [*self._first_seed(records), *self._other_seeds(records)]
        return [run for run in runs if self._is_wanted(run.name)]

    def _first_seed(self, records: RunRecords) -> Iterator[Run]:
        for method in self.methods:
            further = self.chosen_rate
            if _in_the_studys_steps(method) == method:
                further = self._larger_rate
                for learning_rate in method.candidates:
                    yield from (Run(labelled, method, learning_rate, self.seeds[0]) for labelled in self.sets)
            for labelled in self.sets:
                rate = further(labelled, method, records)
                if rate is not None:
                    yield Run(labelled, method, rate, self.seeds[0])

    def _other_seeds(self, records: RunRecords) -> Iterator[Run]:
        for method in self.methods:
            for labelled in self.sets:
                chosen = self.chosen_rate(labelled, method, records)
                if chosen is not None:
                    yield from (Run(labelled, method, chosen, seed) for seed in self.seeds[1:])

    def undecided(self, records: RunRecords) -> list[Run]:
        """The other seeds' runs whose learning rate is not chosen yet, as if it were the first candidate."""
        return [
            Run(labelled, method, method.candidates[0], seed)
            for method in self.methods
            for labelled in self.sets
            if self.chosen_rate(labelled, method, records) is None
            for seed in self.seeds[1:]
        ]

    def chosen_rate(self, labelled: StudySet, method: Method, records: RunRecords) -> float | None:
        """The learning rate with the best development scores; None while one has to be measured."""
        method = _in_the_studys_steps(method)
        larger = self._larger_rate(labelled, method, records)
        rates = method.candidates if larger is None else (larger, *method.candidates)
        return self._best_rate(labelled, method, rates, records)

    def _larger_rate(self, labelled: StudySet, method: Method, records: RunRecords) -> float | None:
        """What lies beyond the candidates, where they end with the best."""
        if not isinstance(method, FullFineTuning) or len(method.candidates) == 1:
            return None
        best = self._best_rate(labelled, method, method.candidates, records)
        return method.larger if best == method.candidates[0] else None

    def _best_rate(
        self, labelled: StudySet, method: Method, rates: Sequence[float], records: RunRecords
    ) -> float | None:
        """The only rate, or the best one; None while one has to be measured."""
        if len(rates) == 1:
            return rates[0]
        scores = {rate: self._development_scores(labelled, method, rate, records) for rate in rates}
        if not all(self.seeds[0] in by_seed for by_seed in scores.values()):
            return None
        best = max(scores, key=lambda rate: scores[rate][self.seeds[0]])
        if len(scores[best]) < len(self.seeds):
            return best
        complete = [rate for rate in rates if len(scores[rate]) == len(self.seeds)]
        return max(complete, key=lambda rate: mean(scores[rate].values()))

    def _development_scores(
        self, labelled: StudySet, method: Method, rate: float, records: RunRecords
    ) -> dict[int, float]:
        """By seed, of the finished runs of one learning rate."""
        names = {seed: run_name(labelled, method, rate, seed) for seed in self.seeds}
        return {seed: records[name].dev for seed, name in names.items() if name in records}

    def finished(self, labelled: StudySet, method: Method, records: RunRecords) -> list[str]:
        """Names of the finished runs of the chosen learning rate, by seed."""
        chosen = self.chosen_rate(labelled, method, records)
        if chosen is None:
            return []
        names = [run_name(labelled, method, chosen, seed) for seed in self.seeds]
        return [name for name in names if name in records]

    def base_folder(self, method: Method) -> Path | None:
        """Folder of the distilled base that a method needs; None for the base as it is."""
        if not isinstance(method, Hierarchical) or method.base == PLAIN:
            return None
        if method.base == SHIPPED and method.plot_layers in self.shipped:
            return self.shipped[method.plot_layers]
        return (self.distilled or Path()) / method.base_slug

    def teacher_rate(self, labelled: StudySet, records: RunRecords) -> float | None:
        """The learning rate that full fine-tuning of a set was found to be best with; None before."""
        for method in self.methods:
            if isinstance(method, FullFineTuning) and method.is_baseline:
                return self.chosen_rate(labelled, method, records)
        return None

    def is_possible(self, run: Run, records: RunRecords) -> bool:
        """Whether the base that a run needs is there, and known how its teacher is made."""
        is_taught = isinstance(run.method, Hierarchical) and run.method.teacher
        if is_taught and self.teacher_rate(run.labelled, records) is None:
            return False
        folder = self.base_folder(run.method)
        is_shipped = isinstance(run.method, Hierarchical) and run.method.base == SHIPPED
        return folder is None or is_shipped or (self.distilled is not None and folder.is_dir())

    def next_run(self, records: RunRecords) -> Run | None:
        """The first run that is possible and not done."""
        runs = (
            run
            for run in self.runs(records)
            if not self.is_done(run, records) and self.is_possible(run, records)
        )
        return next(runs, None)

    def is_done(self, run: Run, records: RunRecords) -> bool:
        """Whether a run is finished, with the very base that is there now if it needs a distilled one."""
        if run.name not in records:
            return False
        folder = self.base_folder(run.method)
        return folder is None or not folder.is_dir() or records[run.name].base == base_identity(folder)

    def _is_wanted(self, name: str) -> bool:
        return not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)


def _in_the_studys_steps(method: Method) -> Method:
    return replace(method, times=1) if isinstance(method, FullFineTuning) else method


def expected_seconds(run: Run, records: RunRecords) -> float:
    """The median of what the same method or one of its kind took on the set, or else an estimate."""
    known = [
        record.cpu_seconds for record in records.values() if _costs_alike(record.set_name, record.method, run)
    ]
    return median(known) if known else _estimated_seconds(run)


def _costs_alike(set_name: str, slug: str, run: Run) -> bool:
    """Methods cost alike if they train the same layers of the same set; the first part of a slug says so.

    With a teacher there is more text and a model to be asked about it.
    """
    return (
        set_name == run.labelled.name
        and slug.split("-", maxsplit=1)[0] == run.method.slug.split("-", maxsplit=1)[0]
        and slug.endswith("-taught") == run.method.slug.endswith("-taught")
        and ("-times" in slug) == ("-times" in run.method.slug)
    )


def _estimated_seconds(run: Run) -> float:
    steps = num_epochs(run.labelled, run.method) * -(-len(run.labelled.train) // BATCH_SIZE)
    if isinstance(run.method, FullFineTuning):
        return steps * _FULL_STEP_SECONDS
    plot_layers = run.method.plot_layers if isinstance(run.method, Hierarchical) else 0
    return steps * _ADAPTER_STEP_SECONDS * (1 - plot_layers / NUM_LAYERS)
