"""Tables and curves of the accuracy study from the runs that are finished, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.accuracy_study.methods import RECIPES, Hierarchical, Method, Recipe
from benchmarks.accuracy_study.plan import Plan
from benchmarks.accuracy_study.records import RunRecord, RunRecords
from benchmarks.accuracy_study.scores import Resampling
from benchmarks.accuracy_study.sets import ClassificationSet, StudySet
from benchmarks.result import Interval, Table

__all__ = ["StudyReport", "main_score"]

MACRO_F1 = "macro-F1"


def main_score(labelled: StudySet) -> str:
    """What a set is judged by: accuracy, or of tagged sentences entity F1."""
    return "accuracy" if isinstance(labelled, ClassificationSet) else "entity F1"


@dataclass(frozen=True)
class StudyReport:
    """The results of a plan as far as it is carried out.

    Attributes:
        plan: sets, methods and seeds; its first method is what the others are compared with.
        records: what is finished.
    """

    plan: Plan
    records: RunRecords

    @cached_property
    def methods(self) -> list[Method]:
        """Methods with at least one finished run."""
        return [
            method for method in self.plan.methods if any(self._finished(each, method) for each in self._sets)
        ]

    @cached_property
    def rows(self) -> list[Method | Recipe]:
        """These, and the recipes that are measured on every set."""
        return [*self.methods, *(each for each in RECIPES if self._mean(each) is not None)]

    @property
    def _sets(self) -> Sequence[StudySet]:
        return self.plan.sets

    def _finished(self, labelled: StudySet, method: Method) -> list[RunRecord]:
        return [self.records[name] for name in self.plan.finished(labelled, method, self.records)]

    def _resampled(
        self, labelled: StudySet, method: Method, name: str, seeds: frozenset[int] | None = None
    ) -> Resampling | None:
        """A score, of all seeds or of some."""
        records = [
            record for record in self._finished(labelled, method) if seeds is None or record.seed in seeds
        ]
        if not records:
            return None
        counts = [record.outcomes.counts(labelled) for record in records]
        return Resampling.of(name, counts, set_name=labelled.name, method=method.slug)

    @cached_property
    def _main(self) -> dict[tuple[str, Method], Resampling]:
        """The main score by set and method."""
        found = {
            (labelled.name, method): self._resampled(labelled, method, main_score(labelled))
            for labelled in self._sets
            for method in self.methods
        }
        return {key: resampling for key, resampling in found.items() if resampling is not None}

    def _mean(self, method: Method | Recipe, *, over: Method | None = None) -> Resampling | None:
        """The mean over all sets, or that of the differences from ``over``; None while a set is missing."""
        parts = []
        for labelled in self._sets:
            part = self._difference(labelled, method, over)
            if part is None:
                return None
            parts.append(part)
        return Resampling.mean(parts)

    def _difference(
        self, labelled: StudySet, method: Method | Recipe, over: Method | None
    ) -> Resampling | None:
        """A method's main score on a set, or its difference from another's: of the seeds that both have."""
        chosen = _method_for(labelled, method)
        if over is None:
            return self._main.get((labelled.name, chosen))
        seeds = self._seeds_of(labelled, chosen) & self._seeds_of(labelled, over)
        part, other = (self._of_seeds(labelled, each, seeds) for each in (chosen, over))
        return None if part is None or other is None else part.minus(other)

    def _of_seeds(self, labelled: StudySet, method: Method, seeds: frozenset[int]) -> Resampling | None:
        if seeds == self._seeds_of(labelled, method):
            return self._main.get((labelled.name, method))
        return self._resampled(labelled, method, main_score(labelled), seeds)

    def _seeds_of(self, labelled: StudySet, method: Method) -> frozenset[int]:
        return frozenset(record.seed for record in self._finished(labelled, method))

    def tables(self) -> list[Table]:
        """Scores, differences from the first method, macro-F1, and the work that was skipped."""
        tables = [self._scores(), self._differences(), self._macro_f1(), self._work(), self._progress()]
        return [table for table in tables if table.rows]

    def _scores(self) -> Table:
        columns = (f"{labelled.name}: {main_score(labelled)}" for labelled in self._sets)
        rows = [
            (
                method.title,
                *(
                    self._cell(self._difference(each, method, None), self._seeds(each, method))
                    for each in self._sets
                ),
                self._cell(self._mean(method), min(self._seeds(each, method) for each in self._sets)),
            )
            for method in self.rows
        ]
        return Table(
            title="Scores on the test splits, %", columns=("method", *columns, "mean"), rows=tuple(rows)
        )

    def _differences(self) -> Table:
        baseline = self.plan.methods[0]
        rows = []
        for method in self.rows:
            if method == baseline:
                continue
            parts = [self._difference(labelled, method, baseline) for labelled in self._sets]
            cells = [
                self._cell(part, self._common_seeds(each, method, baseline), signed=True)
                for each, part in zip(self._sets, parts, strict=True)
            ]
            fewest = min(self._common_seeds(each, method, baseline) for each in self._sets)
            rows.append(
                (method.title, *cells, self._cell(self._mean(method, over=baseline), fewest, signed=True))
            )
        names = (labelled.name for labelled in self._sets)
        return Table(
            title=f"Difference from {baseline.title}, points",
            columns=("method", *names, "mean"),
            rows=tuple(rows),
        )

    def _macro_f1(self) -> Table:
        sets = [labelled for labelled in self._sets if isinstance(labelled, ClassificationSet)]
        rows = [
            (
                method.title,
                *(
                    self._cell(self._resampled(each, method, MACRO_F1), self._seeds(each, method))
                    for each in sets
                ),
            )
            for method in self.methods
        ]
        return Table(
            title="Macro-F1 on the test splits, %",
            columns=("method", *(labelled.name for labelled in sets)),
            rows=tuple(rows) if sets else (),
        )

    def _work(self) -> Table:
        rows = []
        for method in self.methods:
            if isinstance(method, Hierarchical):
                by_set = [self._finished(labelled, method) for labelled in self._sets]
                rows.append((method.title, *(_work_cell(records) for records in by_set)))
        return Table(
            title="Work that was not done, % of the plain model's layers (hit rate of windows, %)",
            columns=("method", *(labelled.name for labelled in self._sets)),
            rows=tuple(rows),
        )

    def _progress(self) -> Table:
        """Finished seeds by method and set, of methods that are not finished everywhere."""
        wanted = len(self.plan.seeds)
        rows = []
        for method in self.plan.methods:
            seeds = [self._seeds(labelled, method) for labelled in self._sets]
            if min(seeds) < wanted:
                rows.append((method.title, *(f"{done} of {wanted}" for done in seeds)))
        names = (labelled.name for labelled in self._sets)
        return Table(title="Missing: seeds that are done", columns=("method", *names), rows=tuple(rows))

    def _seeds(self, labelled: StudySet, method: Method | Recipe) -> int:
        return len(self._finished(labelled, _method_for(labelled, method)))

    def _common_seeds(self, labelled: StudySet, method: Method | Recipe, over: Method) -> int:
        return len(self._seeds_of(labelled, _method_for(labelled, method)) & self._seeds_of(labelled, over))

    def _cell(self, resampling: Resampling | None, seeds: int, *, signed: bool = False) -> str:
        if resampling is None:
            return ""
        shown = _points(resampling.interval(), signed=signed)
        return shown if seeds == len(self.plan.seeds) else f"{shown}, {seeds} of {len(self.plan.seeds)} seeds"

    def hit_rates(self, method: Method) -> list[float]:
        """Share of the test splits' windows that were found, by set."""
        works = [record.work for each in self._sets for record in self._finished(each, method)[:1]]
        return [work.hit_rate for work in works if work is not None]

    def common_seeds(self, methods: Sequence[Method]) -> dict[str, frozenset[int]]:
        """By set the seeds with which full fine-tuning and all of ``methods`` are finished."""
        compared = (self.plan.methods[0], *methods)
        return {
            labelled.name: frozenset.intersection(*(self._seeds_of(labelled, each) for each in compared))
            for labelled in self._sets
        }

    def lost_points(self, method: Method, seeds: Mapping[str, frozenset[int]]) -> Interval | None:
        """By how many points the mean of all sets is below full fine-tuning; None while one is missing.

        ``seeds`` says of which seeds, by set: methods that are compared with one another need the same.
        """
        parts = []
        for labelled in self._sets:
            full, other = (
                self._of_seeds(labelled, each, seeds[labelled.name])
                for each in (self.plan.methods[0], method)
            )
            if full is None or other is None:
                return None
            parts.append(full.minus(other))
        interval = Resampling.mean(parts).interval()
        return Interval(value=100 * interval.value, low=100 * interval.low, high=100 * interval.high)


def _method_for(labelled: StudySet, row: Method | Recipe) -> Method:
    if not isinstance(row, Recipe):
        return row
    return row.of_texts if isinstance(labelled, ClassificationSet) else row.of_words


def _points(interval: Interval, *, signed: bool) -> str:
    sign = "+" if signed else ""
    value, low, high = (f"{100 * each:{sign}.1f}" for each in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"


def _work_cell(records: Sequence[RunRecord]) -> str:
    works = [record.work for record in records if record.work is not None]
    if not works:
        return ""
    # The test split and the table are the same for every seed.
    return f"{100 * works[0].skipped:.0f} ({100 * works[0].hit_rate:.0f})"
