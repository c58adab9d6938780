"""``hmi init``, ``hmi verify`` and ``hmi gc``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Literal, cast

import typer
from rich.table import Table

from hmi_engine.cli.output import AsJson, StorePath, cell, console, print_json, progress_bars, say
from hmi_engine.demo.base_model import packaged_distillation, packaged_model
from hmi_engine.knowledge.sizes import format_bytes
from hmi_engine.knowledge.verification import Problem
from hmi_engine.store import Store


def init(
    store: StorePath,
    general: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a BERT or GPT-2-class model, or folder of a distilled one.",
            show_default=False,
        ),
    ] = None,
    packaged: Annotated[
        bool,
        typer.Option(
            "--packaged",
            help="Instead of --general: the MiniLM of hmi[demo], in the distilled form for --plot-layers.",
        ),
    ] = False,
    distilled: Annotated[
        Path | None,
        typer.Option(
            help="File that hmi distill --compact wrote: what to change of the model.", show_default=False
        ),
    ] = None,
    plot_layers: Annotated[
        int | None,
        typer.Option(
            help="How many of the lowest layers are looked up; default: as distilled, else half of them.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=3,
            help="Width of the n-gram windows; default: as distilled, else 2 (decoders: 3).",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a store around a base model."""
    if packaged:
        if general is not None or distilled is not None:
            raise typer.BadParameter(
                "brings its own model: leave out --general and --distilled", param_hint="--packaged"
            )
        general, distilled = _packaged_base(plot_layers)
    elif general is None:
        raise typer.BadParameter("name the base model, or take the one of --packaged", param_hint="--general")
    with (
        progress_bars() as progress,
        Store.create(
            store,
            general=general,
            distilled=distilled,
            plot_layers=plot_layers,
            window=cast("Literal[2, 3] | None", window),
            progress=progress,
        ) as created,
    ):
        info = created.general
    if as_json:
        print_json({"store": str(store), "general": info.model_dump()})
        return
    console.print(
        f"{store}: {info.num_layers} layers of width {info.hidden_size}, the lowest {info.plot_layers} "
        f"looked up by windows of {info.window} tokens.\nNext: hmi domain add {store} NAME --corpus FILE...",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _packaged_base(plot_layers: int | None) -> tuple[str, Path | None]:
    """The packaged model, and what makes its distilled form; with K = 0 it stays as it is."""
    model = str(packaged_model())
    if plot_layers == 0:
        return model, None
    return model, packaged_distillation() if plot_layers is None else packaged_distillation(plot_layers)


def _num_bytes(path: Path) -> int:
    """Of a file; 0 for a folder, and for a file that somebody removes just now."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size if S_ISREG(found.st_mode) else 0


def verify(
    store: StorePath,
    quick: Annotated[bool, typer.Option(help="Check presence, sizes, headers and indexes only.")] = False,
    repair: Annotated[bool, typer.Option(help="Set right what can be; says what it did.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check every file of a store; exit code 1 if something is wrong."""
    with Store.open(store, read_only=not repair) as opened, progress_bars() as progress:
        problems = opened.verify(deep=not quick, progress=progress)
        repaired = opened.repair(problems) if repair else []
        left = opened.verify(deep=not quick, progress=progress) if repaired else problems
        total = sum(map(_num_bytes, opened.layout.root.rglob("*")))
    if as_json:
        findings = {
            "problems": [problem._asdict() for problem in left],
            "repaired": [done._asdict() for done in repaired],
        }
        print_json(findings | {"bytes": total})
    else:
        for done in repaired:
            say(done.message)
        _print_problems(store, left, total)
    if left:
        raise typer.Exit(1)


def gc(store: StorePath, as_json: AsJson = False) -> None:
    """Remove files that belong to nobody, as crashes leave them; reads none of them."""
    with Store.open(store) as opened, progress_bars() as progress:
        removed = opened.collect_garbage(progress=progress)
    if as_json:
        print_json({"removed": [str(done.path) for done in removed]})
    else:
        say(f"{store}: removed {len(removed)} files that belonged to nobody")


def _print_problems(store: Path, problems: Sequence[Problem], total: int) -> None:
    if not problems:
        say(f"{store}: sound, {format_bytes(total)}")
        return
    table = Table("problem", "file", "what to do")
    for problem in problems:
        advice = f"hmi verify {store} --repair" if problem.repairable else "see the message"
        table.add_row(problem.kind, cell(problem.message), cell(advice))
    console.print(table)
