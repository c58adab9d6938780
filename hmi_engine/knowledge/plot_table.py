"""A domain's PLOT on disk: the n-gram index, the rows, and what they were made from; read by memory mapping.

The tensors of the file: ``index`` int64 [C, 2] of (key, row) as `hmi_kernels.plot_index_build` makes it,
``rows`` [N, W, H], ``row_keys`` and ``row_counts`` int64 [N], ``documents`` int64 [D], and optionally
``unigrams`` [V, H]. All begin on a cache line. Settings are JSON in the header's metadata.
"""

import hashlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from hmi_engine.errors import StoreCorruptError, StoreVersionError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.tensor_file import TensorEntry, TensorHeader, read_header, write_tensors

__all__ = ["FORMAT_VERSION", "PlotMetadata", "PlotTable", "open_plot", "text_digest", "write_plot"]

FORMAT_VERSION = 1
_MAX_HEADER_BYTES = 1 << 16
_DTYPES = {"I64": torch.int64, "F16": torch.float16, "F32": torch.float32}
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python's module from 3.13 on
_TENSORS = ("index", "rows", "unigrams", "row_keys", "row_counts", "documents")


class PlotMetadata(BaseModel):
    """What a table was made from.

    ``admission_count`` is the least count among its n-grams (0 if it has none), ``min_count`` the least
    count that was asked for, ``corpus_tokens`` the number of tokens counted. ``layer_identity`` names the
    weights of the domain layers that computed the rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: int
    plot_layers: int
    hidden_size: int
    vocab_size: int
    row_dtype: str
    layer_identity: str
    corpus_tokens: int
    min_count: int
    admission_count: int


@dataclass(frozen=True, eq=False)
class PlotTable:
    """A PLOT: ``index`` int64 [C, 2], ``rows`` [N, W, H] and ``unigrams`` [V, H] (or None) of the row dtype.

    ``row_keys`` and ``row_counts`` int64 [N] tell each row's n-gram and how often the corpus has it.
    ``documents`` int64 [D] are the sorted digests of the corpus' texts (see :func:`text_digest`).
    """

    index: Tensor
    rows: Tensor
    row_keys: Tensor
    row_counts: Tensor
    unigrams: Tensor | None
    documents: Tensor
    metadata: PlotMetadata

    def contains_document(self, texts: Sequence[str]) -> Tensor:
        """Return bool [len(texts)]: was this text among those that the table's counts come from?

        Training asks, so that a text is not looked up in counts that it helped to make. A wrong yes has a
        chance of about D / 2**64; there is no wrong no.
        """
        digests = torch.tensor([text_digest(text) for text in texts], dtype=torch.int64)
        if not len(self.documents) or not len(digests):
            return torch.zeros(len(digests), dtype=torch.bool)
        places = torch.searchsorted(self.documents, digests).clamp_(max=len(self.documents) - 1)
        return self.documents[places] == digests


def text_digest(text: str) -> int:
    """Return a signed 64-bit digest of a text (BLAKE2b), the same on every machine."""
    encoded = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little", signed=True)


def write_plot(path: Path, table: PlotTable) -> str:
    """Write a table atomically and return the file's SHA-256 in hex.

    Raises ValueError where the tensors do not have the shapes and dtypes of :class:`PlotTable`, and as
    :func:`~hmi_engine.knowledge.atomic.atomic_write`.
    """
    tensors = {name: getattr(table, name) for name in _TENSORS if getattr(table, name) is not None}
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    problem = _find_misfit(described, table.metadata)
    if problem:
        raise ValueError(problem)
    metadata = {
        "format": "hmi-plot",
        "format_version": str(FORMAT_VERSION),
        "hmi": table.metadata.model_dump_json(),
    }
    return write_tensors(path, tensors, metadata, align_tensors=True)


def open_plot(path: Path, general: GeneralInfo | None = None) -> PlotTable:
    """Map a table into memory: milliseconds whatever its size; pages are read when they are first used.

    The tensors are private views of the file, which stays open as long as they live, even when it is removed.
    Only the header is checked here (``verify`` checks contents), against ``general`` if given. Raises
    :class:`StoreCorruptError`, naming the file, and :class:`StoreVersionError` for a newer format.
    """
    header = read_header(path, max_header_bytes=_MAX_HEADER_BYTES)
    metadata = _checked_metadata(path, header)
    described = {entry.name: (_DTYPES.get(entry.dtype), entry.shape) for entry in header.entries}
    problem = _find_misfit(described, metadata) or _find_foreign(metadata, general)
    if problem:
        raise StoreCorruptError(f"{path}: {problem}")
    tensors = _map_tensors(path, header)
    return PlotTable(**{name: tensors.get(name) for name in _TENSORS}, metadata=metadata)  # type: ignore[arg-type]


def _checked_metadata(path: Path, header: TensorHeader) -> PlotMetadata:
    version = header.metadata.get("format_version", "")
    if header.metadata.get("format") != "hmi-plot" or not version.isdecimal():
        raise StoreCorruptError(f"{path}: no PLOT file of HMI")
    if int(version) > FORMAT_VERSION:
        raise StoreVersionError(
            f"{path}: format version {int(version)}, this HMI reads up to {FORMAT_VERSION}; upgrade HMI"
        )
    try:
        return PlotMetadata.model_validate_json(header.metadata.get("hmi", ""))
    except ValidationError as error:
        raise StoreCorruptError(f"{path}: metadata: {error.errors()[0]['msg']}") from error


def _find_misfit(
    described: dict[str, tuple[torch.dtype | None, tuple[int, ...]]], metadata: PlotMetadata
) -> str | None:
    """Return what is wrong with the names, dtypes and shapes of a table's tensors."""
    missing = {*_TENSORS} - {"unigrams"} - described.keys()
    if missing or described.keys() - {*_TENSORS}:
        return f"tensors are {sorted(described)}, expected {list(_TENSORS)}"
    row_dtype = {"float16": torch.float16, "float32": torch.float32}.get(metadata.row_dtype)
    capacity, num_rows = described["index"][1][:1], described["row_keys"][1][:1]
    expected = {
        "index": (torch.int64, (*capacity, 2)),
        "rows": (row_dtype, (*num_rows, metadata.window, metadata.hidden_size)),
        "unigrams": (row_dtype, (metadata.vocab_size, metadata.hidden_size)),
        "row_keys": (torch.int64, num_rows),
        "row_counts": (torch.int64, num_rows),
        "documents": (torch.int64, described["documents"][1][:1]),
    }
    for name, (dtype, shape) in described.items():
        expected_dtype, expected_shape = expected[name]
        if dtype is None or not shape or (dtype, shape) != (expected_dtype, expected_shape):
            return f"{name} is {dtype} {list(shape)}, expected {expected_dtype} {list(expected_shape)}"
    size = capacity[0]
    if size & (size - 1) or size == 0 or num_rows[0] > size:
        return f"an index of {size} entries for {num_rows[0]} rows; the capacity is a power of two"
    return None


def _find_foreign(metadata: PlotMetadata, general: GeneralInfo | None) -> str | None:
    """Return how a table differs from what the store's base model asks for."""
    for name in ("window", "plot_layers", "hidden_size", "vocab_size", "row_dtype"):
        found = getattr(metadata, name)
        if general is not None and found != getattr(general, name):
            return f"made for {name} {found}, the store has {getattr(general, name)}"
    return None


def _map_tensors(path: Path, header: TensorHeader) -> dict[str, Tensor]:
    file_bytes = header.data_start + header.data_bytes
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Private and writable, because torch warns of read-only buffers; nothing is ever written.
            # Without MAP_NORESERVE such a mapping would count as if all of it were written.
            mapping = mmap.mmap(
                descriptor,
                file_bytes,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise StoreCorruptError(f"{path}: cannot be mapped: {error}") from error
    return {entry.name: _view(mapping, header.data_start, entry) for entry in header.entries}


def _view(mapping: mmap.mmap, data_start: int, entry: TensorEntry) -> Tensor:
    dtype = _DTYPES[entry.dtype]
    if entry.end == entry.start:
        return torch.empty(entry.shape, dtype=dtype)
    count = (entry.end - entry.start) // dtype.itemsize
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=data_start + entry.start).view(
        entry.shape
    )
