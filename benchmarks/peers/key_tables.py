"""General-purpose tables from n-gram key to row: a Python dictionary, SQLite and DuckDB.

Each takes all keys of a batch at once, in the fastest of the ways that were tried. What turns token ids into
keys is numpy's arithmetic over whole batches, the same for all (:func:`search`).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt

__all__ = ["DuckDbTable", "Find", "PythonTable", "SqliteTable", "search"]

_Integers = npt.NDArray[np.int64]
Find = Callable[[_Integers], _Integers]
"""Keys int64 [M] -> rows int64 [M], -1 where missing."""

_SLOT_BITS = 21
_ABSENT = 0
"""A token's field in a key is its id + 1; an absent token's is 0."""


class PythonTable:
    """A dictionary of Python integers, asked key after key."""

    def __init__(self, keys: _Integers) -> None:
        """``keys`` int64 [N]; row i belongs to key i."""
        self._rows = {key: row for row, key in enumerate(keys.tolist())}

    def find(self, keys: _Integers) -> _Integers:
        """See :data:`Find`."""
        get = self._rows.get
        return np.array([get(key, -1) for key in keys.tolist()], dtype=np.int64)


class SqliteTable:
    """SQLite in memory: a table with the key as its integer primary key, joined with the batch's keys.

    The batch goes in as one JSON array, which is quicker than a statement for each key.
    """

    def __init__(self, keys: _Integers) -> None:
        """``keys`` int64 [N]; row i belongs to key i."""
        self._connection = sqlite3.connect(":memory:")
        self._connection.execute("CREATE TABLE plot (key INTEGER PRIMARY KEY, row INTEGER NOT NULL)")
        pairs = ((key, row) for row, key in enumerate(keys.tolist()))
        self._connection.executemany("INSERT INTO plot VALUES (?, ?)", pairs)

    def find(self, keys: _Integers) -> _Integers:
        """See :data:`Find`."""
        found = self._connection.execute(
            "SELECT ifnull(plot.row, -1) FROM json_each(?) AS wanted "
            "LEFT JOIN plot ON plot.key = wanted.value ORDER BY wanted.key",
            (json.dumps(keys.tolist()),),
        )
        return np.array([row for (row,) in found.fetchall()], dtype=np.int64)


class DuckDbTable:
    """DuckDB in memory: its table joined with the batch's keys, which it reads where numpy has them.

    The join hashes the batch and scans the table; an index on the key made no difference.
    """

    def __init__(self, keys: _Integers, num_threads: int) -> None:
        """``keys`` int64 [N]; row i belongs to key i."""
        self._connection = duckdb.connect()
        self._connection.execute(f"SET threads = {num_threads}")
        self._connection.register("loaded", {"key": keys, "row": np.arange(len(keys))})
        self._connection.execute("CREATE TABLE plot AS SELECT * FROM loaded")
        self._connection.unregister("loaded")

    def find(self, keys: _Integers) -> _Integers:
        """See :data:`Find`."""
        self._connection.register("wanted", {"place": np.arange(len(keys)), "key": keys})
        found = self._connection.execute(
            "SELECT place, plot.row AS row FROM wanted JOIN plot USING (key)"
        ).fetchnumpy()
        rows = np.full(len(keys), -1, dtype=np.int64)
        rows[found["place"]] = found["row"]
        return rows


def search(find: Find, input_ids: npt.NDArray[Any], offsets: _Integers, *, window: int) -> _Integers:
    """What ``hmi_kernels.plot_lookup`` finds in one table, by a table that takes many keys at once.

    input_ids int32 [T], offsets int64 [S+1] -> rows int64 [T, 1] or [T, 3], -1 where missing.
    """
    middle = input_ids.astype(np.int64) + 1
    left, right = np.roll(middle, 1), np.roll(middle, -1)
    left[offsets[:-1]] = _ABSENT
    right[offsets[1:] - 1] = _ABSENT
    if window == 2:
        return _find_where(find, right != _ABSENT, _keys(middle, right, _ABSENT))[:, None]
    whole = find(_keys(left, middle, right))
    is_missing = whole < 0
    before = _find_where(find, is_missing & (left != _ABSENT), _keys(left, middle, _ABSENT))
    after = _find_where(find, is_missing & (right != _ABSENT), _keys(_ABSENT, middle, right))
    return np.stack([whole, before, after], axis=1)


def _keys(first: _Integers | int, second: _Integers, third: _Integers | int) -> _Integers:
    keys: _Integers = (first << (2 * _SLOT_BITS)) | (second << _SLOT_BITS) | third
    return keys


def _find_where(find: Find, is_wanted: npt.NDArray[np.bool_], keys: _Integers) -> _Integers:
    rows = np.full(len(keys), -1, dtype=np.int64)
    rows[is_wanted] = find(keys[is_wanted])
    return rows
