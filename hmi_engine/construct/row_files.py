"""Rows on their way into a table: files that grow batch by batch, and are good up to any kill or power cut.

Beside the rows lies a log with one record a batch: how many rows are done, and a checksum of the batch's
bytes. A batch counts if its bytes fit its record, so nothing depends on the order in which the system brings
the files to the disk, and a batch that a power cut left as zeros is computed again.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hmi_engine.knowledge.atomic import storage_error
from hmi_engine.knowledge.mapped_file import map_file, view_tensor

__all__ = ["RowWriter"]

_RECORD = struct.Struct("<QI")  # rows done with this batch, CRC-32 of its bytes
_LOG = "batches.log"
_PIECE_BYTES = 4 << 20


class RowWriter:
    """Appends batches of rows to one raw file for each tensor, and maps the files when all rows are there.

    No file stays open between calls. One writer at a time: the folder's lock sees to it.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Find out what ``folder`` already has of the tensors ``shapes`` (dtype and shape [N, ...] by name).

        Raises ValueError where the shapes do not agree on N, and
        :func:`~hmi_engine.knowledge.atomic.storage_error` where the folder cannot be read and written.
        """
        self._folder = folder
        self._shapes = dict(sorted(shapes.items()))
        if len({shape[0] for _, shape in self._shapes.values()}) != 1:
            raise ValueError(f"tensors of one table have the same number of rows, not {dict(shapes)}")
        self._row_bytes = {
            name: dtype.itemsize * torch.Size(shape[1:]).numel()
            for name, (dtype, shape) in self._shapes.items()
        }
        self.num_rows = next(iter(self._shapes.values()))[1][0]
        self._records = 0
        self.done = 0
        """Rows that are there, from the first on; whole batches, as they were appended."""
        try:
            self._read_log()
        except OSError as error:
            raise storage_error(error, folder) from error

    def append(self, batch: Mapping[str, Tensor]) -> None:
        """Add the next rows and bring them to the disk.

        ``batch`` holds a tensor [M, ...] for each name, of the table's dtypes. Raises ValueError where it
        does not, or where the rows are more than the table's, and :class:`StoreFullError` without room: what
        was appended before is kept, and the batch can be appended again.
        """
        num_rows = self._check_batch(batch)
        checksum = 0
        try:
            for name, row_bytes in self._row_bytes.items():
                content = _content(batch[name])
                checksum = zlib.crc32(content, checksum)
                _write(self._file(name), self.done * row_bytes, content)
            record = memoryview(_RECORD.pack(self.done + num_rows, checksum))
            _write(self._folder / _LOG, self._records * _RECORD.size, record)
        except OSError as error:
            raise storage_error(
                error,
                self._folder,
                kept=f"{self.done} of {self.num_rows} rows are done and kept; free some space and run the "
                "same command again",
            ) from error
        self.done += num_rows
        self._records += 1

    def tensors(self) -> dict[str, Tensor]:
        """Return the finished tensors by name, as private views of the files.

        They stay good when the folder is removed. Raises RuntimeError while rows are missing.
        """
        if self.done != self.num_rows:
            raise RuntimeError(f"{self.done} of {self.num_rows} rows are done")
        return {name: self._view(name, dtype, shape) for name, (dtype, shape) in self._shapes.items()}

    def _view(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        num_bytes = self.num_rows * self._row_bytes[name]
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        return view_tensor(map_file(self._file(name), num_bytes), 0, dtype, shape)

    def _check_batch(self, batch: Mapping[str, Tensor]) -> int:
        described = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in batch.items()}
        expected = {name: (dtype, shape[1:]) for name, (dtype, shape) in self._shapes.items()}
        lengths = {len(tensor) for tensor in batch.values()}
        if described != expected or len(lengths) != 1:
            raise ValueError(f"a batch of {described} with {sorted(lengths)} rows; the table has {expected}")
        (num_rows,) = lengths
        if not 0 < num_rows <= self.num_rows - self.done:
            raise ValueError(f"{num_rows} rows after {self.done} of {self.num_rows}")
        return num_rows

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.rows"

    def _read_log(self) -> None:
        """Count the batches whose bytes are what their records say, and cut off what follows them."""
        log = self._folder / _LOG
        content = log.read_bytes() if log.exists() else b""
        for done, checksum in _RECORD.iter_unpack(content[: len(content) // _RECORD.size * _RECORD.size]):
            if not self.done < done <= self.num_rows or self._checksum(done) != checksum:
                break
            self.done = done
            self._records += 1
        _cut(log, self._records * _RECORD.size)
        for name, row_bytes in self._row_bytes.items():
            _cut(self._file(name), self.done * row_bytes)

    def _checksum(self, end: int) -> int:
        checksum = 0
        for name, row_bytes in self._row_bytes.items():
            for piece in _read(self._file(name), self.done * row_bytes, end * row_bytes):
                checksum = zlib.crc32(piece, checksum)
        return checksum


def _content(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def _write(path: Path, offset: int, content: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        while content:
            written = os.pwrite(descriptor, content[:_PIECE_BYTES], offset)
            content, offset = content[written:], offset + written
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, start: int, end: int) -> Iterator[bytes]:
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (piece := file.read(min(_PIECE_BYTES, end - start))):
            start += len(piece)
            yield piece


def _cut(path: Path, num_bytes: int) -> None:
    if path.exists():
        os.truncate(path, num_bytes)
