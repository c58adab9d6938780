"""``hmi demo``: the whole system on real text, with nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hmi_engine.cli.output import AsJson, console


def demo(
    directory: Annotated[
        Path, typer.Option(help="Folder for the store; it must not exist yet and is left behind.")
    ] = Path("hmi-demo"),
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the base model; default: the packaged MiniLM.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help='Folder of JSON lines {"text", "label"}, one task per file; default: docstrings.'),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Fewer tenants; under a minute.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build a store from real text, train tenants, and compare with what people use today."""
    from hmi_engine.demo.run import run_demo  # loads transformers, which no other command needs

    run_demo(directory, model=model, data=data, quick=quick, console=console, as_json=as_json)
