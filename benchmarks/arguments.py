"""What all benchmarks take on the command line, and the text they run on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.recorded_command import recorded_command
from hmi_engine.demo.tasks import DemoData, documentation_data, folder_data

__all__ = ["Arguments", "read_arguments", "read_texts"]

RESULTS = Path("benchmarks") / "results"
UNLIMITED = 10**9


@dataclass(frozen=True)
class Arguments:
    """The common options.

    Attributes:
        data: folder of JSON lines, or None for the installed documentation.
        out: where the result goes.
        quick: small sizes, to prove that everything runs.
        command: how to repeat the run.
    """

    data: Path | None
    out: Path
    quick: bool
    command: str


def read_arguments(name: str, description: str, argv: Sequence[str] | None) -> Arguments:
    """Reads the options of ``python -m benchmarks.<name>``."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument(
        "--data", type=Path, help='folder of JSON lines {"text", "label"}; default: installed documentation'
    )
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="small sizes: proves that it runs, nothing else")
    options = parser.parse_args(argv)
    return Arguments(options.data, options.out, options.quick, recorded_command(name, argv))


def read_texts(arguments: Arguments, *, max_words: int) -> DemoData:
    """The benchmark's text: all of it, or with ``--quick`` two topics."""
    if arguments.data is not None:
        data, _ = folder_data(arguments.data, max_train=UNLIMITED, max_test=UNLIMITED)
        return data
    if arguments.quick:
        return documentation_data(num_topics=2, background_words=0, max_words=max_words)
    return documentation_data(max_train=UNLIMITED, max_test=UNLIMITED, max_words=max_words)
