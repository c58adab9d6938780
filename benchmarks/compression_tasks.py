"""Task accuracy by row format: whole tables, and tables of equal bytes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from benchmarks.composition_tasks import Trainer, general_info
from benchmarks.composition_texts import StudyTexts
from benchmarks.compression_rows import StoredTable, Table
from hmi_engine.construct.training import TrainingSettings
from hmi_engine.demo.base_model import PACKAGE
from hmi_engine.knowledge.row_formats import RowFormat, codebook_bytes
from hmi_engine.knowledge.selection import bytes_per_row

__all__ = ["BASELINE", "IN_SMALL_TABLE", "TRAINED", "Figures", "Subject", "task_accuracies"]

BASELINE: RowFormat = "float16"
TRAINED: tuple[RowFormat, ...] = ("float16", "int8", "pq8", "pq16")
IN_SMALL_TABLE = ", in a small table"


@dataclass(frozen=True)
class Subject:
    """What is measured: a table in every format, and the sets whose windows it serves."""

    table: Table
    stored: Mapping[RowFormat, StoredTable]
    sets: Sequence[StudyTexts]

    @functools.cached_property
    def references(self) -> list[Tensor]:
        """For each set, int64 [T, 1]."""
        return [self.table.references(texts.pairs.keys, texts.pairs.held()) for texts in self.sets]

    def inputs(self, number: int, row_format: RowFormat) -> Tensor:
        """The first upper layer's input for a set, float32 [T, H]."""
        return self.stored[row_format].merge(self.sets[number].sequences, self.references[number])

    def affordable_references(self, row_format: RowFormat, num_bytes: int) -> list[Tensor]:
        """Like ``references``, to the most frequent rows that a table of so many bytes holds."""
        window, hidden_size = self.table.rows.shape[1:]
        left = num_bytes - codebook_bytes(row_format, window, hidden_size)
        num_rows = max(0, left // bytes_per_row(window, hidden_size, row_format))
        kept = self.table.most_frequent(num_rows)
        return [
            torch.where((references >= 0) & kept[references.clamp(min=0)], references, -1)
            for references in self.references
        ]

    def inputs_within(self, number: int, row_format: RowFormat, num_bytes: int) -> Tensor:
        """As :meth:`inputs`, from a table of so many bytes."""
        references = self.affordable_references(row_format, num_bytes)[number]
        return self.stored[row_format].merge(self.sets[number].sequences, references)


Figures = dict[str, list[float]]
"""Figures by name, one for each set and seed."""


def task_accuracies(
    subject: Subject, settings: TrainingSettings, seeds: int, small_budget: int
) -> dict[str, Figures]:
    """By set: trained on what is served, trained on float16 rows and served others, and in a small table."""
    general = general_info(subject.table.model, PACKAGE)
    found: dict[str, Figures] = {}
    for number, texts in enumerate(subject.sets):
        inputs: dict[str, Tensor] = {name: subject.inputs(number, name) for name in TRAINED}
        small: dict[str, Tensor] = {
            name: subject.inputs_within(number, name, small_budget) for name in TRAINED
        }
        trainer = Trainer(subject.table.model, general, texts, settings)
        figures = found[texts.name] = {}
        for seed in range(seeds):
            accuracies = _accuracies(trainer, inputs, seed)
            accuracies |= {
                f"{name}{IN_SMALL_TABLE}": trainer.accuracies(states, {name: states}, seed)[name]
                for name, states in small.items()
            }
            for name, accuracy in accuracies.items():
                figures.setdefault(name, []).append(accuracy)
        means = {name: round(mean(values), 3) for name, values in figures.items()}
        print(f"{texts.name}: {means}", flush=True)
    return found


def _accuracies(trainer: Trainer, inputs: Mapping[str, Tensor], seed: int) -> dict[str, float]:
    baseline = inputs[BASELINE]
    served = trainer.accuracies(baseline, inputs, seed)
    found: dict[str, float] = {BASELINE: served.pop(BASELINE)}
    found |= {f"{name}, trained on {BASELINE}": accuracy for name, accuracy in served.items()}
    for name in served:
        found[f"{name}, trained alike"] = trainer.accuracies(inputs[name], {name: inputs[name]}, seed)[name]
    return found
