"""``hmi tenant train``, ``evaluate`` and ``card``: making tenants from examples, and judging them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table

from hmi_engine.cli.output import (
    AsJson,
    StorePath,
    checked_choice,
    console,
    print_json,
    progress_bars,
    say,
    warn,
)
from hmi_engine.cli.tenant_options import DomainOption, ReplaceOption, TenantName
from hmi_engine.cli.training_files import TrainingFiles
from hmi_engine.cli.training_warnings import warn_of_training
from hmi_engine.construct.bootstrap import MAX_SEED
from hmi_engine.construct.model_card_text import card_markdown, figure
from hmi_engine.construct.training import Metrics, SearchSpace, TrainingReport, TrainingSettings
from hmi_engine.construct.training_settings import ADAPTER_KINDS
from hmi_engine.engine import Engine
from hmi_engine.evaluation import evaluate_tenant, task_of
from hmi_engine.knowledge.catalog import ROOT_DOMAIN
from hmi_engine.knowledge.corpus_files import EXAMPLE_FORMATS
from hmi_engine.knowledge.examples import TASKS
from hmi_engine.knowledge.sizes import format_bytes
from hmi_engine.store import Store

__all__ = ["card", "evaluate", "train"]

FormatOption = Annotated[
    str | None,
    typer.Option("--format", help=f"{', '.join(EXAMPLE_FORMATS)}; default: told from the files' names."),
]
TextFieldOption = Annotated[str, typer.Option(help="Field or column of the text.")]
LabelFieldOption = Annotated[str, typer.Option(help="Field or column of the label.")]


def train(
    store: StorePath,
    name: TenantName,
    data: Annotated[Path, typer.Option(help='Examples, such as JSON lines {"text": ..., "label": ...}.')],
    validation: Annotated[
        Path | None, typer.Option(help="Examples that choose the best epoch; default: a share of the data.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Held-out examples to report on.")] = None,
    task: Annotated[str, typer.Option(help=f"What is learned: {', '.join(TASKS)}.")] = "classification",
    domain: DomainOption = ROOT_DOMAIN,
    kind: Annotated[str, typer.Option(help=f"Of adapter: {', '.join(ADAPTER_KINDS)}.")] = "bottleneck",
    rank: Annotated[int, typer.Option(min=1, help="Width of the adapter.")] = 16,
    sites: Annotated[
        str | None,
        typer.Option(help="Places in a layer, with commas; LoRA: or all-linear. Default: the kind's own."),
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="LoRA: its output is times this over the rank; default: times 2.")
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Over the rank's square root instead.")] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Most passes over the data; default: 10, more of few examples.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many epochs without gain; default: a fifth.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; default: the kind's own.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Examples per step; default: 32, fewer where examples are few.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=3, help="Longer texts are cut.")] = 128,
    pooling: Annotated[
        str | None,
        typer.Option(
            help="What the head reads: cls, or mean (often better of few examples, slower to serve)."
        ),
    ] = None,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Make rare labels count as much as frequent ones.")
    ] = False,
    dropout: Annotated[float, typer.Option(help="Share of hidden states left out in each step.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(help="Share of a target spread over all labels.")] = 0.0,
    teacher: Annotated[
        Path | None,
        typer.Option(help="Folder of a fine-tuned model, as transformers saves it, to learn from as well."),
    ] = None,
    unlabelled: Annotated[
        list[Path] | None,
        typer.Option(help="Text for the teacher to label, such as a corpus of the domain; may come again."),
    ] = None,
    teacher_weight: Annotated[
        float, typer.Option(help="Share of a labelled text's loss that follows the teacher.")
    ] = 0.5,
    miss: Annotated[
        str, typer.Option(help="Policy that it will be served with: backoff or exact.")
    ] = "backoff",
    search: Annotated[
        bool,
        typer.Option("--search", help="First choose learning rate and rank by the validation examples."),
    ] = False,
    search_rates: Annotated[
        str | None, typer.Option(help="Learning rates to search, with commas; default: 0.3, 1 and 3 times.")
    ] = None,
    search_ranks: Annotated[str, typer.Option(help="Ranks to search, with commas.")] = "8,16,32",
    search_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the search in all; default: those of two trainings.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="The same seed gives the same tenant.")] = 0,
    file_format: FormatOption = None,
    text_field: TextFieldOption = "text",
    label_field: LabelFieldOption = "label",
    replace: ReplaceOption = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter and a head on examples; the base stays as it is."""
    settings = _settings(
        task=checked_choice(task, TASKS, "--task"),
        kind=checked_choice(kind, ADAPTER_KINDS, "--kind"),
        rank=rank,
        sites=sites if sites is None or sites == "all-linear" else sites.split(","),
        lora_alpha=lora_alpha,
        use_rslora=rslora,
        max_epochs=epochs,
        patience=patience,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_tokens=max_tokens,
        pooling=pooling,
        class_weights="balanced" if balanced else None,
        dropout=dropout,
        label_smoothing=label_smoothing,
        teacher_weight=teacher_weight,
        miss=miss,
        seed=seed,
    )
    space = _search_space(settings, search_rates, search_ranks, search_steps) if search else None
    files = TrainingFiles(
        settings.task, file_format=file_format, text_field=text_field, label_field=label_field
    )
    examples, validation_examples, test_examples = map(files.examples, (data, validation, test))
    unlabelled_texts = files.unlabelled(unlabelled or [])
    with Store.open(store) as opened, progress_bars() as progress:
        trained = opened.train_tenant(
            name,
            examples,
            domain=domain,
            validation_examples=validation_examples,
            test_examples=test_examples,
            settings=settings,
            search_space=space,
            teacher=teacher,
            unlabelled=unlabelled_texts,
            replace=replace,
            progress=progress,
        )
        info = opened.tenants[name]
    warn_of_training(trained.report)
    if as_json:
        print_json(trained.report.model_dump(mode="json") | {"bytes": info.bytes})
    else:
        _print_report(name, trained.report, info.bytes)


def evaluate(
    store: StorePath,
    name: TenantName,
    data: Annotated[Path, typer.Option(help="Examples of the tenant's task.")],
    miss: Annotated[str, typer.Option(help="Policy to serve with: backoff, exact or budget.")] = "backoff",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the intervals' resamples.")] = 0,
    file_format: FormatOption = None,
    text_field: TextFieldOption = "text",
    label_field: LabelFieldOption = "label",
    as_json: AsJson = False,
) -> None:
    """Ask a tenant, trained here or elsewhere, about examples, and compare its answers."""
    policy = checked_choice(miss, ("backoff", "exact", "budget"), "--miss")
    with Store.open(store, read_only=True) as opened:
        task = task_of(opened.load_tenant(name)[1])
        files = TrainingFiles(task, file_format=file_format, text_field=text_field, label_field=label_field)
        examples = files.examples(data)
        with Engine(opened, miss=policy) as engine, progress_bars() as progress:
            evaluation = evaluate_tenant(engine, name, examples, seed=seed, progress=progress)
    if evaluation.num_cut:
        warn(f"{evaluation.num_cut} texts were cut to the model's positions")
    if as_json:
        print_json(evaluation.model_dump(mode="json"))
    else:
        console.print(_figures(name, {data.name: evaluation.metrics}))


def card(store: StorePath, name: TenantName, as_json: AsJson = False) -> None:
    """Print what a tenant was made from and how well it does, as Markdown."""
    with Store.open(store, read_only=True) as opened:
        info, found = opened.tenants[name], opened.tenant_card(name)
    if as_json:
        print_json(info.card if found is None else found.model_dump(mode="json"))
    elif found is None:
        say(f"{name} was not trained here; --json prints what its entry says, and evaluate judges it")
    else:
        say(card_markdown(found).rstrip())


def _settings(**fields: Any) -> TrainingSettings:
    try:
        return TrainingSettings(**fields)
    except ValidationError as error:
        raise _bad_option(error) from error


def _search_space(
    settings: TrainingSettings, rates: str | None, ranks: str, steps: int | None
) -> SearchSpace:
    try:
        space = SearchSpace(
            learning_rates=None if rates is None else tuple(map(float, rates.split(","))),
            ranks=tuple(map(int, ranks.split(","))),
            budget_steps=steps,
        )
        space.candidates(settings)
    except ValidationError as error:
        raise _bad_option(error) from error
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--search-rates, --search-ranks") from error
    return space


_OPTIONS = {"max_epochs": "--epochs", "use_rslora": "--rslora", "class_weights": "--balanced"}


def _bad_option(error: ValidationError) -> typer.BadParameter:
    problem = error.errors()[0]
    field = str(problem["loc"][0]) if problem["loc"] else ""
    option = _OPTIONS.get(field, "--" + field.replace("_", "-")) if field else None
    return typer.BadParameter(problem["msg"], param_hint=option)


def _print_report(name: str, report: TrainingReport, num_bytes: int) -> None:
    splits = {"validation": report.validation}
    if report.test is not None:
        splits["test"] = report.test
    if report.teacher is not None:
        splits["teacher, validation"] = report.teacher.validation
        if report.teacher.test is not None:
            splits["teacher, test"] = report.teacher.test
    console.print(_figures(name, splits))
    chosen = (
        f"learning rate {report.settings.peak_learning_rate:g} and rank {report.settings.rank} of "
        f"{len(report.search.trials)} trials, "
        if report.search
        else ""
    )
    say(
        f"{chosen}{report.num_parameters} parameters, {format_bytes(num_bytes)}, trained in "
        f"{report.seconds:.0f} s; hmi tenant card shows everything"
    )


def _figures(name: str, splits: dict[str, Metrics]) -> Table:
    """Figures by row, splits by column."""
    table = Table("figure", *(f"{split} ({m.num_examples})" for split, m in splits.items()), title=name)
    for row in dict.fromkeys(name for metrics in splits.values() for name in metrics.values):
        table.add_row(row, *(figure(m, row) if row in m.values else "" for m in splits.values()))
    return table
