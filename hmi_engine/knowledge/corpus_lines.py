"""The lines of text files, compressed ones and standard input too, in bounded memory."""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import zstandard

from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.corpus_files import STDIN, compression_of
from hmi_engine.knowledge.corpus_report import Reading

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["MAX_LINE_BYTES", "numbered_lines", "whole_lines"]

MAX_LINE_BYTES = 16 << 20
"""A longer line is left out, so that memory stays bounded."""

_ZSTD_WINDOW_BYTES = 128 << 20  # what the zstd tool itself takes without being asked
_ZSTD_INPUT_BYTES = 4096  # decompresses to 128 MiB at most: a block of 128 KiB takes 4 bytes

_UNREADABLE = (OSError, EOFError, zlib.error, zstandard.ZstdError)


def numbered_lines(path: Path, reading: Reading) -> Iterator[tuple[int, str]]:
    """Yield the number and stripped text of every line that is not blank; see :func:`whole_lines`."""
    for number, line in whole_lines(path, reading):
        text = line.strip()
        if text:
            yield number, text


def whole_lines(path: Path, reading: Reading) -> Iterator[tuple[int, str]]:
    """Yield the number and text of every line, its end included; counts bytes as they are read.

    A byte order mark is left out. :data:`~hmi_engine.knowledge.corpus_files.STDIN` is standard input. Raises
    :class:`CorpusError` for a file that is missing, unreadable, damaged or cut off.
    """
    try:
        with _opened(path, reading) as source:
            for number, line in _bounded_lines(path, source, reading):
                yield number, reading.decode(line).lstrip("\ufeff")
    except _UNREADABLE as error:
        raise CorpusError(f"{path}: cannot be read: {error}") from error


@contextmanager
def _opened(path: Path, reading: Reading) -> Iterator[IO[bytes]]:
    """Open a file's text, or standard input's."""
    if path == STDIN:
        yield io.BufferedReader(_CountedBytes(sys.stdin.buffer, reading))
        return
    with path.open("rb", buffering=0) as raw, _decompressed(path, _CountedBytes(raw, reading)) as source:
        yield source


class _CountedBytes(io.RawIOBase):
    """Reads on from another file, and counts in the report what it reads."""

    def __init__(self, source: Any, reading: Reading) -> None:
        self._source = source
        self._report = reading.report

    def readable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Read into ``buffer``."""
        size: int = self._source.readinto(buffer)
        self._report.bytes += size
        return size


class _ZstdFrames(io.RawIOBase):
    """Decompresses frames one after another; unlike the library's own reader, it tells a file cut off."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._library = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._frame = self._library.decompressobj()
        self._is_inside_frame = False
        self._text = memoryview(b"")

    def readable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Read decompressed bytes into ``buffer``; raises EOFError where the file ends inside a frame."""
        while not self._text:
            compressed = self._source.read(_ZSTD_INPUT_BYTES)
            if not compressed:
                if self._is_inside_frame:
                    raise EOFError("the file was cut off: its last frame is not whole")
                return 0
            self._text = memoryview(self._decompress(compressed))
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._text))
        target[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _decompress(self, compressed: bytes) -> bytes:
        parts = []
        while compressed:
            parts.append(self._frame.decompress(compressed))
            self._is_inside_frame = not self._frame.eof
            compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = self._library.decompressobj()
        return b"".join(parts)


def _decompressed(path: Path, raw: io.RawIOBase) -> IO[bytes]:
    buffered = io.BufferedReader(raw)
    match compression_of(path):
        case "gz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=buffered))
        case "zst":
            return io.BufferedReader(_ZstdFrames(buffered))
        case _:
            return buffered


def _bounded_lines(path: Path, source: IO[bytes], reading: Reading) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines; one longer than the limit is left out."""
    number = 0
    while line := source.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = source.readline(MAX_LINE_BYTES)
        reading.refuse(path, number, f"longer than {MAX_LINE_BYTES} bytes; put one text on each line")
