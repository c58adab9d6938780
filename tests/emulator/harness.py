"""Runs the CUDA kernels of hmi_kernels on the CPU: ``with emulated(): ...`` makes them the backend ``cuda``.

Beside that the emulator tells which synchronizations ran (:func:`sites`), can skip some of them
(``emulated(dropped=...)``), and counts the bytes and bank conflicts of every launch (:func:`counters`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from emulator.build import PRODUCTION, ROOT, Program, build, compiler_command, module_name
from emulator.counters import LaunchCounters, launch_counters
from emulator.device_choice import chosen_device, require_emulator

__all__ = [
    "MODULE_VARIABLES",
    "Site",
    "active_module",
    "counters",
    "emulated",
    "load",
    "run_python",
    "run_sanitized",
    "sites",
    "using",
]

MODULE_VARIABLES = {"plain": "HMI_EMULATOR_PLAIN", "sanitize": "HMI_EMULATOR_SANITIZE"}
"""Environment: the file to load for a variant, which is then not built; for processes that we start."""
_BUILD_OF_VARIANT = {"plain": "plain", "race": "race", "count": "race", "sanitize": "sanitize"}


class Site(NamedTuple):
    """A place in the kernels where threads synchronize."""

    kind: str
    """``barrier`` (__syncthreads), ``warp`` (__syncwarp) or ``copy wait`` (cp_async_wait; if dropped, it
    waits for one group of copies less)."""
    file: str
    line: int
    count: int
    """How many threads came here, once for every time."""

    def __str__(self) -> str:
        return f"{self.kind} at {self.file}:{self.line}"


@functools.cache
def load(variant: str = "plain", program: Program = PRODUCTION) -> ModuleType:
    """Builds the variant if need be and imports it."""
    given = os.environ.get(MODULE_VARIABLES.get(variant, ""))
    path = Path(given) if given else build(_BUILD_OF_VARIANT[variant], program)
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


_configurations: dict[ModuleType, dict[str, Any]] = {}
"""What each module's emulator is set to; modules that no one has used are not in it."""
_active: list[ModuleType] = []
"""The modules of the with-statements that surround the caller, innermost last."""


@contextlib.contextmanager
def using(
    variant: str = "plain",
    program: Program = PRODUCTION,
    *,
    order: str = "random",
    seed: int = 0,
    copy_time: str = "late",
    allow_sm90_shared: bool = False,
    dropped: Sequence[Site] = (),
) -> Iterator[ModuleType]:
    """Within the with-statement a program's emulator has these settings, and has counted nothing before.

    ``variant``: ``plain``; ``race`` also finds unsynchronized accesses, at some times the cost;
    ``count`` counts accesses, see :func:`counters`; ``sanitize`` only within :func:`run_sanitized`.
    ``order``: in which order threads that could go on do: ``in order``, ``reverse``, or ``random`` by the
    seed.
    ``copy_time``: when cp.async takes place: ``late`` (when waited for), ``early`` (at once) or ``random``.
    ``allow_sm90_shared``: 227 KiB of shared memory a block, not 163 KiB.
    ``dropped``: synchronizations to skip.
    """
    require_emulator("kernels compiled for the CPU")
    module = load(variant, program)
    previous = _configurations.get(module)
    configuration = {
        "order": order,
        "seed": seed,
        "copy_time": copy_time,
        "check_races": variant == "race",
        "count_accesses": variant == "count",
        "allow_sm90_shared": allow_sm90_shared,
        "dropped": [(site.kind, site.file, site.line) for site in dropped],
    }
    _configure(module, configuration)
    _active.append(module)
    try:
        yield module
    finally:
        _active.pop()
        if previous is not None:
            _configure(module, previous)


def _configure(module: ModuleType, configuration: dict[str, Any]) -> None:
    module.emulator.configure(**configuration)
    _configurations[module] = configuration


@contextlib.contextmanager
def emulated(variant: str = "plain", **settings: Any) -> Iterator[ModuleType]:
    """Within the with-statement the backend ``cuda`` runs the emulated kernels, on CPU tensors.

    The settings are those of :func:`using`. A mistake of a kernel is a RuntimeError that names the place.
    Under ``pytest --device cuda`` (see ``staging.py``) the kernels of the GPU run instead, whose schedule is
    its own; tests that need more than results are skipped.
    """
    import torch  # not above: it takes seconds to import, and the emulator's own tests need none

    import hmi_kernels
    from emulator.staging import Staged
    from hmi_kernels.cuda import driver

    if chosen_device() == "cuda":
        if variant != "plain" or settings.get("dropped"):
            require_emulator(f"variant {variant} or dropped synchronizations")
        with hmi_kernels.use_backend("cuda"), Staged(torch.device("cuda")):
            yield driver.module()
        return
    detour = Staged(torch.device("cpu")) if chosen_device() == "staged" else contextlib.nullcontext()
    own = using(variant, **settings)
    with own as module, driver.use_module(module), hmi_kernels.use_backend("cuda"), detour:
        yield module


def active_module() -> ModuleType:
    """The module of the innermost :func:`using` or :func:`emulated`."""
    require_emulator("what it counts and tells")
    return _active[-1]


def sites() -> list[Site]:
    """The synchronizations that have run since the innermost :func:`using` or :func:`emulated`."""
    return [Site(*site) for site in active_module().emulator.sites()]


def counters() -> list[LaunchCounters]:
    """What every launch since the innermost :func:`using` or :func:`emulated` moved; variant ``count``."""
    return launch_counters(active_module())


def run_sanitized(
    code: str, *, program: Program = PRODUCTION, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process in which ``variant="sanitize"`` can be used.

    AddressSanitizer must be there before the interpreter, and ends the process when it finds something: look
    at ``returncode`` and ``stderr`` of the result.
    """
    require_emulator("AddressSanitizer")
    preload = [_runtime_library("libasan.so"), _runtime_library("libstdc++.so.6")]
    environment = {
        # Built here: there the sanitizer would also watch the compiler.
        MODULE_VARIABLES["sanitize"]: str(build("sanitize", program)),
        "LD_PRELOAD": " ".join(preload),
        # The interpreter never frees all it has; CPython's own allocator would hide ends of small buffers.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    return run_python(code, environment, timeout=timeout)


def run_python(
    code: str, environment: Mapping[str, str] | None = None, *, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own that finds this package; ``environment`` is added to ours."""
    settings = {
        **os.environ,
        **(environment or {}),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        env=settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def _runtime_library(name: str) -> str:
    command = [*compiler_command(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
