"""Which GPUs the compiled CUDA kernels run on, by the architectures that the build was told."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Architecture", "compiled_architectures"]

_ENTRY = re.compile(r"(\d+)\.(\d+)([af]?)(\+PTX)?")


class Architecture(NamedTuple):
    """One entry of ``TORCH_CUDA_ARCH_LIST``.

    Attributes:
        major, minor: compute capability.
        suffix: "a" for code that uses what this device alone has, "f" what its family has, else "".
        has_ptx: whether the driver can compile it for later devices.
    """

    major: int
    minor: int
    suffix: str
    has_ptx: bool

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether a device of this compute capability can run it."""
        own = (self.major, self.minor)
        if self.suffix == "a":
            return capability == own
        is_same_major = capability[0] == self.major and capability >= own
        if self.suffix == "f":
            return is_same_major
        return is_same_major or (self.has_ptx and capability >= own)


def compiled_architectures(text: str) -> list[Architecture]:
    """Those of a build, e.g. ``8.0 9.0a 10.0+PTX``; what is none serves no device."""
    entries = [match.groups() for match in map(_ENTRY.fullmatch, text.split()) if match]
    return [
        Architecture(int(major), int(minor), suffix, ptx is not None) for major, minor, suffix, ptx in entries
    ]
