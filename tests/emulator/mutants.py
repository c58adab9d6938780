"""Kernels with a changed line: what tests must notice."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import NamedTuple

from emulator.build import (
    PRODUCTION,
    ROOT,
    VARIANTS,
    Compilation,
    Program,
    build,
    build_folder,
    compilations,
    include_flags,
    module_path,
    ninja_command,
    ninja_file,
    run_ninja,
)
from emulator.device_choice import require_emulator
from emulator.harness import MODULE_VARIABLES, run_python

__all__ = ["Mutation", "assert_missed", "build_mutant", "run_mutated"]


class Mutation(NamedTuple):
    """One place of the sources that reads otherwise."""

    path: str
    """From the repository's root."""
    old: str
    """Text that is there once."""
    new: str


def assert_missed(mutation: Mutation, code: str) -> None:
    """Asserts that Python code which passes over the kernels as they are fails over the mutated ones.

    It must fail by an assertion, by what the emulator tells, or by a signal (memory out of bounds): a mutant
    that does not even import proves nothing.
    """
    original = run_python(code)
    assert original.returncode == 0, f"the code fails without the mutation:\n{original.stderr}"
    mutated = run_mutated(code, mutation)
    assert mutated.returncode != 0, f"nothing fails with {mutation}"
    if mutated.returncode < 0:
        return
    last_line = mutated.stderr.strip().splitlines()[-1]
    assert last_line.startswith(("AssertionError", "RuntimeError")), mutated.stderr


def run_mutated(
    code: str, *mutations: Mutation, program: Program = PRODUCTION
) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process whose variant ``plain`` of the program has the mutations."""
    module = build_mutant(*mutations, program=program)
    return run_python(code, {MODULE_VARIABLES["plain"]: str(module)})


def build_mutant(*mutations: Mutation, program: Program = PRODUCTION) -> Path:
    """Compiles what the mutations change and links it with the rest of the variant ``plain``.

    Raises ValueError if the text to be replaced is not there exactly once.
    """
    require_emulator("kernels with a mistake")
    base = build("plain", program)
    name = hashlib.sha256(repr(mutations).encode()).hexdigest()[:12]
    folder = build_folder(program) / "mutants" / name
    overlay = folder / "overlay"
    changed = {ROOT / path for path in _write_overlay(overlay, mutations)}
    users = _users(base.parent, changed)
    objects = [
        _mutated(each, folder, overlay, changed) if each.target in users else each._replace(source=None)
        for each in compilations(base.parent, program, "plain")
    ]
    module = module_path(folder, program, "plain")
    text = ninja_file(include_flags(), {module: (objects, VARIANTS["plain"].link)})
    run_ninja(folder, text, module)
    return module


def _write_overlay(overlay: Path, mutations: tuple[Mutation, ...]) -> list[str]:
    texts: dict[str, str] = {}
    for path, old, new in mutations:
        text = texts.get(path) or (ROOT / path).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{old!r} is {text.count(old)} times in {path}, not once")
        texts[path] = text.replace(old, new)
    for path, text in texts.items():
        target = overlay / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    return list(texts)


def _users(folder: Path, changed: set[Path]) -> set[Path]:
    """Objects of the folder that were compiled from any of the files, by ninja's record of dependencies."""
    command = [ninja_command(), "-C", str(folder), "-t", "deps"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    users = set()
    for record in report.split("\n\n"):  # "object: #deps 3, ..." and a line for each file
        head, *files = record.splitlines() or [""]
        if changed & {Path(file.strip()) for file in files}:
            users.add(Path(head.split(":")[0]))
    return users


def _mutated(original: Compilation, folder: Path, overlay: Path, changed: set[Path]) -> Compilation:
    source = original.source
    assert source is not None
    includes = f"-I{overlay} -I{overlay / 'csrc'} -iquote {source.parent}"
    if source in changed:
        source = overlay / source.relative_to(ROOT)
    return Compilation(source, folder / original.target.name, f"{includes} {original.flags}")
