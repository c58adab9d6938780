"""Engines in processes of their own, so that the operating system tells what each takes of memory."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from hmi_engine.engine import Engine
from hmi_engine.errors import HmiError
from hmi_engine.request import Request
from hmi_engine.store import Store

__all__ = ["Answered", "EngineOptions", "EngineProcess", "drop_file_cache"]

BATCH = 32

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class EngineOptions:
    """What an engine of the benchmark gets: the adapters' budget in bytes, and how long its queues are."""

    store: Path
    adapter_bytes: int
    requests_per_call: int = BATCH


@dataclass(frozen=True)
class Answered:
    """How some requests went.

    Attributes:
        latencies: seconds of each call of ``Engine.run``, which is what each of its requests waited.
        hits: tenants of calls that were in memory; a call asks for each of its tenants once.
        misses: tenants of calls that were not.
        bytes_read: of tenants' files.
        resident_bytes: RSS of the process afterwards.
    """

    latencies: tuple[float, ...]
    hits: int
    misses: int
    bytes_read: int
    resident_bytes: int


class EngineProcess:
    """An engine that another process runs; it waits without taking CPU time while others are measured."""

    def __init__(self, options: EngineOptions) -> None:
        """Starts it; the store must not change while it lives."""
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, options), daemon=True)
        self._process.start()
        other.close()

    def answer(self, pairs: Pairs) -> Answered:
        """Answers requests in calls of ``requests_per_call``.

        Raises:
            HmiError: a request failed.
        """
        return self._ask(("answer", list(pairs)))

    def prefetch(self, names: Sequence[str]) -> Answered:
        """Loads tenants, as many as fit."""
        return self._ask(("prefetch", list(names)))

    def close(self) -> None:
        """Ends the process."""
        self._connection.send(None)
        self._process.join()
        self._connection.close()

    def _ask(self, message: tuple[str, list[object]]) -> Answered:
        self._connection.send(message)
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise HmiError(answer)
        assert isinstance(answer, Answered)
        return answer


def _serve(connection: Connection, options: EngineOptions) -> None:
    with (
        Store.open(options.store, read_only=True) as store,
        Engine(store, host_memory=options.adapter_bytes, record_traffic=False) as engine,
    ):
        while (message := connection.recv()) is not None:
            order, given = message
            try:
                if order == "prefetch":
                    connection.send(_prefetched(engine, given))
                else:
                    connection.send(_answered(engine, given, options.requests_per_call))
            except HmiError as error:
                connection.send(f"{type(error).__name__}: {error}")


def _prefetched(engine: Engine, names: Sequence[str]) -> Answered:
    return _measured(engine, [], lambda: engine.prefetch(names))


def _answered(engine: Engine, pairs: Pairs, requests_per_call: int) -> Answered:
    latencies: list[float] = []

    def run() -> None:
        for start in range(0, len(pairs), requests_per_call):
            requests = [Request(name, text) for name, text in pairs[start : start + requests_per_call]]
            began = time.perf_counter()
            responses = engine.run(requests)
            latencies.append(time.perf_counter() - began)
            for response in responses:
                if response.error is not None:
                    raise response.error

    return _measured(engine, latencies, run)


def _measured(engine: Engine, latencies: list[float], run: Callable[[], None]) -> Answered:
    before = engine.stats().adapters or {}
    run()
    after = engine.stats().adapters or {}
    return Answered(
        latencies=tuple(latencies),
        hits=after["hits"] - before["hits"],
        misses=after["misses"] - before["misses"],
        bytes_read=after["bytes_read"] - before["bytes_read"],
        resident_bytes=psutil.Process().memory_info().rss,
    )


def drop_file_cache(folder: Path) -> None:
    """Tells the operating system to forget what it keeps of the files below a folder; they must be synced."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
