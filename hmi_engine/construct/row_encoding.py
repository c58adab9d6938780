"""Rows into the formats that a table stores them in, and the training of codebooks.

Product quantization (Jegou, Douze, Schmid: Product Quantization for Nearest Neighbor Search, PAMI 2011) by
faiss: k-means finds the 256 pieces of each place of a slot, and a row's code is the nearest of them. Rows are
encoded as they are: to subtract their unigram rows first lessens the error by under 1 % of it
(benchmarks/compression.py), and to rotate them first (OPQ) took six times as long and lessened nothing.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.errors import MissingDependencyError
from hmi_engine.knowledge.finite import is_finite
from hmi_engine.knowledge.row_formats import (
    CODEBOOK_SIZE,
    RowFormat,
    elements_per_code,
    is_product_quantized,
    stored_shapes,
)

__all__ = ["SAMPLE_ROWS", "EncodedRows", "RowEncoder"]

SAMPLE_ROWS = 32768
"""Rows that codebooks are trained on at most, 128 for each piece: twice as many lessen the error by 0.5 %."""
_REPEATED_ROWS = 4096
"""From here on a smaller sample is repeated up to the full one: faiss 1.15 trains a slot of 384 elements on
16,384 rows in 12 s of one core, on 32,768 in 2 s, and the error stays what it was."""
_ITERATIONS = 10
_FLOAT_TYPES = {"float32": torch.float32, "float16": torch.float16}


class EncodedRows(NamedTuple):
    """Rows as a table stores them: ``rows`` and ``row_scales`` of ``stored_shapes``; None without scales."""

    rows: Tensor
    row_scales: Tensor | None


class RowEncoder:
    """Turns float32 rows [N, W, H] into a row format, and back.

    Every row is encoded by itself: the result is the same whatever rows come with it, in which order and on
    how many machines.
    """

    def __init__(self, row_format: RowFormat, codebooks: Tensor | None) -> None:
        """Trusts its arguments; :meth:`fit` and :meth:`from_codebooks` are the ways in."""
        self.row_format = row_format
        self.codebooks = codebooks

    @classmethod
    def fit(cls, rows_sample: Tensor, row_format: RowFormat, seed: int = 0) -> RowEncoder:
        """Makes the encoder of a new table.

        Args:
            rows_sample: float32 [S, W, H], some of the table's rows; at most :data:`SAMPLE_ROWS` of them,
                drawn by ``seed``, are used. Slots of zeros count as absent. Formats without codebooks
                ignore it.
            row_format: the table's.
            seed: makes the codebooks reproducible.

        Raises:
            MissingDependencyError: the format needs faiss, which is not installed.
            UnsupportedModelError: the hidden size cannot be cut into this format's pieces.
            ValueError: rows of another shape or dtype, or with NaN or infinity.
        """
        if not is_product_quantized(row_format):
            return cls(row_format, None)
        _require_rows(rows_sample)
        elements = elements_per_code(row_format, rows_sample.shape[2])
        generator = torch.Generator().manual_seed(seed)
        drawn = rows_sample[torch.randperm(len(rows_sample), generator=generator)[:SAMPLE_ROWS]]
        slots = [_train(slot[slot.any(dim=1)], elements, seed) for slot in drawn.unbind(1)]
        return cls(row_format, torch.stack(slots))

    @classmethod
    def from_codebooks(cls, row_format: RowFormat, codebooks: Tensor | None) -> RowEncoder:
        """Goes on with a table's own codebooks, float16 [W, M, 256, D]; None for a format without.

        Raises ValueError where they are not those of the format.
        """
        if is_product_quantized(row_format) != (codebooks is not None):
            lack = "has no codebooks" if codebooks is not None else "needs codebooks"
            raise ValueError(f"row format {row_format} {lack}")
        if codebooks is not None:
            window, num_codes, _, elements = codebooks.shape
            _, expected = stored_shapes(row_format, 0, window, num_codes * elements)["codebooks"]
            if codebooks.dtype is not torch.float16 or codebooks.shape != expected:
                raise ValueError(
                    f"codebooks of format {row_format} must be float16 {list(expected)}, "
                    f"not {codebooks.dtype} {list(codebooks.shape)}"
                )
        return cls(row_format, codebooks)

    def encode(self, rows: Tensor) -> EncodedRows:
        """Encodes float32 rows [N, W, H].

        Raises ValueError for another shape or dtype, and for NaN or infinity, which only float formats can
        hold; MissingDependencyError where codes need faiss, which is not installed.
        """
        _require_rows(rows)
        if self.row_format in _FLOAT_TYPES:
            return EncodedRows(rows.to(_FLOAT_TYPES[self.row_format]), None)
        if self.codebooks is None:
            return EncodedRows(*hmi_kernels.quantize_rows(rows))
        if rows.shape[1:] != (self.codebooks.shape[0], self.codebooks.shape[1] * self.codebooks.shape[3]):
            raise ValueError(f"rows {list(rows.shape)} do not fit codebooks {list(self.codebooks.shape)}")
        if not is_finite(rows):
            raise ValueError("rows hold NaN or infinity, which codes cannot")
        return EncodedRows(_codes(rows, self.codebooks), None)

    def decode(self, encoded: EncodedRows) -> Tensor:
        """What a merge reads: float32 [N, W, H]."""
        rows = encoded.rows
        if self.codebooks is not None:
            window, num_codes = self.codebooks.shape[:2]
            places = torch.arange(window)[:, None], torch.arange(num_codes)[None]
            return self.codebooks[places[0], places[1], rows.long()].flatten(2).float()
        if encoded.row_scales is not None:
            return rows * encoded.row_scales[..., None]
        return rows.float()


def _require_rows(rows: Tensor) -> None:
    if rows.dtype is not torch.float32 or rows.dim() != 3:
        raise ValueError(f"rows must be float32 [rows, window, hidden], not {rows.dtype} {list(rows.shape)}")


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "product quantized rows are made by faiss, which is not installed: "
            "pip install 'hmi[compression]', or choose another row format"
        ) from error
    module: ModuleType = faiss
    return module


def _train(rows: Tensor, elements: int, seed: int) -> Tensor:
    """The pieces of one slot: rows float32 [S, H] -> float16 [H / elements, 256, elements]."""
    if not is_finite(rows):
        raise ValueError("rows hold NaN or infinity, which codes cannot")
    pieces = rows.unflatten(1, (-1, elements)).transpose(0, 1)
    if len(rows) <= CODEBOOK_SIZE:  # every piece gets a code of its own
        codebook = torch.zeros(len(pieces), CODEBOOK_SIZE, elements)
        codebook[:, : len(rows)] = pieces
        return codebook.half()
    faiss = _faiss()
    quantizer = faiss.ProductQuantizer(rows.shape[1], len(pieces), 8)
    quantizer.cp.seed = seed
    quantizer.cp.niter = _ITERATIONS
    quantizer.cp.min_points_per_centroid = 1  # says nothing of small samples
    if _REPEATED_ROWS <= len(rows) < SAMPLE_ROWS:
        rows = rows.repeat(-(-SAMPLE_ROWS // len(rows)), 1)[:SAMPLE_ROWS]
    quantizer.train(rows.contiguous().numpy())
    centroids = torch.from_numpy(faiss.vector_to_array(quantizer.centroids))
    return centroids.view(len(pieces), CODEBOOK_SIZE, elements).half()


def _codes(rows: Tensor, codebooks: Tensor) -> Tensor:
    """The nearest piece, as it was rounded, at every place: uint8 [N, W, M]."""
    faiss = _faiss()
    window, num_codes = codebooks.shape[:2]
    codes = torch.empty(len(rows), window, num_codes, dtype=torch.uint8)
    for slot in range(window):
        quantizer = faiss.ProductQuantizer(rows.shape[2], num_codes, 8)
        faiss.copy_array_to_vector(codebooks[slot].float().flatten().numpy(), quantizer.centroids)
        codes[:, slot] = torch.from_numpy(quantizer.compute_codes(rows[:, slot].contiguous().numpy()))
    return codes
