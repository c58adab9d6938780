"""``hmi tenant``: task knowledge."""

from __future__ import annotations

from itertools import islice
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
    print_json_list,
    progress_bars,
    say,
    warn,
)
from hmi_engine.construct.training import TrainingSettings
from hmi_engine.errors import CorpusError
from hmi_engine.interop import PROBLEM_TYPES
from hmi_engine.knowledge.catalog import ROOT_DOMAIN
from hmi_engine.knowledge.corpus_examples import stream_examples
from hmi_engine.knowledge.corpus_report import CorpusReport
from hmi_engine.knowledge.examples import Example
from hmi_engine.knowledge.sizes import format_bytes
from hmi_engine.store import Store

app = typer.Typer(help="Tenants: adapters and heads.", no_args_is_help=True)

TenantName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the tenant, such as acme/chemprot.", show_default=False)
]
DomainOption = Annotated[str, typer.Option(help="The tenant's domain.")]
ROWS_OF_TEXT = 100
ReplaceOption = Annotated[bool, typer.Option(help="Replace a tenant of this name.")]


LabelsOption = Annotated[str | None, typer.Option(help="Names of the classes, separated by commas.")]
ProblemOption = Annotated[
    str | None,
    typer.Option(
        help=f"What a sequence head's numbers mean: {', '.join(PROBLEM_TYPES)}.", show_default=False
    ),
]
DropOption = Annotated[
    bool, typer.Option(help="Leave out blocks on layers that the store looks up, instead of refusing.")
]


@app.command("import")
def import_tenant(
    store: StorePath,
    name: TenantName,
    adapter: Annotated[Path, typer.Option(help="Folder that PEFT or AdapterHub's adapters library saved.")],
    head: Annotated[
        Path | None,
        typer.Option(help="Folder where AdapterHub's save_head put a head; default: the adapter's."),
    ] = None,
    domain: DomainOption = ROOT_DOMAIN,
    labels: LabelsOption = None,
    problem_type: ProblemOption = None,
    drop_lower_layers: DropOption = False,
    replace: ReplaceOption = False,
    as_json: AsJson = False,
) -> None:
    """Add a tenant from an adapter trained elsewhere; its files tell by which library."""
    _import(store, name, adapter, head, domain, labels, problem_type, drop_lower_layers, replace, as_json)


@app.command()
def add(
    store: StorePath,
    name: TenantName,
    peft: Annotated[Path, typer.Option(help="Folder that PEFT saved: LoRA or IA3 with a classifier.")],
    domain: DomainOption = ROOT_DOMAIN,
    labels: LabelsOption = None,
    problem_type: ProblemOption = None,
    drop_lower_layers: DropOption = False,
    replace: ReplaceOption = False,
    as_json: AsJson = False,
) -> None:
    """Add a tenant from a folder that PEFT saved; the same as import."""
    _import(store, name, peft, None, domain, labels, problem_type, drop_lower_layers, replace, as_json)


def _import(
    store: Path,
    name: str,
    folder: Path,
    head: Path | None,
    domain: str,
    labels: str | None,
    problem_type: str | None,
    drop_lower_layers: bool,
    replace: bool,
    as_json: bool,
) -> None:
    with Store.open(store) as opened:
        imported = opened.import_adapter(
            folder,
            tenant=name,
            domain=domain,
            head=head,
            labels=labels.split(",") if labels else None,
            problem_type=checked_choice(problem_type, PROBLEM_TYPES, "--problem-type")
            if problem_type
            else None,
            lower_layers="drop" if drop_lower_layers else "error",
            replace=replace,
        )
        info = opened.tenants[name]
    for message in imported.warnings:
        warn(message)
    if as_json:
        print_json(_describe(info))
    else:
        say(f"{name}: {info.kind} of rank {info.rank}, {len(info.labels)} labels, {format_bytes(info.bytes)}")


@app.command("export")
def export_tenant(
    store: StorePath,
    name: TenantName,
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIRECTORY", help="Folder to write into; made if missing.", show_default=False
        ),
    ],
    folder_format: Annotated[
        str, typer.Option("--format", help="Whose folder it shall be: peft or adapterhub.")
    ] = "peft",
    with_head: Annotated[
        bool, typer.Option("--head/--no-head", help="Whether the head goes with it.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write a tenant as a folder that PEFT or AdapterHub's adapters library loads."""
    chosen = checked_choice(folder_format, ("peft", "adapterhub"), "--format")
    with Store.open(store, read_only=True) as opened:
        export = opened.export_peft if chosen == "peft" else opened.export_adapterhub
        export(name, directory, with_head=with_head)
    if as_json:
        print_json({"tenant": name, "format": chosen, "directory": str(directory)})
    else:
        say(f"wrote tenant {name} to {directory} in the format of {chosen}")


@app.command()
def train(
    store: StorePath,
    name: TenantName,
    data: Annotated[Path, typer.Option(help='JSON lines: {"text": ..., "label": ...}.')],
    test: Annotated[Path | None, typer.Option(help="Held-out JSON lines to report on.")] = None,
    domain: DomainOption = ROOT_DOMAIN,
    kind: Annotated[str, typer.Option(help="bottleneck or lora.")] = "bottleneck",
    rank: Annotated[int, typer.Option(min=1, help="Width of the adapter.")] = 16,
    epochs: Annotated[int, typer.Option(min=1, help="Most passes over the data.")] = 10,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; default: the kind's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=3, help="Longer texts are cut.")] = 128,
    miss: Annotated[
        str, typer.Option(help="Policy that it will be served with: backoff or exact.")
    ] = "backoff",
    seed: Annotated[int, typer.Option(help="The same seed gives the same tenant.")] = 0,
    text_field: Annotated[str, typer.Option(help="Field of the text.")] = "text",
    label_field: Annotated[str, typer.Option(help="Field of the label.")] = "label",
    replace: ReplaceOption = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter and a head on labelled texts; the base stays as it is."""
    settings = _settings(
        kind=kind,
        rank=rank,
        max_epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_tokens=max_tokens,
        miss=miss,
        seed=seed,
    )
    examples = _read_examples(data, text_field, label_field)
    test_examples = _read_examples(test, text_field, label_field) if test else []
    with Store.open(store) as opened, progress_bars() as progress:
        trained = opened.train_tenant(
            name,
            examples,
            domain=domain,
            test_examples=test_examples,
            settings=settings,
            replace=replace,
            progress=progress,
        )
        info = opened.tenants[name]
    if as_json:
        print_json(trained.report.model_dump(mode="json") | {"bytes": info.bytes})
        return
    _print_report(name, trained.report, info.bytes)


def _settings(**fields: Any) -> TrainingSettings:
    try:
        return TrainingSettings(**fields)
    except ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][0]).replace("max_epochs", "epochs").replace("_", "-")
        raise typer.BadParameter(problem["msg"], param_hint=option) from error


def _read_examples(path: Path, text_field: str, label_field: str) -> list[Example]:
    report = CorpusReport()
    examples = list(stream_examples(path, text_field, label_field, report=report))
    for bad in report.bad_lines[:5]:
        warn(f"left out: {bad}")
    if not examples:
        raise CorpusError(
            f'{path} holds no example; each line is {{"{text_field}": ..., "{label_field}": ...}}'
        )
    return examples


def _print_report(name: str, report: Any, num_bytes: int) -> None:
    table = Table("split", "texts", "accuracy", "macro-F1", "majority class", title=name)
    for split, scores in (("validation", report.validation), ("test", report.test)):
        if scores is not None:
            table.add_row(
                split,
                str(scores.num_examples),
                f"{scores.accuracy:.1%}",
                f"{scores.macro_f1:.1%}",
                f"{scores.majority_accuracy:.1%}",
            )
    console.print(table)
    console.print(
        f"{report.num_parameters} parameters, {format_bytes(num_bytes)}, trained in {report.seconds:.0f} s",
        markup=False,
        highlight=False,
    )


@app.command("list")
def list_tenants(
    store: StorePath,
    prefix: Annotated[str, typer.Option(help="Only names that begin like this, such as acme/.")] = "",
    pinned: Annotated[bool, typer.Option("--pinned", help="Only pinned tenants.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"Most rows; default {ROWS_OF_TEXT}, with --json all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List tenants by name."""
    with Store.open(store, read_only=True) as opened:
        if pinned:
            chosen = [info for info in opened.tenants.pinned() if info.name.startswith(prefix)]
            count, infos = len(chosen), iter(chosen)
        else:
            count, infos = opened.tenants.count(prefix), opened.tenants.iterate_infos(prefix)
        if as_json:
            print_json_list(map(_describe, islice(infos, limit)))
            return
        limit = limit or ROWS_OF_TEXT
        table = Table("tenant", "domain", "adapter", "rank", "head", "labels", "bytes", "pinned")
        for info in islice(infos, limit):
            table.add_row(
                info.name,
                info.domain,
                info.kind,
                str(info.rank),
                info.head_kind,
                str(len(info.labels)),
                format_bytes(info.bytes),
                "yes" if info.pinned else "",
            )
    console.print(table)
    if count > limit:
        console.print(f"{count - limit} more; --limit shows them, --json lists all", highlight=False)


@app.command()
def pin(
    store: StorePath,
    name: TenantName,
    off: Annotated[bool, typer.Option("--off", help="Let engines evict it again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Keep a tenant in the memory of every engine of the store."""
    with Store.open(store) as opened:
        info = opened.unpin_tenant(name) if off else opened.pin_tenant(name)
    if as_json:
        print_json(_describe(info))
    else:
        say(
            f"{name} is pinned: engines keep its {format_bytes(info.bytes)}"
            if info.pinned
            else f"{name} is not pinned"
        )


@app.command()
def remove(store: StorePath, name: TenantName, as_json: AsJson = False) -> None:
    """Remove a tenant."""
    with Store.open(store) as opened:
        opened.remove_tenant(name)
    if as_json:
        print_json({"removed": name})
    else:
        console.print(f"removed tenant {name}", markup=False, highlight=False)


def _describe(info: Any) -> dict[str, Any]:
    described: dict[str, Any] = info.model_dump(mode="json", exclude={"id", "domain_id", "file"})
    return described
