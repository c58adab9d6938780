"""``hmi domain``: the domain knowledge tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from hmi_engine.cli.output import AsJson, StorePath, console, print_json, progress_bars, warn
from hmi_engine.knowledge.catalog import ROOT_DOMAIN
from hmi_engine.knowledge.sizes import format_bytes
from hmi_engine.store import Store

app = typer.Typer(help="Domains: n-gram tables built from text.", no_args_is_help=True)

DomainName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the domain.", show_default=False)]


@app.command()
def add(
    store: StorePath,
    name: DomainName,
    corpus: Annotated[
        list[Path],
        typer.Option(help="File (.txt: one text per line, .jsonl, also .gz) or folder of files; repeatable."),
    ],
    parent: Annotated[str, typer.Option(help="Parent domain.")] = ROOT_DOMAIN,
    plot_bytes: Annotated[str, typer.Option(help="Budget of the table, such as 256MiB.")] = "256MiB",
    min_count: Annotated[int, typer.Option(min=1, help="Leave out n-grams seen less often.")] = 2,
    text_field: Annotated[str, typer.Option(help="Field of the text in JSON lines.")] = "text",
    as_json: AsJson = False,
) -> None:
    """Add a domain from text: count its n-grams and precompute the most frequent."""
    with Store.open(store) as opened, progress_bars() as progress:
        report = opened.add_domain(
            name,
            corpus,
            parent=parent,
            plot_bytes=plot_bytes,
            min_count=min_count,
            text_field=text_field,
            progress=progress,
        )
        info = opened.domains[name]
    for bad in report.bad_lines[:5]:
        warn(f"left out: {bad}")
    if report.num_bad_lines > len(report.bad_lines[:5]):
        warn(f"left out {report.num_bad_lines} lines in all")
    if as_json:
        print_json(_describe(info) | {"texts": report.texts, "bad_lines": report.num_bad_lines})
        return
    console.print(
        f"{name}: {report.texts} texts, {info.corpus_tokens} tokens, {info.rows} n-grams kept "
        f"({format_bytes(info.bytes)}); they are {info.card['hit_mass']:.0%} of the corpus' own n-grams",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command("list")
def list_domains(store: StorePath, as_json: AsJson = False) -> None:
    """Print the domain knowledge tree."""
    with Store.open(store, read_only=True) as opened:
        infos = list(opened.domains.values())
    if as_json:
        print_json([_describe(info) for info in infos])
        return
    table = Table("domain", "parent", "n-grams", "bytes", "corpus tokens", "seen at least")
    for info in infos:
        table.add_row(
            info.name,
            info.parent or "",
            str(info.rows),
            format_bytes(info.bytes),
            str(info.corpus_tokens),
            str(info.admission_count),
        )
    console.print(table)


@app.command()
def remove(store: StorePath, name: DomainName, as_json: AsJson = False) -> None:
    """Remove a domain that has no tenants and no children."""
    with Store.open(store) as opened:
        opened.remove_domain(name)
    if as_json:
        print_json({"removed": name})
    else:
        console.print(f"removed domain {name}", markup=False, highlight=False)


def _describe(info: Any) -> dict[str, Any]:
    described: dict[str, Any] = info.model_dump(mode="json", exclude={"id", "parent_id", "file"})
    return described
