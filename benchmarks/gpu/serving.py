"""How fast is a whole engine on this GPU, from text to answers, beside what people use today?

``python -m benchmarks.gpu.serving`` writes ``benchmarks/results/gpu/serving.json``: texts/s of 32 tenants
mixed on a base of BERT-base's shape, of 1,024 tenants, and what the pipeline hides where all are cold.
``--dry`` runs the same on the CPU with a tiny base, and its times mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.gpu.options import prepare_environment, read_options

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes the result; returns 0."""
    options = read_options("serving", str(__doc__), argv)
    prepare_environment(is_dry=options.is_dry)
    from rich.console import Console

    from benchmarks.gpu.serving_suite import measure

    console = Console(soft_wrap=True)
    result = measure(options, console)
    result.write(options.output)
    for line in (*result.ratio_lines(), *map(str, result.quantities)):
        console.print(line, highlight=False)
    console.print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
