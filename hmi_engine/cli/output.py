"""What the commands share: consoles, JSON, progress bars, and how an error is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from hmi_engine.errors import HmiError
from hmi_engine.knowledge.corpus_report import CorpusReport
from hmi_engine.printable import printable

__all__ = [
    "AsJson",
    "ProgressReport",
    "StorePath",
    "cell",
    "checked_choice",
    "console",
    "fail",
    "print_json",
    "print_json_list",
    "progress_bars",
    "say",
    "warn",
    "warn_of_reading",
]

Choice = TypeVar("Choice", bound=str)
_FEW_LINES = 5

console = Console()


class ProgressReport(Protocol):
    """Takes the progress of any long work; metrics, where there are some, stand beside the bar."""

    def __call__(
        self, stage: str, done: int, total: int | None, metrics: dict[str, float] | None = None
    ) -> None:
        """Shows how far a stage is."""


_messages = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.", show_default=False)]


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_json_list(values: Iterable[Any]) -> None:
    """A JSON list on standard output, each value as soon as it is there; ``print_json`` prints the same."""
    separator, end = "[\n  ", "[]\n"
    for value in values:
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        sys.stdout.write(separator + text.replace("\n", "\n  "))
        separator, end = ",\n  ", "\n]\n"
    sys.stdout.write(end)


def say(message: str) -> None:
    """One line on standard output; what a terminal would obey is written out."""
    console.print(printable(message), markup=False, highlight=False, soft_wrap=True)


def cell(text: str) -> Text:
    """A cell of a table: the text as it is, without markup, and what a terminal would obey written out."""
    return Text(printable(text))


def checked_choice(value: str, choices: Sequence[Choice], option: str) -> Choice:
    """Returns the choice that was typed.

    Raises:
        typer.BadParameter: it is none of the choices.
    """
    for choice in choices:
        if choice == value:
            return choice
    raise typer.BadParameter(f"must be one of {', '.join(choices)}", param_hint=option)


def warn(message: str) -> None:
    """One line on standard error, as :func:`say` prints it."""
    _messages.print(printable(message), style="yellow", markup=False, highlight=False, soft_wrap=True)


def warn_of_reading(report: CorpusReport, whose: str = "") -> None:
    """Tells of lines that were left out, and of bytes that are no UTF-8; ``whose`` stands before."""
    for bad in report.bad_lines[:_FEW_LINES]:
        warn(f"{whose}left out: {bad}")
    if report.num_bad_lines > _FEW_LINES:
        warn(f"{whose}left out {report.num_bad_lines} lines in all")
    if report.num_replaced:
        warn(f"{whose}{report.num_replaced} lines had bytes that are no UTF-8; U+FFFD stands in their place")


def fail(error: HmiError) -> NoReturn:
    """Says on one line of standard error what was wrong, and exits with 2."""
    message = printable(" ".join(str(error).split()))
    _messages.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


@contextmanager
def progress_bars() -> Iterator[ProgressReport]:
    """Progress bars on standard error, one per stage."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=_messages) as bars:

        def report(stage: str, done: int, total: int | None, metrics: dict[str, float] | None = None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            described = "".join(f"  {name} {value:.3f}" for name, value in (metrics or {}).items())
            bars.update(tasks[stage], completed=done, total=total, description=stage + described)

        yield report
