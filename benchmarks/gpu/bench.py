"""How fast are the kernels on this GPU, and how near its best, beside what people use today?

``python -m benchmarks.gpu.bench`` writes ``benchmarks/results/gpu/bench.json`` within 8 minutes. With
``--dry`` the same runs on the CPU, with the emulator of the tests and Triton's interpreter, on tiny shapes
and without timing anything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from benchmarks.gpu.options import prepare_environment, read_options

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the result, and returns 1 if one of our kernels failed or was wrong, else 0."""
    options = read_options("bench", str(__doc__), argv)
    prepare_environment(is_dry=options.is_dry)
    os.environ.setdefault("HMI_TRITON_TUNE", "1")  # at their best, as the peers'
    from rich.console import Console

    from benchmarks.gpu.suite import measure

    console = Console(soft_wrap=True)
    result = measure(options, console)
    result.write(options.output)
    for failure in result.failures:
        console.print(f"FAILED {failure}", style="red")
    console.print(f"wrote {options.output}")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
