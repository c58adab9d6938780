"""Results of the steps of a long benchmark, kept until all of them are there."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from hmi_engine.knowledge.atomic import atomic_write

__all__ = ["KeptSteps"]

Value = TypeVar("Value")


class KeptSteps:
    """Writes each step's result to a file; a run that was cut short goes on where it was.

    Files lie in a folder beside the result. They are taken up again only by a run with the same ``key``, such
    as the settings; :meth:`forget` removes them when the result is written.
    """

    def __init__(self, out: Path, key: str) -> None:
        """Finds what an earlier run has left; says what it does on stderr."""
        self._folder = out.with_suffix(".steps")
        self._key = key
        key_file = self._folder / "key"
        if self._folder.exists() and (not key_file.exists() or key_file.read_text() != key):
            shutil.rmtree(self._folder)
        self._started = time.monotonic()

    def take(self, name: str, kind: type[Value], work: Callable[[], Value]) -> Value:
        """The result of step ``name``, a ``kind`` that pydantic can write and read: kept, or else by work."""
        adapter = TypeAdapter(kind)
        path = self._path(name)
        if path.exists():
            self._say(f"{name}: kept from an earlier run")
            return adapter.validate_json(path.read_bytes())
        self._say(name)
        value = work()
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(self._folder / "key", self._key.encode())
        _write(path, adapter.dump_json(value))
        return value

    def has(self, name: str) -> bool:
        """Whether the result of step ``name`` is kept."""
        return self._path(name).exists()

    def forget(self) -> None:
        """Removes what was kept."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _say(self, what: str) -> None:
        print(f"[{time.monotonic() - self._started:6.0f} s] {what}", file=sys.stderr, flush=True)


def _write(path: Path, content: bytes) -> None:
    def write(partial: Path) -> None:
        partial.write_bytes(content)

    atomic_write(path, write)
