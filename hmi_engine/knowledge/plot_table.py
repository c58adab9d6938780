"""A domain's PLOT on disk: the n-gram index, the rows, and what they were made from; read by memory mapping.

The tensors of the file: ``index`` int64 [C, 2] of (key, row) as `hmi_kernels.plot_index_build` makes it,
``rows`` (with ``row_scales`` or ``codebooks``) in one of :mod:`~hmi_engine.knowledge.row_formats`,
``row_keys`` and ``row_counts`` int64 [N], ``candidate_keys`` and ``candidate_counts`` int64 [M],
``documents`` int64 [D], and optionally ``unigrams`` [V, U, H], where U is 3
of an encoder and 1 of a decoder. All begin on a cache line. Settings are
JSON in the header's metadata. Rows and frequencies lie in one file, so that one rename changes both.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from hmi_engine.errors import StoreCorruptError, StoreVersionError
from hmi_engine.knowledge.frequencies import Frequencies, sum_counts
from hmi_engine.knowledge.general import Family, GeneralInfo, row_slots_of
from hmi_engine.knowledge.mapped_file import DTYPES, map_tensors
from hmi_engine.knowledge.row_formats import RowFormat, stored_shapes
from hmi_engine.knowledge.tensor_file import TensorHeader, read_header, write_tensors

__all__ = [
    "FORMAT_VERSION",
    "PlotMetadata",
    "PlotTable",
    "open_plot",
    "text_digest",
    "unigram_slots_of",
    "write_plot",
]

FORMAT_VERSION = 4
_MAX_HEADER_BYTES = 1 << 16
_TENSORS = (
    "index",
    "rows",
    "row_scales",
    "codebooks",
    "unigrams",
    "row_keys",
    "row_counts",
    "candidate_keys",
    "candidate_counts",
    "documents",
)
_OPTIONAL = {"unigrams", "row_scales", "codebooks"}


class PlotMetadata(BaseModel):
    """What a table was made from.

    ``row_dtype`` is the store's type of float rows, which the unigrams have too; ``row_format`` is how the
    n-gram rows lie here. ``admission_count`` is the least count among its n-grams (0 if it has none),
    ``min_count`` the least count that was asked for, ``corpus_tokens`` the number of tokens counted.
    ``layer_identity`` names the weights of the domain layers that computed the rows, in places without a
    token from ``placeholder_token_id``. ``total_weight``,
    ``corpus_weight`` and ``occurrence_weight`` are those of
    :class:`~hmi_engine.knowledge.frequencies.Frequencies`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Family
    window: int
    plot_layers: int
    hidden_size: int
    vocab_size: int
    placeholder_token_id: int | None
    row_dtype: str
    row_format: RowFormat
    layer_identity: str
    corpus_tokens: int
    min_count: int
    admission_count: int
    total_weight: float = 0.0
    corpus_weight: float = 1.0
    occurrence_weight: float = 1.0

    @property
    def row_slots(self) -> int:
        """Number W of hidden states of a row."""
        return row_slots_of(self.family, self.window)

    @property
    def unigram_slots(self) -> int:
        """Number U of rows of each token of the vocabulary; see :func:`unigram_slots_of`."""
        return unigram_slots_of(self.family)


def unigram_slots_of(family: Family) -> int:
    """Return how many unigram rows a token has: an encoder's is composed of three, a decoder's is one."""
    return 1 if family == "gpt2" else 3


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class PlotTable:
    """A PLOT: ``index`` int64 [C, 2], ``rows`` of the row format and ``unigrams`` [V, U, H] (or None).

    ``rows`` are [N, W, H] of a float type, or int8 with ``row_scales`` float32 [N, W], or product-quantised:
    uint8 [N, W, M] with ``codebooks`` float16 [W, M, 256, H/M]. ``row_keys`` and ``row_counts`` int64 [N],
    by ascending key, tell each row's n-gram and how often the corpus has it; ``candidate_keys`` and
    ``candidate_counts`` int64 [C], likewise, are n-grams that were counted and have no row here.
    ``documents`` int64 [D] are the sorted digests of the corpus' texts (see :func:`text_digest`).
    """

    index: Tensor
    rows: Tensor
    row_keys: Tensor
    row_counts: Tensor
    unigrams: Tensor | None
    documents: Tensor
    metadata: PlotMetadata
    row_scales: Tensor | None = None
    codebooks: Tensor | None = None
    candidate_keys: Tensor = field(default_factory=_none)
    candidate_counts: Tensor = field(default_factory=_none)

    @property
    def frequencies(self) -> Frequencies:
        """Return what the domain knows of its n-grams, with and without a row."""
        keys, counts = sum_counts(
            [(self.row_keys, self.row_counts), (self.candidate_keys, self.candidate_counts)]
        )
        metadata = self.metadata
        return Frequencies(
            keys, counts, metadata.total_weight, metadata.corpus_weight, metadata.occurrence_weight
        )

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
    """Map a table into memory; but for the index, pages are read when they are first used.

    The tensors are private views of the file, which stays open as long as they live, even when it is removed.
    The header is checked here, against ``general`` if given, and that the index refers to rows of the table
    alone: one pass over its 16 bytes a slot, milliseconds for a million rows (``verify`` checks all
    contents). Raises :class:`StoreCorruptError`, naming the file, and :class:`StoreVersionError` for a newer
    format.
    """
    header = read_header(path, max_header_bytes=_MAX_HEADER_BYTES)
    metadata = _checked_metadata(path, header)
    described = {entry.name: (DTYPES.get(entry.dtype), entry.shape) for entry in header.entries}
    problem = _find_misfit(described, metadata) or _find_foreign(metadata, general)
    if problem:
        raise StoreCorruptError(f"{path}: {problem}")
    tensors = map_tensors(path, header)
    num_rows = len(tensors["row_keys"])
    # A kernel that met such a row would fail the whole batch, and with it the tenants of other domains.
    stray = _find_stray_row(tensors["index"], num_rows)
    if stray is not None:
        raise StoreCorruptError(
            f"{path}: the index refers to row {stray}, but the table has {num_rows} rows; run `hmi verify`"
        )
    return PlotTable(**{name: tensors.get(name) for name in _TENSORS}, metadata=metadata)  # type: ignore[arg-type]


def _checked_metadata(path: Path, header: TensorHeader) -> PlotMetadata:
    version = header.metadata.get("format_version", "")
    if header.metadata.get("format") != "hmi-plot" or not version.isdecimal():
        raise StoreCorruptError(f"{path}: no PLOT file of HMI")
    if int(version) > FORMAT_VERSION:
        raise StoreVersionError(
            f"{path}: format version {int(version)}, this HMI reads up to {FORMAT_VERSION}; upgrade HMI"
        )
    if int(version) < FORMAT_VERSION:
        raise StoreVersionError(
            f"{path}: format version {int(version)} is from a release that was never published; make the "
            "store again"
        )
    try:
        return PlotMetadata.model_validate_json(header.metadata.get("hmi", ""))
    except ValidationError as error:
        raise StoreCorruptError(f"{path}: metadata: {error.errors()[0]['msg']}") from error


def _find_misfit(
    described: dict[str, tuple[torch.dtype | None, tuple[int, ...]]], metadata: PlotMetadata
) -> str | None:
    """Return what is wrong with the names, dtypes and shapes of a table's tensors."""
    missing = {*_TENSORS} - _OPTIONAL - described.keys()
    if missing or described.keys() - {*_TENSORS}:
        return f"tensors are {sorted(described)}, expected {list(_TENSORS)}"
    if metadata.row_dtype not in ("float16", "float32"):
        return f"row_dtype is {metadata.row_dtype!r}"
    capacity, num_rows = described["index"][1][:1], described["row_keys"][1][:1]
    expected = _expected_tensors(described, metadata)
    if described.keys() != expected.keys():
        return f"tensors are {sorted(described)}, {metadata.row_format} rows want {sorted(expected)}"
    for name, (dtype, shape) in described.items():
        expected_dtype, expected_shape = expected[name]
        if dtype is None or not shape or (dtype, shape) != (expected_dtype, expected_shape):
            return f"{name} is {dtype} {list(shape)}, expected {expected_dtype} {list(expected_shape)}"
    size = capacity[0]
    if size & (size - 1) or size < 2 or num_rows[0] > size:
        return f"an index of {size} entries for {num_rows[0]} rows; the capacity is a power of two from 2 on"
    return None


def _find_stray_row(index: Tensor, num_rows: int) -> int | None:
    """Return a row that an index int64 [C, 2] refers to though it is not among ``num_rows``."""
    slots = index.numpy()
    rows = slots[:, 1].view(np.uint64)  # a negative number becomes a great one, so that one pass finds both
    if int(rows.max()) < num_rows:
        return None
    stray = slots[(rows >= num_rows) & (slots[:, 0] != 0), 1]  # what an empty slot says is never read
    return int(stray[0]) if len(stray) else None


_Described = tuple[torch.dtype | None, tuple[int, ...]]


def _expected_tensors(described: dict[str, _Described], metadata: PlotMetadata) -> dict[str, _Described]:
    """Return the dtypes and shapes of all tensors, given the lengths that only the tensors tell."""

    def length(name: str) -> tuple[int, ...]:
        return described[name][1][:1]

    num_rows = length("row_keys")
    expected: dict[str, _Described] = {
        "index": (torch.int64, (*length("index"), 2)),
        "row_keys": (torch.int64, num_rows),
        "row_counts": (torch.int64, num_rows),
        "candidate_keys": (torch.int64, length("candidate_keys")),
        "candidate_counts": (torch.int64, length("candidate_keys")),
        "documents": (torch.int64, length("documents")),
    }
    rows = num_rows[0] if num_rows else 0
    expected.update(stored_shapes(metadata.row_format, rows, metadata.row_slots, metadata.hidden_size))
    if "unigrams" in described:
        unigram_dtype = getattr(torch, metadata.row_dtype)
        expected["unigrams"] = (
            unigram_dtype,
            (metadata.vocab_size, metadata.unigram_slots, metadata.hidden_size),
        )
    return expected


def _find_foreign(metadata: PlotMetadata, general: GeneralInfo | None) -> str | None:
    """Return how a table differs from what the store's base model asks for."""
    for name in (
        "family",
        "window",
        "plot_layers",
        "hidden_size",
        "vocab_size",
        "placeholder_token_id",
        "row_dtype",
    ):
        found = getattr(metadata, name)
        if general is not None and found != getattr(general, name):
            return f"made for {name} {found}, the store has {getattr(general, name)}"
    return None
