"""Text, streamed from files of any size."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.corpus_files import STDIN, SUFFIXES, TextFormat, corpus_files, file_format
from hmi_engine.knowledge.corpus_json import json_objects, text_fault
from hmi_engine.knowledge.corpus_lines import numbered_lines
from hmi_engine.knowledge.corpus_parquet import parquet_texts
from hmi_engine.knowledge.corpus_report import BadLine, CorpusReport, Reading

__all__ = [
    "SUFFIXES",
    "BadLine",
    "Corpus",
    "CorpusReport",
    "TextFormat",
    "check_not_empty",
    "corpus_bytes",
    "corpus_files",
    "stream_texts",
]

Corpus: TypeAlias = str | Path | Iterable[str] | Iterable[Path]
"""A ``str`` or Path alone is a path (a folder stands for its files, ``-`` for standard input), and so is each
Path of an iterable; each ``str`` of an iterable is a text."""


def stream_texts(
    corpus: Corpus,
    *,
    text_field: str = "text",
    stdin_format: TextFormat = "txt",
    on_bad_line: Callable[[BadLine], None] | None = None,
    report: CorpusReport | None = None,
) -> Iterator[str]:
    """Yield the texts of a corpus, one line in memory at a time.

    ``corpus`` is a path, or an iterable of Paths, or an iterable of texts (see :data:`Corpus`). Of .txt files
    every line that is not blank is a text, stripped; of .jsonl files the string in ``text_field`` of every
    line; of .parquet files that in the column ``text_field`` of every row. Text and JSON lines may be
    compressed (.gz, .zst). Standard input is read once, as ``stdin_format`` says and not compressed. A line
    without text goes to ``report`` and ``on_bad_line``, and the others go on. What is no UTF-8 is replaced by
    U+FFFD and counted. Raises :class:`CorpusError` for a missing, unreadable or unsupported file.
    """
    reading = Reading(CorpusReport() if report is None else report, on_bad_line)
    for item in [corpus] if isinstance(corpus, str | Path) else corpus:
        if isinstance(item, Path) or item is corpus:
            yield from _texts_of_path(Path(item), text_field, stdin_format, reading)
        elif isinstance(item, str):
            text = reading.accept(item)
            reading.report.bytes += len(text.encode())
            yield text
        else:
            raise CorpusError(
                f"a corpus holds texts (str) or paths (Path), not {type(item).__name__}: {item!r:.80}"
            )


def check_not_empty(report: CorpusReport) -> None:
    """Raise :class:`CorpusError` if a stream that has ended gave no text."""
    if report.texts == 0:
        bad = (
            f"; {report.num_bad_lines} lines were left out, first {report.bad_lines[0]}"
            if report.bad_lines
            else ""
        )
        raise CorpusError(f"the corpus holds no text{bad}")


def corpus_bytes(corpus: Corpus) -> int | None:
    """Return the bytes of a corpus' files, for a progress bar; None where they are not known beforehand.

    An iterator is not consumed. Raises :class:`CorpusError` for a missing or unsupported file.
    """
    if isinstance(corpus, str | Path):
        paths: Sequence[object] = [Path(corpus)]
    elif isinstance(corpus, Sequence):
        paths = corpus
    else:
        return None
    total = 0
    for path in paths:
        if not isinstance(path, Path) or path == STDIN:
            return None
        total += sum(file.stat().st_size for file in corpus_files(path))
    return total


def _texts_of_path(path: Path, text_field: str, stdin_format: TextFormat, reading: Reading) -> Iterator[str]:
    if path == STDIN:
        yield from _texts_of_lines(path, stdin_format, text_field, reading)
        return
    for file in corpus_files(path):
        kind = file_format(file).kind
        if kind == "parquet":
            yield from parquet_texts(file, text_field, reading)
        else:
            yield from _texts_of_lines(file, kind, text_field, reading)


def _texts_of_lines(path: Path, kind: TextFormat, text_field: str, reading: Reading) -> Iterator[str]:
    if kind == "jsonl":
        for number, found in json_objects(path, reading):
            if fault := text_fault(found, text_field):
                reading.refuse(path, number, fault)
            else:
                yield reading.accept(found[text_field])
    else:
        for _, line in numbered_lines(path, reading):
            yield reading.accept(line)
