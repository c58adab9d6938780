"""Would another merge than the sum of rows lose less of what the base's lower layers know?

Every form goes on from the distilled model that the package brings along, whose domain layers learned for the
sum, in two phases of the same steps and batches: the merge alone, then the domain layers with it.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator

from benchmarks.accuracy_study.sets import study_sets
from benchmarks.arguments import Arguments, read_arguments
from benchmarks.distil import unlabelled_texts
from benchmarks.kept_steps import KeptSteps
from benchmarks.merges import FORMS, Form
from benchmarks.result import BenchmarkResult, Table
from hmi_engine.construct.distillation_checkpoint import StageState
from hmi_engine.construct.distillation_corpus import DistillationCorpus, read_pieces
from hmi_engine.construct.distillation_rows import CorpusRows
from hmi_engine.construct.distillation_settings import (
    DistillationSettings,
    HeldOutLoss,
    Part,
    StageSettings,
)
from hmi_engine.construct.distillation_stage import StageTrainer
from hmi_engine.construct.distillation_student import Student, load_bert
from hmi_engine.construct.distillation_teacher import Teacher
from hmi_engine.demo.base_model import packaged_distillation, packaged_model
from hmi_engine.models.general_folder import load_merge
from hmi_engine.store import Store

__all__ = ["main", "measure"]

NAME = "merge_forms"
QUESTION = "Would another merge than the sum of rows lose less of what the base's lower layers know?"
NOTES = (
    "Text: the training texts of the study's sets without labels, of which blocks of neighbours are held "
    "out. Figures are mean squared errors on these over the teacher's variance: 0 is perfect, 1 no better "
    "than its mean.",
    "All forms begin as the sum does, from the distilled model that ships (K = 3, windows of two tokens), "
    "and take the same steps on the same batches: the sum's line says what more steps alone are worth.",
    "Found: every bigram is in the table. Back-off: those that the training text has less than twice are "
    "not.",
    "Cost of serving: multiplications for a token over those of one upper layer. A matrix for each part "
    "costs none, as a table can hold the products.",
)
PLOT_LAYERS = 3
CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Phase:
    """Some steps in which parts of the student learn."""

    name: str
    steps: int
    parts: tuple[Part, ...]

    def settings(self, number: int, *, quick: bool) -> DistillationSettings:
        """The usual settings with this phase as their only stage."""
        steps = 2 if quick else self.steps
        return DistillationSettings(
            stage_1=StageSettings(
                steps=steps,
                trainable=self.parts,
                learning_rate=3e-4,
                merge_learning_rate=5e-4,
                merged_weight=1.0,
            ),
            evaluate_every=steps,
            seed=number,
        )


PHASES = (
    Phase("the merge learns", 400, ("merge",)),
    Phase("domain layers and merge learn", 100, ("domain", "merge")),
)


@dataclass(frozen=True)
class _Losses:
    """Held-out losses of a form: before all, and after each phase."""

    before: HeldOutLoss
    after: tuple[HeldOutLoss, ...]


class _Study:
    """The distilled model, its teacher, and the text."""

    def __init__(
        self, store: Store, teacher: Path, texts: Sequence[str], folder: Path, *, quick: bool
    ) -> None:
        self._general, self._quick, self._folder = store.general_folder, quick, folder
        usual = DistillationSettings()
        pieces, _ = read_pieces(texts, store.encoder, usual.max_tokens)
        self._corpus = DistillationCorpus(pieces, store.general.window, usual)
        self._accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        self._teacher = Teacher(load_bert(teacher), PLOT_LAYERS, self._accelerator.device)
        self._teacher.keep_states(folder, "all", self._corpus.batches, CACHE_BYTES)
        assert store.general.placeholder_token_id is not None  # a store with domain layers has one
        self._placeholder = store.general.placeholder_token_id

    def losses(self, form: Form) -> _Losses:
        """Takes a form through all phases."""
        torch.manual_seed(0)  # a new layer's weights are drawn
        merge = load_merge(self._general)
        student = Student(load_bert(self._general), merge, PLOT_LAYERS)
        student.merge = form.build(merge)
        measured = [self._run(student, number) for number in range(len(PHASES))]
        return _Losses(measured[0][0], tuple(last for _, last in measured))

    def _run(self, student: Student, number: int) -> tuple[HeldOutLoss, HeldOutLoss]:
        """A phase; losses before and after it."""
        settings = PHASES[number].settings(number, quick=self._quick)
        state = StageState()
        StageTrainer(
            0,
            student,
            self._teacher,
            self._corpus,
            self._rows(student, number),
            self._placeholder,
            settings,
            self._accelerator,
        ).run(state, lambda: None)
        return state.held_out[0], state.held_out[-1]

    def _rows(self, student: Student, number: int) -> CorpusRows | None:
        """Rows that do not change in a phase. All forms share the first one's, which so are kept."""
        if "domain" in PHASES[number].parts:
            return None
        rows = CorpusRows(student, self._corpus.window, self._accelerator.device)
        if not number:
            rows.fill(self._folder, self._corpus.batches, self._placeholder, CACHE_BYTES, all_missing=False)
        return rows


def _tables(losses: dict[str, _Losses]) -> tuple[Table, ...]:
    """What is missed at the merge, before and after each phase."""
    columns = ("merge", "layers in service", "before", *(phase.name for phase in PHASES))

    def table(kind: Literal["exact", "backoff"], coverage: str) -> Table:
        rows = []
        for form in FORMS:
            found = losses[form.name]
            values = [getattr(loss, kind)[0] for loss in (found.before, *found.after)]
            rows.append((form.name, form.served_layers, *values))
        title = f"missed of the teacher's variance at the merge, {coverage}"
        return Table(title=title, columns=columns, rows=tuple(rows))

    return table("exact", "every bigram found"), table("backoff", "back-off")


def measure(arguments: Arguments, folder: Path) -> BenchmarkResult:
    """Takes every form through the phases; what is done lies beside the result until all is."""
    teacher = packaged_model()
    kept = KeptSteps(arguments.out, f"{arguments.data} {arguments.quick} {PHASES}")
    with Store.create(
        folder / "store", general=teacher, distilled=packaged_distillation(PLOT_LAYERS)
    ) as store:
        texts = unlabelled_texts(study_sets(arguments.data, quick=arguments.quick))
        study = _Study(store, teacher, texts, folder, quick=arguments.quick)
        losses = {
            form.name: kept.take(form.name, _Losses, functools.partial(study.losses, form)) for form in FORMS
        }
    kept.forget()
    return BenchmarkResult.of(
        arguments,
        NAME,
        QUESTION,
        settings={"texts": len(texts), "steps": {phase.name: phase.steps for phase in PHASES}},
        notes=NOTES,
        tables=_tables(losses),
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
