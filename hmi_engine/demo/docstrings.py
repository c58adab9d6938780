"""Documentation strings of Python source files, read without importing or running anything."""

from __future__ import annotations

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Docstring", "DocstringKind", "default_roots", "read_docstrings", "source_files"]

DocstringKind = Literal["class", "function", "method"]

_SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "__pycache__"}
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """One documentation string and what it documents.

    Attributes:
        prose: its words before and between code examples, white space collapsed.
        kind: what it documents; a function inside a class is a method.
        source: the file, relative to the folder that holds its package (``json/decoder.py``).
    """

    prose: str
    kind: DocstringKind
    source: str


def default_roots() -> tuple[Path, ...]:
    """Folders that hold packages: the standard library, then every site-packages folder on ``sys.path``."""
    standard = Path(sysconfig.get_paths()["stdlib"])
    installed = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return tuple(dict.fromkeys([standard, *installed]))


def source_files(module: str, roots: Sequence[Path]) -> list[tuple[Path, str]]:
    """Finds a module's source: pairs of (path, name relative to its root), sorted; tests are left out.

    ``module`` is a package or module with ``/`` between its parts (``json``, ``torch/nn``). The first of
    ``roots`` that has it counts; a module that is not installed gives an empty list.
    """
    for root in roots:
        folder, file = root / module, root / f"{module}.py"
        if folder.is_dir():
            relative = sorted(path.relative_to(root) for path in folder.rglob("*.py"))
            return [
                (root / path, path.as_posix()) for path in relative if not _SKIPPED_FOLDERS & {*path.parts}
            ]
        if file.is_file():
            return [(file, f"{module}.py")]
    return []


def read_docstrings(path: Path, source: str) -> list[Docstring]:
    """Parses one file and returns the documentation of its classes, functions and methods in file order.

    A file that is no valid Python of this version (templates, files for other versions) gives an empty list.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    return [
        Docstring(prose, kind, source)
        for definition, kind in _definitions(tree)
        if (prose := _prose(ast.get_docstring(definition) or ""))
    ]


def _definitions(
    parent: ast.Module | ast.ClassDef,
) -> Iterator[tuple[_Definition, DocstringKind]]:
    for node in parent.body:
        if isinstance(node, ast.ClassDef):
            yield node, "class"
            yield from _definitions(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, "method" if isinstance(parent, ast.ClassDef) else "function"


def _prose(docstring: str) -> str:
    paragraphs = [paragraph for paragraph in docstring.split("\n\n") if ">>>" not in paragraph]
    return " ".join(" ".join(paragraphs).split())
