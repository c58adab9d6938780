"""One file for each finished run of the accuracy study, so that a long study goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from benchmarks.accuracy_study.scores import Counts, class_counts, entity_counts
from benchmarks.accuracy_study.sets import ClassificationSet, StudySet
from hmi_engine.knowledge.atomic import atomic_write

__all__ = ["LabelOutcomes", "Outcome", "RunRecord", "RunRecords", "TagOutcomes", "Work"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LabelOutcomes(_Frozen):
    """The label number that was answered for each test text; labels are numbered in sorted order."""

    kind: Literal["labels"] = "labels"
    answers: tuple[int, ...]

    @classmethod
    def of(cls, labelled: StudySet, answers: Sequence[str]) -> LabelOutcomes:
        """From label names."""
        numbers = {label: number for number, label in enumerate(labelled.labels)}
        return cls(answers=tuple(numbers[answer] for answer in answers))

    def counts(self, labelled: StudySet) -> Counts:
        """Right, found and expected labels of each test text of the set that was answered."""
        assert isinstance(labelled, ClassificationSet)
        numbers = {label: number for number, label in enumerate(labelled.labels)}
        truth = [numbers[example.label] for example in labelled.test]
        return class_counts(truth, self.answers, len(numbers))


class TagOutcomes(_Frozen):
    """Entities of each test sentence: right, found and expected."""

    kind: Literal["tags"] = "tags"
    entities: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, truth: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> TagOutcomes:
        """From a tag for each word."""
        counts = entity_counts(truth, answers)
        return cls(entities=tuple((right, found, expected) for [[right, found, expected]] in counts.tolist()))

    def counts(self, labelled: StudySet) -> Counts:
        """The same as an array; ``labelled`` is not needed."""
        return np.array(self.entities, dtype=np.int64)[:, None, :]


@dataclass(frozen=True)
class Outcome:
    """What one training reached on the development split, by epoch, and what it answers on the test split."""

    dev_by_epoch: tuple[float, ...]
    outcomes: LabelOutcomes | TagOutcomes
    cpu_seconds: float
    work: Work | None = None


class Work(_Frozen):
    """What the domain layers cost on the test split.

    Attributes:
        tokens: of the test split, as served.
        plot_layers: K, of ``num_layers``.
        num_layers: N.
        hit_rate: share of windows that were found, in a table or as computed for an earlier text.
        computed_tokens: tokens that went through the K domain layers because a row was missing: the width of
            the window for each distinct one.
    """

    tokens: int
    plot_layers: int
    num_layers: int
    hit_rate: float
    computed_tokens: int

    @property
    def skipped(self) -> float:
        """Share of the plain model's work (tokens times layers) that was not done; may be negative."""
        return self.plot_layers / self.num_layers * (1 - self.computed_tokens / self.tokens)


class RunRecord(_Frozen):
    """What one run found.

    Attributes:
        set_name: the set.
        method: name of the method, with its learning rate.
        seed: of the run.
        dev: score on the development split, which chose the epoch: accuracy or entity F1.
        dev_by_epoch: of every epoch.
        outcomes: on the test split.
        work: see there; None without domain layers.
        cpu_seconds: of all threads, for training and scoring.
        base: digest of the distilled base's weights; None for the base as it is.
        settings: the recipe.
        versions: of the software.
    """

    set_name: str
    method: str
    seed: int
    dev: float
    dev_by_epoch: tuple[float, ...]
    outcomes: Annotated[LabelOutcomes | TagOutcomes, Field(discriminator="kind")]
    work: Work | None
    cpu_seconds: float
    base: str | None = None
    settings: dict[str, JsonValue]
    versions: dict[str, str]


class RunRecords:
    """The records in a folder, by the names of their runs; another process may add to them."""

    def __init__(self, folder: Path) -> None:
        """Takes a folder that may be missing."""
        self._folder = folder
        self._read: dict[str, RunRecord] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the run ``name`` is finished."""
        return name in self._read or self._path(name).exists()

    def __getitem__(self, name: str) -> RunRecord:
        """The record of run ``name``.

        Raises OSError if there is none, pydantic's ValidationError for a file of another format.
        """
        if name not in self._read:
            self._read[name] = RunRecord.model_validate_json(self._path(name).read_bytes())
        return self._read[name]

    def values(self) -> list[RunRecord]:
        """All of them, by name."""
        return [self[path.stem] for path in sorted(self._folder.glob("*.json"))]

    def add(self, name: str, record: RunRecord) -> None:
        """Keeps a record, atomically."""

        def write(partial: Path) -> None:
            partial.write_text(record.model_dump_json() + "\n")

        self._folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self._path(name), write)
        self._read[name] = record

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"
