"""One function with every op under ``torch.compile(fullgraph=True)``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.gpu.checks.program import CheckFailedError, faults_raised, run_check

if TYPE_CHECKING:
    from benchmarks.gpu.platform import Platform

DTYPE = torch.float16
SEEDS = (1, 2)


def check(platform: Platform) -> str:
    """Compiles by inductor, in dry runs by ``aot_eager``, and compares with the function as it is."""
    from benchmarks.gpu.op_cases import op_cases

    compiler = "aot_eager" if platform.is_dry else "inductor"
    cases = op_cases(platform.device, (DTYPE,))

    def every_op() -> list[Tensor]:
        # Something for the compiler to do between the ops.
        return [case.run() * 2 for case in cases]

    compiled = torch.compile(every_op, fullgraph=True, backend=compiler)
    with platform.backend("cuda"), faults_raised(platform):
        for seed in SEEDS:
            for case in cases:
                case.refill(seed)
            expected = every_op()
            for case, one, other in zip(cases, compiled(), expected, strict=True):
                if not torch.equal(one, other):
                    raise CheckFailedError(f"{case.name}: compiled by {compiler} it gives another result")
    return f"{len(cases)} calls in one function, compiled by {compiler}, equal to eager"


if __name__ == "__main__":
    sys.exit(run_check(check))
