"""Changes of a store in processes that die at a chosen point, as by ``kill -9``.

Run as a program, it reads lines of JSON from its standard input and answers each with one line. Every job
runs in a fork of its own; as this process imports everything and starts no thread, a fork is safe and quick.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH_WINDOWS = 32
"""Windows computed at a time, so that a table of some hundred rows takes several batches."""


class CrashRunner:
    """Starts the program and gives it jobs."""

    def __init__(self) -> None:
        self._program = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def run(self, **job: Any) -> dict[str, Any]:
        """Run a job (see :func:`work`); return its ``status`` (-9: it was killed) and what it counted."""
        assert self._program.stdin is not None and self._program.stdout is not None
        self._program.stdin.write(json.dumps(job) + "\n")
        self._program.stdin.flush()
        answer: dict[str, Any] = json.loads(self._program.stdout.readline())
        return answer

    def close(self) -> None:
        """End the program."""
        self._program.communicate()


class Reporter:
    """Counts what a job does, in a file that outlives the job's death."""

    def __init__(self, descriptor: int, job: dict[str, Any]) -> None:
        self._descriptor = descriptor
        self._root = str(job["store"])
        self._kill_at = job.get("kill_at")
        self._kill_windows = job.get("kill_windows")
        self._points = 0
        self._windows = 0

    def point(self, what: str) -> None:
        """One of the moments at which the job may die."""
        if self._points == self._kill_at:
            die()
        self._points += 1
        os.write(self._descriptor, f"point {what}\n".encode())

    def before_windows(self) -> None:
        """Windows are about to go through the domain layers."""
        if self._kill_windows is not None and self._windows >= self._kill_windows:
            die()

    def after_windows(self, count: int) -> None:
        """So many windows have gone through the domain layers."""
        self._windows += count
        os.write(self._descriptor, f"windows {count}\n".encode())

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's own reports: every change of a name in the store's folder is a point."""
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            return
        is_open = event == "open"
        if is_open and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        named = arguments[: 2 if event == "os.rename" else 1]
        paths = [os.fsdecode(path) for path in named if isinstance(path, str | bytes | os.PathLike)]
        if paths and paths[0].startswith(self._root):
            self.point(" ".join([event, *map(self.relative, paths)]))

    def relative(self, path: str) -> str:
        """Return a path as seen from the store."""
        return path.removeprefix(self._root)


def die() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def instrument(reporter: Reporter) -> None:
    """Make points of every sync, commit, and change of a name, and count the windows that are computed."""
    from hmi_engine.construct import materialise
    from hmi_engine.models.windows import WindowLayers

    for name in ("fsync", "fdatasync", "pwrite"):
        setattr(os, name, _reported(name, reporter))
    connect = sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            if statement == "COMMIT":
                reporter.point("before commit")
            cursor = super().execute(statement, *arguments)
            if statement == "COMMIT":
                reporter.point("after commit")
            return cursor

    sqlite3.connect = lambda *args, **kwargs: connect(*args, factory=Connection, **kwargs)  # type: ignore[assignment]
    compute = WindowLayers.__call__

    def counted(self: WindowLayers, tokens: Any) -> Any:
        reporter.before_windows()
        states = compute(self, tokens)
        reporter.after_windows(len(tokens))
        return states

    WindowLayers.__call__ = counted  # type: ignore[method-assign]
    materialise.WINDOWS_PER_BATCH = BATCH_WINDOWS
    sys.addaudithook(reporter.audit)


def _reported(name: str, reporter: Reporter) -> Callable[..., Any]:
    """Return the function of ``os`` whose first argument is a descriptor, each call of which is a point."""
    call = getattr(os, name)

    def reported(descriptor: int, *arguments: Any) -> Any:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        reporter.point(f"{name} {reporter.relative(path)}")
        return call(descriptor, *arguments)

    return reported


def work(job: dict[str, Any]) -> None:
    """Call the method ``call`` of the store at ``store`` with ``arguments`` and ``options``.

    The process dies at point ``kill_at``, after ``kill_after`` seconds, or when ``kill_windows`` windows are
    computed and another is to be, if the job says so.
    """
    import hmi_engine as hmi

    if job.get("kill_after") is not None:
        threading.Timer(job["kill_after"], die).start()
    with hmi.Store.open(job["store"]) as store:
        getattr(store, job["call"])(*job["arguments"], **job.get("options", {}))


def run_forked(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a fork."""
    reader, writer = os.pipe()
    os.set_blocking(writer, True)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            instrument(Reporter(writer, job))
            work(job)
            status = 0
        except BaseException as error:
            os.write(writer, f"error {type(error).__name__}: {error}\n".encode())
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as report:
        lines = report.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {
        "status": status,
        "seconds": time.monotonic() - started,
        "points": [line[6:] for line in lines if line.startswith("point ")],
        "windows": sum(int(line[8:]) for line in lines if line.startswith("windows ")),
        "error": "".join(line[6:] for line in lines if line.startswith("error ")),
    }


def main() -> None:
    """Answer jobs until the input ends."""
    import transformers.models.bert  # noqa: F401

    import hmi_engine.store  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(run_forked(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
