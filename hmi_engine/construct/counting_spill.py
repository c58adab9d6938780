"""Counts beyond memory: pieces in a temporary DuckDB database, which adds up and sorts them out of core."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import torch

from hmi_engine.construct.counting_selection import CountedWindows, Integers, MergeProgress
from hmi_engine.errors import CorpusError, StoreFullError
from hmi_kernels.reference import BITS_PER_SLOT

__all__ = ["SpilledCounts"]

MIN_DATABASE_BYTES = 128 << 20
"""With less than that DuckDB may refuse to work; it is taken whatever the limit."""

_ROWS_PER_FETCH = 1 << 20
_SECONDS_BETWEEN_INTERRUPTS = 0.05
_FULL_BELOW_BYTES = 16 << 20  # DuckDB writes blocks, and reports a full disk under several names

_WINDOWS = "SELECT key, count FROM added_up"
_RIGHT_WINDOWS = (  # of each bigram, which is a key without slot 2
    f"SELECT key >> {BITS_PER_SLOT}, count FROM added_up WHERE key & {(1 << BITS_PER_SLOT) - 1} = 0"
)


class SpilledCounts:
    """Pieces of (key, count) in a folder of its own below ``scratch``, removed by :meth:`close`."""

    def __init__(self, scratch: Path | None, memory_bytes: int) -> None:
        """Makes the folder and the database.

        Raises:
            CorpusError: ``scratch`` is no folder that can be written.
            StoreFullError: it has no room.
        """
        self._memory_bytes = memory_bytes
        self._scratch = Path(tempfile.gettempdir()) if scratch is None else scratch
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="hmi-counting-", dir=self._scratch))
        except OSError as error:
            raise CorpusError(
                f"no counts can be kept in {self._scratch}: {error}; name another folder"
            ) from error
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hmi-counts")
        try:
            with self._told():
                self._connection = duckdb.connect(self._folder / "counts.duckdb", config=self._settings())
                self._execute("SET enable_progress_bar = false")  # it would go to standard output
                self._execute("CREATE TABLE pieces (key BIGINT, count BIGINT)")
        except BaseException:
            self._thread.shutdown()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def _settings(self) -> dict[str, str | bool | int | float | list[str]]:
        return {
            "memory_limit": _limit(self._memory_bytes),
            "temp_directory": str(self._folder / "temporary"),
            "threads": str(torch.get_num_threads()),
            "autoinstall_known_extensions": "false",  # nothing is downloaded
            "autoload_known_extensions": "false",
        }

    def append(self, keys: Integers, counts: Integers) -> None:
        """Keeps a piece: keys int64 [n], counts int64 [n].

        Raises:
            StoreFullError: the scratch folder has no room.
        """
        if not len(keys):
            return
        with self._told():
            self._connection.register("piece", {"key": keys, "count": counts})
            self._execute("INSERT INTO pieces SELECT key, count FROM piece")
            self._connection.unregister("piece")

    def take(
        self,
        *,
        has_right_windows: bool,
        min_count: int,
        max_ngrams: int | None,
        memory_bytes: int,
        progress: MergeProgress | None,
    ) -> CountedWindows:
        """Adds up all pieces; see :meth:`WindowCounter.take`. ``memory_bytes`` is what DuckDB may take
        until it reads the result back.

        Raises:
            StoreFullError: the scratch folder has no room.
        """
        with self._told():
            execute = self._execute
            execute(f"SET memory_limit = '{_limit(memory_bytes)}'")
            execute(
                "CREATE TABLE added_up AS SELECT key, SUM(count)::BIGINT AS count FROM pieces GROUP BY key"
            )
            execute("DROP TABLE pieces")
            windows = f"{_WINDOWS} UNION ALL {_RIGHT_WINDOWS}" if has_right_windows else _WINDOWS
            execute(f"CREATE VIEW windows AS {windows}")
            num_distinct = self._count("windows")
            most_frequent = "" if max_ngrams is None else f"ORDER BY count DESC, key LIMIT {max_ngrams}"
            chosen = f"SELECT key, count FROM windows WHERE count >= {min_count} {most_frequent}"
            execute(f"CREATE TABLE chosen AS SELECT key, count FROM ({chosen}) ORDER BY key")
            execute("DROP VIEW windows")
            execute("DROP TABLE added_up")
            # From here on the result grows in our own memory.
            execute(f"SET memory_limit = '{_limit(self._memory_bytes)}'")
            return CountedWindows(*self._fetch(progress), num_distinct)

    def close(self) -> None:
        """Removes the folder and all in it."""
        self._thread.shutdown()
        self._connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _execute(self, statement: str, values: Sequence[int] | None = None) -> duckdb.DuckDBPyConnection:
        """Runs one statement on a thread of its own, so that Ctrl-C ends it within one chunk of rows.

        On the main thread DuckDB 2.0 notices a signal by itself, but then waits for its workers to finish
        the tasks they have begun, which for a large join or sort is the whole query; only ``interrupt`` is
        looked at inside a task.
        """
        result = self._thread.submit(self._connection.execute, statement, values)
        try:
            return result.result()
        except BaseException:
            # An interrupt that comes before the statement has begun is forgotten: so until it has ended.
            while not result.done():
                self._connection.interrupt()
                wait([result], timeout=_SECONDS_BETWEEN_INTERRUPTS)
            raise

    def _count(self, table: str) -> int:
        row = self._execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(row[0]) if row else 0

    def _fetch(self, progress: MergeProgress | None) -> tuple[Integers, Integers]:
        """Reads the chosen windows slice by slice: a table written in order keeps it, by rowid."""
        size = self._count("chosen")
        keys, counts = np.empty(size, np.int64), np.empty(size, np.int64)
        for start in range(0, size, _ROWS_PER_FETCH):
            end = min(start + _ROWS_PER_FETCH, size)
            found = self._execute(
                "SELECT key, count FROM chosen WHERE rowid >= ? AND rowid < ? ORDER BY key", [start, end]
            ).fetchnumpy()
            keys[start:end], counts[start:end] = found["key"], found["count"]
            if progress:
                progress(end, size)
        return keys, counts

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns DuckDB's errors into ours."""
        try:
            yield
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            if "No space left" in str(error) or shutil.disk_usage(self._scratch).free < _FULL_BELOW_BYTES:
                raise StoreFullError(
                    f"no room for the counts in {self._scratch}: {reason}; make room, or name another folder"
                ) from error
            raise CorpusError(f"the counts in {self._scratch} cannot be added up: {reason}") from error


def _limit(memory_bytes: int) -> str:
    return f"{max(memory_bytes, MIN_DATABASE_BYTES) >> 20}MiB"
