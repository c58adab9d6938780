"""``hmi tenant``: task knowledge."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from hmi_engine.cli.joint_training_command import train_many
from hmi_engine.cli.output import (
    AsJson,
    StorePath,
    checked_choice,
    console,
    print_json,
    print_json_list,
    say,
    warn,
)
from hmi_engine.cli.tenant_options import DomainOption, ReplaceOption, TenantName
from hmi_engine.cli.training_commands import card, evaluate, train
from hmi_engine.interop import PROBLEM_TYPES
from hmi_engine.knowledge.catalog import ROOT_DOMAIN
from hmi_engine.knowledge.sizes import format_bytes
from hmi_engine.store import Store

app = typer.Typer(help="Tenants: adapters and heads.", no_args_is_help=True)
app.command("train-many")(train_many)

ROWS_OF_TEXT = 100
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


app.command()(train)
app.command()(evaluate)
app.command()(card)


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
