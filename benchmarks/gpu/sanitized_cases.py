"""Calls every CUDA kernel once, on inputs with hazards: what compute-sanitizer watches.

``python -m benchmarks.gpu.sanitized_cases`` calls them on the GPU; with ``--emulated race`` or ``sanitize``
on the emulator of the tests, which watches by itself (``sanitize`` needs a process that AddressSanitizer
was loaded into, see ``run_sanitized`` in ``tests/emulator/harness.py``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.gpu.options import prepare_environment

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Calls them all; what is wrong is told by whoever watches, or raised. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emulated", choices=("race", "sanitize"), help="the emulator's variant")
    variant = parser.parse_args(argv).emulated
    prepare_environment(is_dry=variant is not None)
    import torch

    from benchmarks.gpu.checks.program import faults_raised
    from benchmarks.gpu.op_cases import op_cases
    from benchmarks.gpu.platform import choose_platform

    platform = choose_platform(is_dry=variant is not None, variant=variant or "plain")
    with platform.backend("cuda"), faults_raised(platform):
        cases = op_cases(platform.device, (torch.float16, torch.bfloat16))
        for case in cases:
            case.run()
        _gather(platform.new_stream(), platform.device_bytes(1000))
    print(f"{len(cases) + 1} calls")
    return 0


def _gather(stream: object, target: object) -> None:
    """The kernel that copies pieces out of page-locked memory: odd sizes, odd places."""
    import torch

    from hmi_kernels import PinnedPool, copy_batch_async

    assert isinstance(target, torch.Tensor)
    with PinnedPool(1 << 20) as pool:
        source = pool.empty(1000, torch.uint8).fill_(7)
        pieces = [slice(0, 1), slice(3, 20), slice(32, 500), slice(501, 1000)]
        sources, targets = [source[piece] for piece in pieces], [target[piece] for piece in pieces]
        copy_batch_async(targets, sources, stream=stream, method="kernel").synchronize()  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
