"""The rows of tables: comma or tab separated values with a header, and columns of words and tags."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.corpus_lines import MAX_LINE_BYTES, whole_lines
from hmi_engine.knowledge.corpus_report import Reading

__all__ = ["table_rows", "tagged_sentences"]

_DOCUMENT_MARK = "-DOCSTART-"
_SPACES = " \t\r\n"  # others, such as the space that does not break, may be words


def table_rows(
    path: Path, kind: Literal["csv", "tsv"], reading: Reading
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row's first line and its values by the header's names.

    Comma separated values are quoted as RFC 4180 says, with line ends inside quotes where there are some; in
    tab separated values a quotation mark is a character like any other. Raises :class:`CorpusError`, with the
    line, for a quotation mark that is never closed or followed by more text, for a value of more than
    :data:`~hmi_engine.knowledge.corpus_lines.MAX_LINE_BYTES` characters, and for a row of more or fewer
    values than the header: the rows after it cannot be trusted.
    """
    # The limit is the whole process', which may have set a higher one.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    lines = (line for _, line in whole_lines(path, reading))
    rows = (
        csv.reader(lines, strict=True)
        if kind == "csv"
        else csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    )
    header: list[str] | None = None
    begin = 1
    try:
        for row in rows:
            if header is None:
                header = _checked_header(path, row)
            elif row:
                _check_width(path, begin, row, header)
                yield begin, dict(zip(header, row, strict=True))
            begin = rows.line_num + 1
    except csv.Error as error:
        if "field limit" in str(error):
            raise CorpusError(
                f"{path}:{begin}: a value of more than {csv.field_size_limit()} characters (noticed at line "
                f"{rows.line_num}); split the text, or close its quotation mark"
            ) from error
        raise CorpusError(
            f"{path}:{begin}: {error} (noticed at line {rows.line_num}); is a quotation mark not closed, or "
            'not doubled inside a quoted value ("")?'
        ) from error
    if header is None:
        raise CorpusError(f"{path} is empty; its first line names the columns")


def _checked_header(path: Path, row: list[str]) -> list[str]:
    header = [name.strip() for name in row]
    if len(set(header)) < len(header) or not all(header):
        raise CorpusError(f"{path}:1: the columns must have names that differ, found {header!r:.200}")
    return header


def _check_width(path: Path, begin: int, row: list[str], header: list[str]) -> None:
    if len(row) != len(header):
        raise CorpusError(
            f"{path}:{begin}: {len(row)} values for the {len(header)} columns {', '.join(header)!s:.120}; a "
            "value that holds the separator must be quoted"
        )


def tagged_sentences(path: Path, reading: Reading) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield each sentence's first line, words and tags, of a file as those of CoNLL's shared tasks.

    The first column is the word and the last one its tag; columns are separated by tabs or, in lines without
    one, by spaces. A blank line ends a sentence; ``-DOCSTART-`` lines are left out. Raises
    :class:`CorpusError`, with the line, for one that has no second column.
    """
    words: list[str] = []
    tags: list[str] = []
    begin = 1
    for number, line in whole_lines(path, reading):
        text = line.strip(_SPACES)
        if text.startswith(_DOCUMENT_MARK):
            continue
        if not text:
            if words:
                yield begin, words, tags
            words, tags = [], []
            continue
        columns = text.split("\t") if "\t" in text else text.split(" ")
        if len(columns) < 2 or not columns[0].strip() or not columns[-1].strip():
            raise CorpusError(f"{path}:{number}: expected a word and its tag, found {text!r:.80}")
        if not words:
            begin = number
        words.append(columns[0].strip())
        tags.append(columns[-1].strip())
    if words:
        yield begin, words, tags
