"""The ``hmi`` command: one module per group of commands, Typer for arguments, Rich for what people read."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hmi_engine import __version__
from hmi_engine.cli import (
    demo_command,
    distill_command,
    doctor_command,
    domain_commands,
    run_command,
    store_commands,
    tenant_commands,
)
from hmi_engine.cli.output import fail, say
from hmi_engine.errors import HmiError

__all__ = ["app", "main"]

app = typer.Typer(
    name="hmi",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"hmi {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Serve thousands of fine-tuned transformer models from one machine."""


app.command("demo")(demo_command.demo)
app.command("init")(store_commands.init)
app.command("distill")(distill_command.distill)
app.add_typer(domain_commands.app, name="domain")
app.add_typer(tenant_commands.app, name="tenant")
app.command("run")(run_command.run)
app.command("verify")(store_commands.verify)
app.command("gc")(store_commands.gc)
app.command("doctor")(doctor_command.doctor)


def main() -> None:
    """Runs the command line; a user's error is one clear line on standard error and exit code 2."""
    try:
        app()
    except HmiError as error:
        fail(error)
    except BrokenPipeError:  # the reader of our output has gone, as in `hmi run ... | head`
        sys.stderr.close()
        sys.exit(141)
