"""What the compiler made of the kernels: nothing spilled, tensor cores and asynchronous copies in use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from benchmarks.gpu.checks.program import CheckFailedError, NothingToCheckError, run_check

if TYPE_CHECKING:
    from benchmarks.gpu.platform import Platform


def check(platform: Platform) -> str:
    """The module that is built here, whether a GPU is there or not."""
    from benchmarks.gpu import compiled

    try:
        binary = compiled.compiled_module()
    except RuntimeError as reason:
        raise NothingToCheckError(f"NOT CHECKED: {reason}") from reason
    if (cuobjdump := compiled.find_cuobjdump()) is None:
        raise NothingToCheckError("NOT CHECKED: cuobjdump is neither in CUDA_HOME nor in triton's package")
    kernels = compiled.describe_kernels(cuobjdump, binary)
    if findings := [*compiled.spilled(kernels), *compiled.missing_instructions(cuobjdump, binary)]:
        raise CheckFailedError("; ".join(findings))
    architectures = sorted({kernel.architecture for kernel in kernels})
    most = max(kernel.registers for kernel in kernels)
    return (
        f"{len(kernels)} kernels for {', '.join(architectures)}: no local memory, at most {most} registers, "
        f"{', '.join(sorted(compiled.REQUIRED_INSTRUCTIONS))} in the tiles kernels"
    )


if __name__ == "__main__":
    sys.exit(run_check(check))
