"""Are the kernels right on this GPU? ``python -m benchmarks.gpu.check`` answers within 8 minutes.

Every step is a program of its own with a limit of its own; a few run at a time. The answers go into
``benchmarks/results/gpu/check.json``. With ``--dry`` the same runs on the CPU, with the emulator of the
tests; ``--quick`` leaves most steps out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.gpu.options import prepare_environment, read_options

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, writes the result, and returns 1 if a step failed, else 0."""
    options = read_options("check", str(__doc__), argv)
    prepare_environment(is_dry=options.is_dry)
    from rich.console import Console

    from benchmarks.gpu.check_suite import check

    console = Console(soft_wrap=True)
    result = check(options, console)
    result.write(options.output)
    if skipped := [step.name for step in result.steps if step.outcome == "skipped"]:
        console.print(f"NOT CHECKED: {', '.join(skipped)}", style="yellow")
    console.print(f"wrote {options.output}")
    return int(any(step.outcome == "failed" for step in result.steps))


if __name__ == "__main__":
    sys.exit(main())
