"""``hmi domain``: the domain knowledge tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from hmi_engine.cli.corpus_options import StdinFormat, checked_stdin_format
from hmi_engine.cli.domain_tree_view import describe_domain, domain_tree
from hmi_engine.cli.output import (
    AsJson,
    StorePath,
    checked_choice,
    console,
    print_json,
    progress_bars,
    say,
    warn_of_reading,
)
from hmi_engine.domain_store import DomainUpdate
from hmi_engine.errors import UnsupportedModelError
from hmi_engine.knowledge.catalog import ROOT_DOMAIN
from hmi_engine.knowledge.corpus import stream_texts
from hmi_engine.knowledge.corpus_report import CorpusReport
from hmi_engine.knowledge.frequencies import DEFAULT_HALF_LIFE_TOKENS
from hmi_engine.knowledge.records import DomainInfo
from hmi_engine.knowledge.row_formats import ROW_FORMATS
from hmi_engine.knowledge.sizes import format_bytes
from hmi_engine.memory.coverage import Coverage, measure_coverage
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.store import Store

app = typer.Typer(help="Domains: n-gram tables built from text.", no_args_is_help=True)

_CORPUS_HELP = (
    "File (.txt: one text per line, .jsonl, also .gz and .zst, .parquet), folder of files, or - for standard "
    "input; more of them may follow."
)

DomainName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the domain.", show_default=False)]
MoreFiles = Annotated[
    list[Path] | None,
    # So that a shell's *.txt works behind --corpus, which by itself takes one value.
    typer.Argument(metavar="[FILE]...", help="More files of the corpus.", show_default=False),
]
TextField = Annotated[
    str, typer.Option(help="Field of the text in JSON lines, column of it in Parquet files.")
]


def _checked_positive(value: float) -> float:
    """Refuses what is not above 0; a range lets NaN pass."""
    if not value > 0:
        raise typer.BadParameter(f"{value} is not above 0")
    return value


@app.command()
def add(
    store: StorePath,
    name: DomainName,
    corpus: Annotated[list[Path], typer.Option(help=_CORPUS_HELP)],
    more_files: MoreFiles = None,
    parent: Annotated[str, typer.Option(help="Parent domain.")] = ROOT_DOMAIN,
    plot_bytes: Annotated[str, typer.Option(help="Budget of the table, such as 256MiB.")] = "256MiB",
    min_count: Annotated[int, typer.Option(min=1, help="Leave out n-grams seen less often.")] = 2,
    row_format: Annotated[
        str | None,
        typer.Option(help=f"How rows are stored: {', '.join(ROW_FORMATS)}; default: floats of the store."),
    ] = None,
    text_field: TextField = "text",
    stdin_format: StdinFormat = "txt",
    count_memory: Annotated[str, typer.Option(help="Memory for counts; the rest goes to files.")] = "1GiB",
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for those files; default: the system's.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Ray cluster that counts and computes: host:port, auto, or local."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a domain from text: count its n-grams and precompute the most frequent.

    An addition that was interrupted goes on where it was when it is asked for again.
    """
    with Store.open(store) as opened, progress_bars() as progress:
        report = opened.add_domain(
            name,
            [*corpus, *(more_files or ())],
            parent=parent,
            plot_bytes=plot_bytes,
            min_count=min_count,
            row_format=checked_choice(row_format, ROW_FORMATS, "--row-format") if row_format else None,
            text_field=text_field,
            stdin_format=checked_stdin_format(stdin_format),
            count_memory=count_memory,
            scratch=scratch,
            ray=ray,
            progress=progress,
        )
        info = opened.domains[name]
    warn_of_reading(report)
    if as_json:
        print_json(describe_domain(info) | _describe_report(report))
        return
    say(
        f"{name}: {report.texts} texts, {info.corpus_tokens} tokens, {info.rows} n-grams kept "
        f"({format_bytes(info.bytes)}); they are {info.card['hit_mass']:.0%} of the corpus' own n-grams"
    )


@app.command()
def update(
    store: StorePath,
    name: DomainName,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help=f"New text; default: the traffic that engines saw. {_CORPUS_HELP}"),
    ] = None,
    more_files: MoreFiles = None,
    plot_bytes: Annotated[str | None, typer.Option(help="New budget; default: the present one.")] = None,
    half_life_tokens: Annotated[
        float,
        typer.Option(
            callback=_checked_positive, help="Tokens of traffic after which earlier counts weigh half."
        ),
    ] = DEFAULT_HALF_LIFE_TOKENS,
    max_promotions: Annotated[
        int | None, typer.Option(min=0, help="Most n-grams of each table that get a row this time.")
    ] = None,
    max_share: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1.0,
            callback=_checked_positive,
            help="Share of the time that computing rows may take.",
        ),
    ] = 1.0,
    text_field: TextField = "text",
    stdin_format: StdinFormat = "txt",
    as_json: AsJson = False,
) -> None:
    """Bring a domain's table up to date with new text, or with the traffic that engines saw.

    Engines keep serving meanwhile, and use the new table from their next batch on.
    """
    with Store.open(store) as opened, progress_bars() as progress:
        before = opened.domains[name].generation
        done = opened.update_domain(
            name,
            [*(corpus or ()), *(more_files or ())] or None,
            plot_bytes=plot_bytes,
            half_life_tokens=half_life_tokens,
            max_promotions=max_promotions,
            max_share=max_share,
            text_field=text_field,
            stdin_format=checked_stdin_format(stdin_format),
            progress=progress,
        )
        info = opened.domains[name]
    warn_of_reading(done.corpus)
    if as_json:
        print_json(
            describe_domain(info)
            | {"promoted": done.promoted, "demoted": done.demoted, "traffic_tokens": done.traffic_tokens}
            | _describe_report(done.corpus)
        )
        return
    say(_told_update(name, done, before, from_traffic=not (corpus or more_files)))


def _told_update(name: str, done: DomainUpdate, before: int, *, from_traffic: bool) -> str:
    source = f"{done.traffic_tokens} tokens of traffic" if from_traffic else f"{done.corpus.texts} texts"
    changed = f"generation {done.generation}" if done.generation != before else "the table stays as it was"
    return (
        f"{name}: {source} taken in; {done.promoted} n-grams got a row, {done.demoted} lost theirs, "
        f"{done.rows} have one; {changed}"
    )


@app.command()
def move(
    store: StorePath,
    name: DomainName,
    parent: Annotated[str, typer.Option(help="The new parent.")],
    as_json: AsJson = False,
) -> None:
    """Put a domain, with all below it, under another parent."""
    with Store.open(store) as opened, progress_bars() as progress:
        opened.move_domain(name, parent, progress=progress)
        info = opened.domains[name]
    if as_json:
        print_json(describe_domain(info))
    else:
        say(f"moved domain {name} under {parent}: {info.rows} n-grams of its own")


@app.command()
def layers(
    store: StorePath,
    name: DomainName,
    file: Annotated[
        Path | None,
        typer.Argument(help="safetensors file with layers 0 to K-1 under transformers' names."),
    ] = None,
    inherit: Annotated[bool, typer.Option("--inherit", help="Use the parent's layers again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a domain its own domain layers, or its parent's again; its rows are computed anew."""
    if inherit == (file is not None):
        raise typer.BadParameter("give either a file or --inherit", param_hint="FILE")
    with Store.open(store) as opened, progress_bars() as progress:
        opened.set_domain_layers(name, file, progress=progress)
        info = opened.domains[name]
    if as_json:
        print_json(describe_domain(info))
    else:
        origin = "its own domain layers" if info.layers is not None else "its parent's domain layers"
        say(f"{name}: {origin}, {info.rows} n-grams")


@app.command()
def show(
    store: StorePath,
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="Show this domain and those below it.", show_default=False)
    ] = ROOT_DOMAIN,
    sample: Annotated[
        list[Path] | None,
        typer.Option(help=f"Text to look up: how many of its windows have a row. {_CORPUS_HELP}"),
    ] = None,
    text_field: TextField = "text",
    stdin_format: StdinFormat = "txt",
    as_json: AsJson = False,
) -> None:
    """Print the tree: rows, bytes, budget, format, waiting traffic, and coverage of a sample."""
    with Store.open(store, read_only=True) as opened:
        infos = _subtree(opened, name)
        waiting = _waiting_tokens(opened)
        coverage: dict[str, Coverage] = {}
        if sample:
            kind = checked_stdin_format(stdin_format)
            coverage = _coverage(opened, infos, sample, text_field, kind)
    if as_json:
        print_json([_describe_shown(info, waiting, coverage) for info in infos])
    else:
        console.print(domain_tree(infos, waiting, coverage))


def _subtree(store: Store, name: str) -> list[DomainInfo]:
    """The domain and all below it, each after its parent."""
    children: dict[str | None, list[DomainInfo]] = {}
    for info in store.domains.values():
        children.setdefault(info.parent, []).append(info)
    found = [store.domains[name]]
    for info in found:  # grows while it is walked
        found.extend(children.get(info.name, ()))
    return found


def _waiting_tokens(store: Store) -> dict[str, int]:
    names = {info.id: info.name for info in store.domains.values()}
    tokens: dict[str, int] = {}
    for file in store.catalog.traffic_files():
        if file.domain_id in names:
            name = names[file.domain_id]
            tokens[name] = tokens.get(name, 0) + file.tokens
    return tokens


def _coverage(
    store: Store,
    infos: list[DomainInfo],
    sample: list[Path],
    text_field: str,
    stdin_format: Literal["txt", "jsonl"],
) -> dict[str, Coverage]:
    if not store.general.plot_layers:
        raise UnsupportedModelError(
            f"{store.layout.root} computes all layers (plot_layers=0): nothing is looked up, so a sample "
            "has no coverage"
        )
    if store.general.is_causal:
        raise UnsupportedModelError(
            f"{store.layout.root} is a store of decoders: samples are looked up for encoders alone; an "
            "engine's stats() tell how many windows its requests found"
        )
    report = CorpusReport()
    texts = stream_texts(sample, text_field=text_field, stdin_format=stdin_format, report=report)
    plots = PlotLibrary(store.layout, store.catalog, store.general, overlay_bytes=0)
    names = [info.name for info in infos]
    measured = measure_coverage(plots, store.encoder, names, texts, window=store.general.window)
    plots.close()
    warn_of_reading(report)
    return measured


def _describe_shown(
    info: DomainInfo, waiting: dict[str, int], coverage: dict[str, Coverage]
) -> dict[str, object]:
    described: dict[str, object] = describe_domain(info) | {"waiting_tokens": waiting.get(info.name, 0)}
    if info.name in coverage:
        measured = coverage[info.name]
        described["sample"] = vars(measured) | {"share": measured.share}
    return described


@app.command("list")
def list_domains(store: StorePath, as_json: AsJson = False) -> None:
    """Print all domains in a table."""
    with Store.open(store, read_only=True) as opened:
        infos = list(opened.domains.values())
    if as_json:
        print_json([describe_domain(info) for info in infos])
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
        say(f"removed domain {name}")


def _describe_report(report: CorpusReport) -> dict[str, int]:
    return {
        "texts": report.texts,
        "bad_lines": report.num_bad_lines,
        "replaced_lines": report.num_replaced,
    }
