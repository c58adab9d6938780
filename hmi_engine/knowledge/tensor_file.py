"""safetensors files whose order, alignment and checksum we decide, written in one pass.

The format is that of https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the
tensors' bytes without holes), so any safetensors library reads these files. A writer of our own gives what
the library's does not: tensors in the order given (one layer of a tenant is one read), rows that begin on a
cache line, the SHA-256 without a second pass, and no second copy of a large table in memory.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hmi_engine.errors import StoreCorruptError, StoreError
from hmi_engine.knowledge.atomic import atomic_write

__all__ = [
    "ALIGNMENT",
    "HeaderTooLargeError",
    "TensorEntry",
    "TensorHeader",
    "file_sha256",
    "parse_header",
    "read_header",
    "write_tensors",
]

ALIGNMENT = 64
"""The data section begins at a multiple of this many bytes: a cache line, and enough for every dtype."""

_DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in _DTYPE_NAMES.items()}
_CHUNK_BYTES = 4 << 20
_PADDING = "padding."


class HeaderTooLargeError(ValueError):
    """A header takes more bytes than readers of the file take; whoever writes it says what to do."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: ``start`` and ``end`` are byte offsets in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorHeader:
    """The checked header of a file: entries in the order of their bytes, padding left out."""

    data_start: int
    data_bytes: int
    metadata: Mapping[str, str]
    entries: tuple[TensorEntry, ...]


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    align_tensors: bool = False,
    max_header_bytes: int | None = None,
    sync: bool = True,
    explain: Callable[[OSError, Path], StoreError] | None = None,
) -> str:
    """Write contiguous CPU tensors of the dtypes above atomically, in the order given.

    With ``align_tensors`` every tensor begins at a multiple of :data:`ALIGNMENT` bytes; the gaps are uint8
    tensors named ``padding.*``, as the format allows no holes. Returns the file's SHA-256 in hex. Raises what
    :func:`~hmi_engine.knowledge.atomic.atomic_write` raises, and before anything is written
    :class:`HeaderTooLargeError` where :func:`read_header` would refuse the header for ``max_header_bytes``.
    """
    placed = _with_padding(tensors) if align_tensors else dict(tensors)
    header = _header_bytes(placed, metadata)
    size = len(header) - 8
    if max_header_bytes is not None and size > max_header_bytes:
        raise HeaderTooLargeError(f"a header of {size} bytes, of at most {max_header_bytes}")
    digest = hashlib.sha256()

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            for piece in _in_pieces(header, *map(_tensor_bytes, placed.values())):
                digest.update(piece)
                file.write(piece)

    atomic_write(path, write, sync=sync, explain=explain)
    return digest.hexdigest()


def _in_pieces(*chunks: memoryview) -> Iterator[memoryview | bytearray]:
    """Cut large chunks and join small ones: each piece costs calls, and threads the turn of one another."""
    joined = bytearray()
    for chunk in chunks:
        if len(joined) + len(chunk) > _CHUNK_BYTES:
            yield joined
            joined = bytearray()
        if len(chunk) <= _CHUNK_BYTES:
            joined += chunk
            continue
        for start in range(0, len(chunk), _CHUNK_BYTES):
            yield chunk[start : start + _CHUNK_BYTES]
    yield joined


def _with_padding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    placed: dict[str, Tensor] = {}
    offset = 0
    for name, tensor in tensors.items():
        gap = -offset % ALIGNMENT
        if gap:
            placed[f"{_PADDING}{name}"] = torch.zeros(gap, dtype=torch.uint8)
        placed[name] = tensor
        offset += gap + tensor.numel() * tensor.element_size()
    return placed


def _header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> memoryview:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _tensor_bytes(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().contiguous().numpy().data.cast("B")


def read_header(path: Path, *, max_header_bytes: int) -> TensorHeader:
    """Read and check a file's header; the tensors' bytes are not touched.

    Raises :class:`StoreCorruptError`, naming the file, if it is missing, cut short, or if the header does not
    describe exactly the bytes that follow it.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            size = _header_size(path, file.read(8), file_bytes, max_header_bytes)
            header = file.read(size)
    except OSError as error:
        raise StoreCorruptError(f"{path}: cannot be read: {error.strerror or error}") from error
    return _parsed_header(path, header, file_bytes)


def parse_header(
    path: Path, start: memoryview, file_bytes: int, *, max_header_bytes: int
) -> TensorHeader | None:
    """Return what :func:`read_header` does, from the first bytes of a file; None if the header goes on."""
    size = _header_size(path, start[:8], file_bytes, max_header_bytes)
    return None if 8 + size > len(start) else _parsed_header(path, start[8 : 8 + size], file_bytes)


def _header_size(path: Path, prefix: bytes | memoryview, file_bytes: int, max_header_bytes: int) -> int:
    size = int.from_bytes(prefix, "little")
    if not 2 <= size <= min(max_header_bytes, file_bytes - 8):
        raise StoreCorruptError(
            f"{path}: header of {size} bytes in a file of {file_bytes}; it is cut short or is no safetensors "
            "file"
        )
    return size


def _parsed_header(path: Path, text: bytes | memoryview, file_bytes: int) -> TensorHeader:
    try:
        header = json.loads(bytes(text))
    except (ValueError, RecursionError) as error:
        raise StoreCorruptError(f"{path}: the header is no JSON: {error}") from error
    data_start = 8 + len(text)
    return _checked_header(path, header, data_start, file_bytes - data_start)


def _checked_header(path: Path, header: object, data_start: int, data_bytes: int) -> TensorHeader:
    if not isinstance(header, dict):
        raise StoreCorruptError(f"{path}: the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StoreCorruptError(f"{path}: __metadata__ does not map text to text")
    entries = sorted(
        (_checked_entry(path, name, entry) for name, entry in header.items()),
        key=lambda entry: (entry.start, entry.end),
    )
    offset = 0
    for entry in entries:
        if entry.start != offset:
            raise StoreCorruptError(f"{path}: {entry.name} begins at byte {entry.start}, expected {offset}")
        offset = entry.end
    if offset != data_bytes:
        raise StoreCorruptError(f"{path}: tensors take {offset} bytes, the file holds {data_bytes}")
    kept = tuple(entry for entry in entries if not entry.name.startswith(_PADDING))
    return TensorHeader(data_start, data_bytes, metadata, kept)


def _checked_entry(path: Path, name: str, entry: object) -> TensorEntry:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if (
            dtype in _ITEM_BYTES
            and all(type(size) is int and size >= 0 for size in (*shape, start))
            and end - start == math.prod(shape) * _ITEM_BYTES[dtype]
        ):
            return TensorEntry(name, dtype, tuple(shape), start, end)
    raise StoreCorruptError(f"{path}: the entry of tensor {name!r:.80} is malformed: {entry!r:.200}")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex, reading it in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
