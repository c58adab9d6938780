"""The texts of a Parquet file's column, streamed by DuckDB."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.corpus_lines import MAX_LINE_BYTES
from hmi_engine.knowledge.corpus_report import Reading

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

__all__ = ["parquet_texts"]

_ROWS_PER_FETCH = 1024
_TEXT_TYPES = ("VARCHAR", "BLOB")
_TABLE = "read_parquet(?, hive_partitioning = false)"  # a folder `text=a` is no column
_CONNECTION: dict[str, str | bool | int | float | list[str]] = {
    "threads": "1",
    # DuckDB would otherwise look for extensions on the network.
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}


def parquet_texts(path: Path, text_field: str, reading: Reading) -> Iterator[str]:
    """Yield the texts in the column ``text_field`` in the order of the rows, stripped.

    The column holds strings, or bytes (UTF-8; what is none is replaced and counted). A row without text goes
    to the report. Memory: what one row group's page of the column takes. Raises :class:`CorpusError` for a
    file that is missing or damaged, has no such column, or has strings that are no UTF-8.
    """
    import duckdb  # a quarter of a second, which only those who read Parquet should wait

    # DuckDB takes * ? [ in a name for a pattern.
    name = re.sub(r"([*?\[])", r"[\1]", str(path.absolute()))
    try:
        with duckdb.connect(config=_CONNECTION) as connection:
            connection.execute("SET enable_progress_bar = false")  # it would go to standard output
            _check_column(connection, path, name, text_field)
            for number, value in _numbered_values(connection, path, name, text_field, reading):
                text = reading.decode(value).strip() if isinstance(value, bytes) else (value or "").strip()
                if not text:
                    reading.refuse(path, number, f"no text in column {text_field!r}")
                elif len(text) > MAX_LINE_BYTES:
                    reading.refuse(path, number, f"longer than {MAX_LINE_BYTES} characters; split it")
                else:
                    yield reading.accept(text)
    except (OSError, duckdb.Error) as error:
        raise CorpusError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _check_column(connection: "DuckDBPyConnection", path: Path, name: str, text_field: str) -> None:
    connection.execute(f"DESCRIBE SELECT * FROM {_TABLE}", [name])
    types = {str(column): str(kind) for column, kind, *_ in connection.fetchall()}
    if text_field not in types:
        raise CorpusError(f"{path}: no column {text_field!r}; the columns are {sorted(types)!r:.200}")
    if types[text_field] not in _TEXT_TYPES:
        raise CorpusError(f"{path}: column {text_field!r} holds {types[text_field]}, not text")


def _numbered_values(
    connection: "DuckDBPyConnection", path: Path, name: str, text_field: str, reading: Reading
) -> Iterator[tuple[int, str | bytes | None]]:
    """Yield each row's number from 1 and value; the file's bytes count in proportion to its rows."""
    size, counted = path.stat().st_size, reading.report.bytes
    found = connection.execute("SELECT num_rows FROM parquet_file_metadata(?)", [name]).fetchone()
    num_rows = found[0] if found else 0
    column = text_field.replace('"', '""')
    connection.execute(f'SELECT "{column}" FROM {_TABLE}', [name])
    number = 0
    while rows := connection.fetchmany(_ROWS_PER_FETCH):
        for (value,) in rows:
            number += 1
            yield number, value
        reading.report.bytes = counted + size * number // num_rows
    reading.report.bytes = counted + size
