"""Options of commands that read a corpus."""

from __future__ import annotations

from typing import Annotated

import typer

from hmi_engine.cli.output import checked_choice
from hmi_engine.knowledge.corpus import TextFormat

__all__ = ["StdinFormat", "checked_stdin_format"]

_STDIN_FORMATS: tuple[TextFormat, ...] = ("txt", "jsonl")

StdinFormat = Annotated[str, typer.Option(help="What standard input is: txt or jsonl.")]


def checked_stdin_format(value: str) -> TextFormat:
    """The format that was named; raises typer.BadParameter if it is none of standard input."""
    return checked_choice(value, _STDIN_FORMATS, "--stdin-format")
