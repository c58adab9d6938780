"""Runs the CUDA kernels of hmi_kernels on the CPU: ``with emulated(): ...`` makes the backend ``cuda`` the emulated one.

Beside that the emulator tells which synchronizations ran (:func:`sites`), can skip some of them
(``emulated(dropped=...)``), and counts the bytes and bank conflicts of every launch (:func:`counters`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import hmi_kernels
from emulator.build import PRODUCTION, Program, build, module_name
from hmi_kernels.cuda import driver

__all__ = ["ORDERS", "Site", "emulated", "load", "sites", "using"]

ORDERS = ("in order", "reverse", "random")
_BUILD_OF_VARIANT = {"plain": "plain", "race": "race", "count": "race", "sanitize": "sanitize"}


class Site(NamedTuple):
    """A place in the kernels where threads synchronize."""

    kind: str
    """``barrier`` (__syncthreads), ``warp`` (__syncwarp) or ``copy wait`` (cp_async_wait)."""
    file: str
    line: int
    count: int
    """How many threads came here, once for every time."""

    def __str__(self) -> str:
        return f"{self.kind} at {self.file}:{self.line}"


@functools.cache
def load(variant: str = "plain", program: Program = PRODUCTION) -> ModuleType:
    """Builds the variant if need be and imports it."""
    path = build(_BUILD_OF_VARIANT[variant], program)
    return import_module(module_name(program, _BUILD_OF_VARIANT[variant]), path)


def import_module(name: str, path: Path) -> ModuleType:
    """The extension module in the file. Functions that it lacks are missed when they are called, not now."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    specification = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert specification is not None
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)
    try:
        module = importlib.util.module_from_spec(specification)
    finally:
        sys.setdlopenflags(flags)
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def using(
    module: ModuleType,
    *,
    check_races: bool = False,
    count_accesses: bool = False,
    order: str = "random",
    seed: int = 0,
    copy_time: str = "late",
    allow_sm90_shared: bool = False,
    dropped: Sequence[Site] = (),
) -> Iterator[ModuleType]:
    """Within the with-statement the module's emulator has these settings, and has counted nothing before."""
    previous = _settings.get(module, {})
    settings = {
        "check_races": check_races,
        "count_accesses": count_accesses,
        "order": order,
        "seed": seed,
        "copy_time": copy_time,
        "allow_sm90_shared": allow_sm90_shared,
        "dropped": [(site.kind, site.file, site.line) for site in dropped],
    }
    _configure(module, settings)
    try:
        yield module
    finally:
        _configure(module, previous)


_settings: dict[ModuleType, dict[str, object]] = {}
_DEFAULTS: dict[str, object] = {
    "check_races": False,
    "count_accesses": False,
    "order": "random",
    "seed": 0,
    "copy_time": "late",
    "allow_sm90_shared": False,
    "dropped": [],
}


def _configure(module: ModuleType, settings: dict[str, object]) -> None:
    module.emulator.configure(**{**_DEFAULTS, **settings})
    _settings[module] = settings


@contextlib.contextmanager
def emulated(variant: str = "plain", **settings: object) -> Iterator[ModuleType]:
    """Within the with-statement the backend ``cuda`` runs the emulated kernels, on CPU tensors.

    ``variant``: ``plain``; ``race`` also finds unsynchronized accesses, at a thirtieth of the speed; ``count``
    counts the accesses, see :func:`counters`; ``sanitize`` only in a process of :func:`run_sanitized`.
    ``settings``: those of :func:`using`. A mistake of a kernel is a RuntimeError that names the place.
    """
    module = load(variant)
    observed = {"check_races": variant == "race", "count_accesses": variant == "count"}
    with (
        using(module, **{**observed, **settings}),  # type: ignore[arg-type]
        driver.use_module(module),
        hmi_kernels.use_backend("cuda"),
    ):
        yield module


def sites(module: ModuleType) -> list[Site]:
    """The synchronizations that have run since the emulator was configured."""
    return [Site(*site) for site in module.emulator.sites()]
