"""``hmi distill``: the base model, or a domain's layers, in hierarchical form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table

from hmi_engine.cli.corpus_options import StdinFormat, checked_stdin_format
from hmi_engine.cli.output import (
    AsJson,
    StorePath,
    console,
    print_json,
    progress_bars,
    say,
    warn_of_reading,
)
from hmi_engine.construct.bootstrap import MAX_SEED
from hmi_engine.construct.distillation_settings import (
    DistillationReport,
    DistillationSettings,
    StageReport,
    StageSettings,
)
from hmi_engine.knowledge.corpus_report import CorpusReport
from hmi_engine.store import Store

_DEFAULT = DistillationSettings()
_FIRST, _SECOND = _DEFAULT.stages


def distill(
    store: StorePath,
    corpus: Annotated[
        list[Path],
        typer.Option(help="Text: .txt, .jsonl (.gz, .zst), .parquet, folders, or - for standard input."),
    ],
    domain: Annotated[
        str | None, typer.Option(help="Learn this domain's own layers; the base stays.", show_default=False)
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints: the same command goes on from there. Default: none are kept.",
            show_default=False,
        ),
    ] = None,
    steps_1: Annotated[
        int, typer.Option(min=0, help="Steps of the domain layers and the merge.")
    ] = _FIRST.steps,
    steps_2: Annotated[
        int, typer.Option(min=0, help="Steps of the upper layers and the merge.")
    ] = _SECOND.steps,
    learning_rate_1: Annotated[float, typer.Option(help="Of stage 1.")] = _FIRST.learning_rate,
    learning_rate_2: Annotated[float, typer.Option(help="Of stage 2.")] = _SECOND.learning_rate,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch.")] = _DEFAULT.batch_tokens,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Batches that make one step.")
    ] = _DEFAULT.gradient_accumulation,
    max_tokens: Annotated[int, typer.Option(help="Longer texts are cut into pieces.")] = _DEFAULT.max_tokens,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = _DEFAULT.mixed_precision,
    misses: Annotated[
        str, typer.Option(help="N-grams left out of the table: cross_fitted, uniform or none.")
    ] = _DEFAULT.misses,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Makes the result reproducible.")
    ] = _DEFAULT.seed,
    settings: Annotated[
        Path | None,
        typer.Option(help="JSON file with all settings, in place of the options above.", show_default=False),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Model to learn from; default: the store's base as it was.", show_default=False),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="New folder for the distilled model, for init.", show_default=False)
    ] = None,
    compact: Annotated[
        Path | None,
        typer.Option(help="File for what changed, for init --distilled.", show_default=False),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the text in JSON lines.")] = "text",
    stdin_format: StdinFormat = "txt",
    as_json: AsJson = False,
) -> None:
    """Distil the base model into hierarchical form on unlabelled text, before tenants are added."""
    options = {
        "stage_1": _stage(_FIRST, steps_1, learning_rate_1),
        "stage_2": _stage(_SECOND, steps_2, learning_rate_2),
        "batch_tokens": batch_tokens,
        "gradient_accumulation": gradient_accumulation,
        "max_tokens": max_tokens,
        "mixed_precision": mixed_precision,
        "misses": misses,
        "seed": seed,
    }
    chosen = _settings(options, settings)
    kind = checked_stdin_format(stdin_format)
    read = CorpusReport()
    with Store.open(store) as opened, progress_bars() as progress:
        report = opened.distill(
            corpus,
            domain=domain,
            settings=chosen,
            teacher=teacher,
            folder=work,
            export=export,
            compact=compact,
            text_field=text_field,
            stdin_format=kind,
            report=read,
            progress=progress,
        )
    warn_of_reading(read)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        _print(report, domain)


def _stage(default: StageSettings, steps: int, learning_rate: float) -> dict[str, Any]:
    return default.model_dump() | {"steps": steps, "learning_rate": learning_rate}


def _settings(options: dict[str, Any], file: Path | None) -> DistillationSettings:
    try:
        if file is not None:
            return DistillationSettings.model_validate_json(file.read_bytes())
        return DistillationSettings.model_validate(options)
    except OSError as error:
        raise typer.BadParameter(
            f"{file} cannot be read: {error.strerror}", param_hint="--settings"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "settings"
        raise typer.BadParameter(f"{place}: {first['msg']}") from error


def _print(report: DistillationReport, domain: str | None) -> None:
    what = "the base model" if domain is None else f"the layers of domain {domain}"
    say(
        f"distilled {what} on {report.tokens} tokens in {report.seconds:.0f} s; error on "
        f"{report.held_out_tokens} held-out tokens (share of the teacher's variance), "
        f"{report.held_out_miss_rate:.0%} of n-grams missing:"
    )
    table = Table("stage", "policy", "after", "at the merge", "at the last layer")
    for number, stage in enumerate(report.stages, start=1):
        _add_rows(table, number, stage)
    console.print(table)


def _add_rows(table: Table, number: int, stage: StageReport) -> None:
    for point in stage.held_out[:1] + stage.held_out[-1:]:
        for policy, losses in (("exact", point.exact), ("backoff", point.backoff)):
            table.add_row(str(number), policy, f"{point.step} steps", f"{losses[0]:.3f}", f"{losses[-1]:.3f}")
