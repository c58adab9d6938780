"""How long each stage of the pipeline works and waits, and a trace of it that a browser shows."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hmi_engine.knowledge.atomic import atomic_write

__all__ = ["StageClock", "StageTimes", "Trace", "hidden_share"]


@dataclass
class StageTimes:
    """What one stage did.

    Attributes:
        batches: how many it worked on.
        busy_seconds: that it worked.
        waiting_seconds: that it had nothing to work on though batches were on their way to it.
    """

    batches: int = 0
    busy_seconds: float = 0.0
    waiting_seconds: float = 0.0


class Trace:
    """Spans of time by thread, written as Chrome's trace format, which Perfetto and chrome://tracing open.

    Format: "Trace Event Format" (Chromium project), complete events, in microseconds. Thread-safe. What a
    process forgets to write is lost; the number of spans is bounded, later ones are counted and dropped.
    """

    def __init__(self, max_events: int = 1_000_000) -> None:
        """Nothing has happened yet."""
        self._max_events = max_events
        self._events: list[tuple[str, int, str, float, float, dict[str, object]]] = []
        self._began = time.perf_counter()
        self.dropped = 0

    def add(self, name: str, started: float, ended: float, **details: object) -> None:
        """A span of this thread, in seconds of ``time.perf_counter``."""
        if len(self._events) >= self._max_events:
            self.dropped += 1
            return
        thread = threading.current_thread()
        self._events.append((name, thread.native_id or 0, thread.name, started, ended, details))

    @contextmanager
    def span(self, name: str, **details: object) -> Iterator[None]:
        """The time that the block takes, of this thread."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, started, time.perf_counter(), **details)

    def write(self, path: Path) -> None:
        """Writes what happened so far, atomically; raises as ``atomic_write`` does."""
        process = os.getpid()
        events = list(self._events)
        threads = {number: name for _, number, name, _, _, _ in events}
        records: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": number, "args": {"name": name}}
            for number, name in threads.items()
        ]
        records += [
            {
                "ph": "X",
                "name": name,
                "cat": "hmi",
                "pid": process,
                "tid": number,
                "ts": round(1e6 * (started - self._began), 1),
                "dur": round(1e6 * (ended - started), 1),
                "args": details,
            }
            for name, number, _, started, ended, details in events
        ]
        content = {"displayTimeUnit": "ms", "traceEvents": records, "otherData": {"dropped": self.dropped}}
        atomic_write(path, lambda partial: _write_json(partial, content))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


class StageClock:
    """Adds up the time of stages, and notes it in a trace where there is one. Thread-safe."""

    def __init__(self, trace: Trace | None = None) -> None:
        """All stages are at zero."""
        self.trace = trace
        self._times: dict[str, StageTimes] = {}
        self._lock = threading.Lock()

    @contextmanager
    def working(self, stage: str, batch: int) -> Iterator[None]:
        """The block is this stage's work on a batch of this number."""
        started = time.perf_counter()
        try:
            yield
        finally:
            ended = time.perf_counter()
            with self._lock:
                times = self._times.setdefault(stage, StageTimes())
                times.batches += 1
                times.busy_seconds += ended - started
            if self.trace is not None:
                self.trace.add(stage, started, ended, batch=batch)

    @property
    def around_layer(self) -> Callable[[int], AbstractContextManager[None]] | None:
        """Notes the layers of a model in the trace; None where there is no trace."""
        trace = self.trace
        return None if trace is None else lambda index: trace.span(f"layer {index}")

    @contextmanager
    def waiting(self, stage: str) -> Iterator[None]:
        """In the block the stage waits for a batch that an earlier stage works on."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._times.setdefault(stage, StageTimes()).waiting_seconds += time.perf_counter() - started

    def times(self) -> dict[str, StageTimes]:
        """What each stage did so far, by its name, in the order in which they first worked."""
        with self._lock:
            return {stage: replace(times) for stage, times in self._times.items()}


def hidden_share(stages: Mapping[str, StageTimes]) -> float | None:
    """Of fetching and searching, the part that compute did not wait for; None where there was none."""
    busy = sum(stages[name].busy_seconds for name in ("fetch", "search") if name in stages)
    if not busy or "compute" not in stages:
        return None
    return max(0.0, 1 - stages["compute"].waiting_seconds / busy)
