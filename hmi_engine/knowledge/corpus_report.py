"""What reading a corpus has met: texts, lines that are none, and bytes that are no UTF-8."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

__all__ = ["MAX_BAD_LINES", "BadLine", "CorpusReport", "Reading"]

MAX_BAD_LINES = 100
"""How many bad lines a report describes; the others are counted."""


class BadLine(NamedTuple):
    """A line (of Parquet: a row) that was left out: its file, its number from 1, and why."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        """Return ``path:line: reason``."""
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass
class CorpusReport:
    """What a stream has read so far.

    ``bytes`` counts bytes of files as they lie on the disk (in steps where they are compressed), of UTF-8
    where the corpus is texts or standard input. ``num_replaced`` counts the lines and texts with bytes that
    are no UTF-8, or with half a surrogate pair: U+FFFD stands in their place. ``bad_lines`` holds the first
    hundred of ``num_bad_lines``.
    """

    texts: int = 0
    characters: int = 0
    bytes: int = 0
    num_replaced: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)
    num_bad_lines: int = 0

    def add_bad_line(self, bad_line: BadLine) -> None:
        """Count a bad line, and keep it if it is among the first."""
        self.num_bad_lines += 1
        if len(self.bad_lines) < MAX_BAD_LINES:
            self.bad_lines.append(bad_line)


@dataclass(frozen=True)
class Reading:
    """One pass over a corpus: makes text of bytes, and tells what it meets to whoever asked."""

    report: CorpusReport
    on_bad_line: Callable[[BadLine], None] | None

    def decode(self, line: bytes) -> str:
        """Return the UTF-8 text, U+FFFD in the place of what is none."""
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.report.num_replaced += 1
            return line.decode("utf-8", "replace")

    def accept(self, text: str) -> str:
        """Count a text, and return it as one that can be encoded: half a surrogate pair cannot."""
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError:
            self.report.num_replaced += 1
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        self.report.texts += 1
        self.report.characters += len(text)
        return text

    def refuse(self, path: Path, line: int, reason: str) -> None:
        """Leave a line out."""
        bad_line = BadLine(path, line, reason)
        self.report.add_bad_line(bad_line)
        if self.on_bad_line:
            self.on_bad_line(bad_line)
