"""How results name the command that made them; without torch, as GPU checks begin with it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

__all__ = ["recorded_command"]


def recorded_command(name: str, argv: Sequence[str]) -> str:
    """The command of ``benchmarks.<name>``.

    Of an absolute path its last part is kept, also after ``NAME=``: where a machine keeps its text says
    nothing to others.
    """
    shown = (re.sub(r"(^|=)/(?:.*/)?([^/]+)/?$", r"\1\2", argument) for argument in argv)
    return shlex.join(["python", "-m", f"benchmarks.{name}", *shown])
