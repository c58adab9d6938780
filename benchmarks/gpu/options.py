"""What check and bench take on the command line; this module imports neither torch nor triton."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.recorded_command import recorded_command

__all__ = ["RESULTS", "ROOT", "Options", "prepare_environment", "read_options"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("benchmarks") / "results" / "gpu"
DRY_RESULTS = Path("build") / "gpu"
SECONDS = 7 * 60


@dataclass(frozen=True)
class Options:
    """The options.

    Attributes:
        output: where the JSON goes.
        is_dry: on the CPU, without measuring.
        is_quick: few shapes and repetitions.
        seconds: what would begin later is left out.
        command: how to repeat the run.
    """

    output: Path
    is_dry: bool
    is_quick: bool
    seconds: float
    command: str


def read_options(name: str, description: str, argv: Sequence[str] | None) -> Options:
    """Reads the options of ``python -m benchmarks.gpu.<name>``; dry results go below ``build``."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{name}", description=description)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--dry", action="store_true", help="on the CPU by emulator and interpreter")
    parser.add_argument("--quick", action="store_true", help="the least that still runs everything")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="begin nothing after so long (%(default)s)"
    )
    options = parser.parse_args(argv)
    default = (DRY_RESULTS if options.dry else RESULTS) / f"{name}.json"
    command = recorded_command(f"gpu.{name}", argv)
    return Options(options.output or default, options.dry, options.quick, options.seconds, command)


def prepare_environment(*, is_dry: bool) -> None:
    """Makes dry runs interpret Triton's kernels. Must come before triton is imported, which torch may do."""
    if not is_dry:
        return
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("triton is imported already: set TRITON_INTERPRET=1 before the program starts")
    os.environ["TRITON_INTERPRET"] = "1"
    tests = str(ROOT / "tests")  # the emulator is a part of the tests
    if tests not in sys.path:
        sys.path.insert(0, tests)
