"""What a domain was asked for in traffic, and its file: from an engine to what updates the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from hmi_engine.errors import StoreCorruptError, StoreVersionError
from hmi_engine.knowledge.mapped_file import map_tensors
from hmi_engine.knowledge.tensor_file import TensorHeader, read_header, write_tensors

__all__ = ["FORMAT_VERSION", "TrafficCounts", "read_traffic", "write_traffic"]

FORMAT_VERSION = 1
_FORMAT = "hmi-traffic"
_MAX_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, eq=False)
class TrafficCounts:
    """What the traffic of one domain asked for, since it was last drained.

    Attributes:
        keys: int64 [N], ascending and distinct n-gram keys: whole windows, and for windows of three also the
            two bigrams that a missing one is composed of.
        weights: float64 [N], positive: how often each occurred, never too much; estimates under sampling.
        occurrences: of all n-grams together, those that were forgotten for want of room too.
        max_error: no weight is too low by more (beside the chance of sampling).
        tokens: tokens of the traffic; exact, as are the next two.
        windows: windows that were looked up.
        hits: those that a table held.
    """

    keys: Tensor
    weights: Tensor
    occurrences: float
    max_error: float
    tokens: int
    windows: int
    hits: int

    def __post_init__(self) -> None:
        """Raises ValueError where keys and weights are not as described, or a number is impossible."""
        problem = _find_problem(self)
        if problem:
            raise ValueError(problem)

    @classmethod
    def none(cls) -> TrafficCounts:
        """Return the counts of a domain that nobody asked."""
        empty = torch.empty(0, dtype=torch.int64)
        return cls(empty, empty.double(), 0.0, 0.0, 0, 0, 0)


def _find_problem(counts: TrafficCounts) -> str | None:
    keys, weights = counts.keys, counts.weights
    described = [(keys.dtype, keys.shape), (weights.dtype, weights.shape)]
    if keys.dim() != 1 or described != [(torch.int64, keys.shape), (torch.float64, keys.shape)]:
        return f"keys must be int64 [N] and weights float64 [N], not {described}"
    if len(keys) and (int(keys[0]) <= 0 or bool((keys.diff() <= 0).any())):
        return "keys must be positive, ascending and distinct"
    if not bool((weights > 0).all()) or not bool(weights.isfinite().all()):
        return "weights must be positive and finite"
    if min(counts.occurrences, counts.max_error, counts.tokens, counts.windows, counts.hits) < 0:
        return "a number is negative"
    if counts.hits > counts.windows:
        return f"{counts.hits} of {counts.windows} windows were hits"
    return None


class _Numbers(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    occurrences: float = Field(ge=0)
    max_error: float = Field(ge=0)
    tokens: int
    windows: int
    hits: int


def write_traffic(path: Path, counts: TrafficCounts) -> str:
    """Write counts atomically and return the file's SHA-256 in hex.

    The tensors are ``keys`` and ``weights``; the numbers are JSON in the header's metadata. Raises as
    :func:`~hmi_engine.knowledge.atomic.atomic_write`.
    """
    numbers = _Numbers(**{name: getattr(counts, name) for name in _Numbers.model_fields})
    metadata = {"format": _FORMAT, "format_version": str(FORMAT_VERSION), "hmi": numbers.model_dump_json()}
    return write_tensors(path, {"keys": counts.keys, "weights": counts.weights}, metadata)


def read_traffic(path: Path) -> TrafficCounts:
    """Return a file's counts, all of them checked; the tensors are private views of the file.

    Raises :class:`StoreCorruptError`, naming the file, where it is damaged, and :class:`StoreVersionError`
    for a newer format.
    """
    header = read_header(path, max_header_bytes=_MAX_HEADER_BYTES)
    numbers = _checked_numbers(path, header)
    described = {entry.name: (entry.dtype, len(entry.shape)) for entry in header.entries}
    if described != {"keys": ("I64", 1), "weights": ("F64", 1)}:
        raise StoreCorruptError(f"{path}: tensors are {described}, expected keys I64 and weights F64")
    tensors = map_tensors(path, header)
    try:
        return TrafficCounts(keys=tensors["keys"], weights=tensors["weights"], **numbers.model_dump())
    except ValueError as error:
        raise StoreCorruptError(f"{path}: {error}") from error


def _checked_numbers(path: Path, header: TensorHeader) -> _Numbers:
    version = header.metadata.get("format_version", "")
    if header.metadata.get("format") != _FORMAT or not version.isdecimal():
        raise StoreCorruptError(f"{path}: no traffic file of HMI")
    if int(version) > FORMAT_VERSION:
        raise StoreVersionError(
            f"{path}: format version {int(version)}, this HMI reads up to {FORMAT_VERSION}; upgrade HMI"
        )
    try:
        return _Numbers.model_validate_json(header.metadata.get("hmi", ""))
    except ValidationError as error:
        raise StoreCorruptError(f"{path}: metadata: {error.errors()[0]['msg']}") from error
