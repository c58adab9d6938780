"""What the check programs share: options, platform, what they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.gpu.checks import SKIPPED
from benchmarks.gpu.options import prepare_environment

if TYPE_CHECKING:
    from benchmarks.gpu.platform import Platform

__all__ = ["CheckFailedError", "NothingToCheckError", "faults_raised", "run_check"]


class CheckFailedError(Exception):
    """What the check found, in a line."""


class NothingToCheckError(Exception):
    """Why the check can find nothing here, in a line."""


def run_check(check: Callable[[Platform], str], argv: Sequence[str] | None = None) -> int:
    """Runs a check, which returns what it has seen, and gives the program's exit status."""
    parser = argparse.ArgumentParser(description=check.__doc__)
    parser.add_argument("--dry", action="store_true", help="on the CPU by emulator and interpreter")
    options = parser.parse_args(argv)
    prepare_environment(is_dry=options.dry)
    from benchmarks.gpu.platform import choose_platform

    try:
        print(check(choose_platform(is_dry=options.dry)))
    except NothingToCheckError as reason:
        print(reason)
        return SKIPPED
    except CheckFailedError as finding:
        print(finding, file=sys.stderr)
        return 1
    return 0


@contextmanager
def faults_raised(platform: Platform) -> Iterator[None]:
    """At the end waits for the device, and raises ValueError if a kernel was given values out of bounds."""
    import hmi_kernels

    yield
    platform.synchronize()
    hmi_kernels.raise_faults()
