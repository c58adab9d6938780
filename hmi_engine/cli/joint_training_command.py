"""``hmi tenant train-many``: tenants of one domain, trained together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table

from hmi_engine.cli.output import (
    AsJson,
    StorePath,
    console,
    print_json_list,
    progress_bars,
    warn,
)
from hmi_engine.cli.training_files import TrainingFiles
from hmi_engine.cli.training_warnings import warn_of_training
from hmi_engine.construct.joint_training import TOGETHER, TenantExamples, TrainingOutcome
from hmi_engine.construct.training_metrics import Metrics
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import CorpusError, HmiError
from hmi_engine.knowledge.catalog import ROOT_DOMAIN
from hmi_engine.store import Store

__all__ = ["train_many"]


class ManifestLine(BaseModel):
    """One tenant of a manifest.

    Attributes:
        name: the tenant's name.
        data: its examples; as seen from the manifest's folder, like the other files.
        validation: examples that choose the best epoch.
        test: held-out examples.
        teacher: folder of a fine-tuned model to learn from.
        unlabelled: files of texts of which it alone says something.
        settings: fields of ``TrainingSettings`` that are its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    data: Path
    validation: Path | None = None
    test: Path | None = None
    teacher: Path | None = None
    unlabelled: tuple[Path, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)


def train_many(
    store: StorePath,
    manifest: Annotated[
        Path,
        typer.Option(
            help='JSON lines: {"name": ..., "data": ..., "test": ..., "settings": {...}}; a file is meant as '
            "seen from the manifest's folder.",
        ),
    ],
    domain: Annotated[str, typer.Option(help="The tenants' domain.")] = ROOT_DOMAIN,
    together: Annotated[int, typer.Option(min=1, help="Tenants in memory at a time.")] = TOGETHER,
    replace: Annotated[bool, typer.Option(help="Replace tenants of these names.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train many tenants together; one that fails leaves the others alone.

    Ends with 1 if a tenant could not be trained.
    """
    tenants, failures = _read(manifest)
    outcomes: dict[str, TrainingOutcome] = dict(failures)
    with Store.open(store) as opened, progress_bars() as progress:
        outcomes |= opened.train_tenants(
            tenants, domain=domain, together=together, replace=replace, progress=progress
        )
    for name, outcome in outcomes.items():
        if not isinstance(outcome, HmiError):
            warn_of_training(outcome.report, f"{name}: ")
    if as_json:
        print_json_list(_described(outcomes))
    else:
        _print(outcomes)
    if any(isinstance(outcome, HmiError) for outcome in outcomes.values()):
        raise typer.Exit(1)


def _read(manifest: Path) -> tuple[list[TenantExamples], dict[str, HmiError]]:
    """The tenants whose files could be read, and what is wrong with the others, by name.

    Raises:
        CorpusError: a line of the manifest itself is malformed, or names a tenant twice.
    """
    tenants: list[TenantExamples] = []
    failures: dict[str, HmiError] = {}
    for number, line in _lines(manifest):
        if line.name in failures or any(line.name == tenant.name for tenant in tenants):
            raise CorpusError(f"{manifest}, line {number}: tenant {line.name!r:.80} comes twice")
        try:
            tenants.append(_examples_of(line, manifest.parent))
        except HmiError as error:
            failures[line.name] = error
    return tenants, failures


def _lines(manifest: Path) -> Iterator[tuple[int, ManifestLine]]:
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{manifest} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, ManifestLine.model_validate_json(line)
        except ValidationError as error:
            raise CorpusError(f"{manifest}, line {number}: {_problem(error)}") from error
    if not any(line.strip() for line in lines):
        raise CorpusError(f'{manifest} names no tenant; each line is {{"name": ..., "data": ...}}')


def _examples_of(line: ManifestLine, folder: Path) -> TenantExamples:
    try:
        settings = TrainingSettings(**line.settings)
    except (ValidationError, TypeError) as error:
        reason = _problem(error) if isinstance(error, ValidationError) else str(error)
        raise CorpusError(f"the settings of tenant {line.name!r:.80}: {reason}") from error

    files = TrainingFiles(settings.task, whose=f"{line.name}: ")
    examples, validation_examples, test_examples = (
        files.examples(None if path is None else folder / path)
        for path in (line.data, line.validation, line.test)
    )
    return TenantExamples(
        line.name,
        examples,
        validation_examples,
        test_examples,
        settings,
        teacher=None if line.teacher is None else folder / line.teacher,
        unlabelled=files.unlabelled([folder / path for path in line.unlabelled]),
    )


def _problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}" if place else problem["msg"]


def _described(outcomes: dict[str, TrainingOutcome]) -> Iterator[dict[str, Any]]:
    for name, outcome in outcomes.items():
        if isinstance(outcome, HmiError):
            yield {"name": name, "error": type(outcome).__name__, "message": str(outcome)}
        else:
            yield {"name": name, "report": outcome.report.model_dump(mode="json")}


def _shown(scores: Metrics | None, figure: str) -> str:
    """The figure, or where a split is judged by others (scored pairs, say) the first of these by its name."""
    if scores is None:
        return ""
    if figure in scores.values:
        return f"{scores.values[figure]:.3f}"
    name, value = next(iter(scores.values.items()))
    return f"{name} {value:.3f}"


def _print(outcomes: dict[str, TrainingOutcome]) -> None:
    table = Table("tenant", "epochs", "figure", "validation", "test")
    for name, outcome in outcomes.items():
        if isinstance(outcome, HmiError):
            continue
        report = outcome.report
        figures = [_shown(scores, report.best_by) for scores in (report.validation, report.test)]
        table.add_row(name, str(len(report.history)), report.best_by, *figures)
    console.print(table)
    for name, outcome in outcomes.items():
        if isinstance(outcome, HmiError):
            warn(f"{name} was not trained: {outcome}")
