"""How many tokens a second does a decoder generate on this GPU, beside transformers with PEFT?

``python -m benchmarks.gpu.generation`` writes ``benchmarks/results/gpu/generation.json``, of a model of the
shape of GPT-2: 32 requests of as many tenants, then throughput and time per token against concurrency.
``--dry`` runs the same on the CPU with a tiny model, and its times mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.gpu.options import prepare_environment, read_options

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes the result; returns 0."""
    options = read_options("generation", str(__doc__), argv)
    prepare_environment(is_dry=options.is_dry)
    from rich.console import Console

    from benchmarks.gpu.generation_suite import measure

    console = Console(soft_wrap=True)
    result = measure(options, console)
    result.write(options.output)
    for line in result.ratio_lines():
        console.print(line, highlight=False)
    console.print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
