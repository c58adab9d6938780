"""Text and labelled examples, streamed from files of any size."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

from hmi_engine.errors import CorpusError

__all__ = [
    "SUFFIXES",
    "BadLine",
    "Corpus",
    "CorpusReport",
    "Example",
    "check_not_empty",
    "corpus_bytes",
    "corpus_files",
    "stream_examples",
    "stream_texts",
]

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
"""File formats: one text a line, or one JSON object a line, each optionally compressed."""

Corpus: TypeAlias = str | Path | Iterable[str] | Iterable[Path]
"""A ``str`` or Path alone is a path (a folder stands for its files), and so is each Path of an iterable; each
``str`` of an iterable is a text."""

MAX_BAD_LINES = 100
"""How many bad lines a report describes; the others are counted."""

_MAX_LINE_BYTES = 16 << 20


class BadLine(NamedTuple):
    """A line that was left out: its file, its number from 1, and why."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        """Return ``path:line: reason``."""
        return f"{self.path}:{self.line}: {self.reason}"


class Example(NamedTuple):
    """A labelled text and its line number in the file."""

    text: str
    label: str
    line: int


@dataclass
class CorpusReport:
    """What a stream has read so far.

    ``bytes`` counts bytes of files as they lie on the disk (compressed ones for .gz, in steps), of UTF-8
    where the corpus is texts. ``bad_lines`` holds the first hundred of ``num_bad_lines``.
    """

    texts: int = 0
    characters: int = 0
    bytes: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)
    num_bad_lines: int = 0

    def add_text(self, text: str) -> None:
        """Count a text."""
        self.texts += 1
        self.characters += len(text)

    def add_bad_line(self, bad_line: BadLine) -> None:
        """Count a bad line, and keep it if it is among the first."""
        self.num_bad_lines += 1
        if len(self.bad_lines) < MAX_BAD_LINES:
            self.bad_lines.append(bad_line)


@dataclass(frozen=True)
class _Sink:
    """Where what was read is told."""

    report: CorpusReport
    on_bad_line: Callable[[BadLine], None] | None

    def refuse(self, path: Path, line: int, reason: str) -> None:
        bad_line = BadLine(path, line, reason)
        self.report.add_bad_line(bad_line)
        if self.on_bad_line:
            self.on_bad_line(bad_line)


def stream_texts(
    corpus: Corpus,
    *,
    text_field: str = "text",
    on_bad_line: Callable[[BadLine], None] | None = None,
    report: CorpusReport | None = None,
) -> Iterator[str]:
    """Yield the texts of a corpus, one line in memory at a time.

    ``corpus`` is a path, or an iterable of Paths, or an iterable of texts (see :data:`Corpus`). Of .txt files
    every line that is not blank is a text, stripped; of .jsonl files the string in ``text_field`` of every
    line. A line without one goes to ``report`` and ``on_bad_line``, and the others go on. Invalid UTF-8 is
    replaced. Raises :class:`CorpusError` for a missing, unreadable or unsupported file.
    """
    sink = _Sink(CorpusReport() if report is None else report, on_bad_line)
    for item in [corpus] if isinstance(corpus, str | Path) else corpus:
        if isinstance(item, Path) or item is corpus:
            for path in corpus_files(Path(item)):
                yield from _texts_of_file(path, text_field, sink)
        elif isinstance(item, str):
            sink.report.add_text(item)
            sink.report.bytes += len(item.encode("utf-8", "replace"))
            yield item
        else:
            raise CorpusError(
                f"a corpus holds texts (str) or paths (Path), not {type(item).__name__}: {item!r:.80}"
            )


def stream_examples(
    path: str | Path,
    text_field: str = "text",
    label_field: str = "label",
    *,
    on_bad_line: Callable[[BadLine], None] | None = None,
    report: CorpusReport | None = None,
) -> Iterator[Example]:
    """Yield the labelled texts of a .jsonl or .jsonl.gz file, one line in memory at a time.

    The label is a string, or an integer or boolean, of which the decimal digits or ``true`` and ``false`` are
    taken. A line without text or label goes to ``report`` and ``on_bad_line``, and the others go on. Raises
    :class:`CorpusError` for a missing, unreadable or unsupported file.
    """
    path = Path(path)
    sink = _Sink(CorpusReport() if report is None else report, on_bad_line)
    if not _suffix(path).startswith(".jsonl"):
        raise CorpusError(f"{path}: labelled examples are read from .jsonl and .jsonl.gz files")
    for number, line in _lines(path, sink):
        found = _parse_object(line)
        reason = found if isinstance(found, str) else _find_fault(found, text_field, label_field)
        if reason or isinstance(found, str):
            sink.refuse(path, number, str(reason))
            continue
        text, label = found[text_field], found[label_field]
        sink.report.add_text(text)
        yield Example(text, label if isinstance(label, str) else json.dumps(label), number)


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
        if not isinstance(path, Path):
            return None
        total += sum(file.stat().st_size for file in corpus_files(path))
    return total


def corpus_files(path: Path) -> list[Path]:
    """Return the files that a path stands for: itself, or, sorted, those below a folder with a known suffix.

    Hidden files and folders are left out. Raises :class:`CorpusError` where there is none.
    """
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.name.lower().endswith(SUFFIXES)
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise CorpusError(f"folder {path} holds no {', '.join(SUFFIXES)} file")
        return files
    if not path.exists():
        raise CorpusError(f"{path} does not exist")
    _suffix(path)
    return [path]


def _suffix(path: Path) -> str:
    name = path.name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise CorpusError(f"{path}: the format is told from the name, which must end in {', '.join(SUFFIXES)}")


def _texts_of_file(path: Path, text_field: str, sink: _Sink) -> Iterator[str]:
    is_json = _suffix(path).startswith(".jsonl")
    for number, line in _lines(path, sink):
        if is_json:
            found = _parse_object(line)
            reason = found if isinstance(found, str) else _find_fault(found, text_field)
            if reason or isinstance(found, str):
                sink.refuse(path, number, str(reason))
                continue
            text = found[text_field]
        else:
            text = line
        sink.report.add_text(text)
        yield text


def _parse_object(line: str) -> dict[str, Any] | str:
    """Return a line's JSON object, or, as text, why there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return found if isinstance(found, dict) else f"a JSON {type(found).__name__}, expected an object"


def _find_fault(found: dict[str, Any], text_field: str, label_field: str | None = None) -> str | None:
    text = found.get(text_field)
    if not isinstance(text, str):
        return f"no string in field {text_field!r}; the fields are {sorted(found)!r:.200}"
    if not text.strip():
        return f"field {text_field!r} is blank"
    if label_field is None:
        return None
    label = found.get(label_field)
    if not isinstance(label, str | int) or label == "":
        return f"no label in field {label_field!r}: {label!r:.80}"
    return None


def _lines(path: Path, sink: _Sink) -> Iterator[tuple[int, str]]:
    """Yield the number and stripped text of every line that is not blank; counts bytes as they are read."""
    counted = sink.report.bytes
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as source:
            for number, line in _bounded_lines(path, source, sink):
                sink.report.bytes = counted + raw.tell()
                text = line.decode("utf-8", "replace").lstrip("\ufeff").strip()
                if text:
                    yield number, text
            sink.report.bytes = counted + raw.tell()
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: cannot be read: {error}") from error


def _decompressed(path: Path, raw: IO[bytes]) -> AbstractContextManager[IO[bytes] | gzip.GzipFile]:
    return gzip.GzipFile(fileobj=raw) if _suffix(path).endswith(".gz") else nullcontext(raw)


def _bounded_lines(path: Path, source: IO[bytes] | gzip.GzipFile, sink: _Sink) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines; one longer than the limit is left out, so that memory stays bounded."""
    number = 0
    while line := source.readline(_MAX_LINE_BYTES):
        number += 1
        if len(line) < _MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = source.readline(_MAX_LINE_BYTES)
        sink.refuse(path, number, f"longer than {_MAX_LINE_BYTES} bytes; put one text on each line")
