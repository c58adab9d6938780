"""How the rows of a PLOT may be stored: which tensors, of which shapes, and what they cost.

With N rows of W slots and H elements each:

=========  =====================================================================  =========================
format     tensors                                                                bytes a row
=========  =====================================================================  =========================
float32    ``rows`` float32 [N, W, H]                                             4 W H
float16    ``rows`` float16 [N, W, H]                                             2 W H
int8       ``rows`` int8 [N, W, H], ``row_scales`` float32 [N, W]                 W H + 4 W
pq8, pq16  ``rows`` uint8 [N, W, H / D], ``codebooks`` float16 [W, H / D, 256, D]  W H / D, D being 4 and 8
=========  =====================================================================  =========================

int8 is symmetric, with a scale for each slot of each row. Product quantization (Jegou, Douze, Schmid: Product
Quantization for Nearest Neighbor Search, PAMI 2011) cuts a slot into pieces of D elements, and stores of each
piece which of 256 typical ones is nearest: 8 and 16 times less than float16.
"""

from typing import Literal, TypeAlias

import torch

from hmi_engine.errors import UnsupportedModelError

__all__ = [
    "CODEBOOK_SIZE",
    "ROW_FORMATS",
    "RowFormat",
    "codebook_bytes",
    "elements_per_code",
    "is_product_quantized",
    "stored_row_bytes",
    "stored_shapes",
]

RowFormat: TypeAlias = Literal["float32", "float16", "int8", "pq8", "pq16"]
ROW_FORMATS: tuple[RowFormat, ...] = ("float32", "float16", "int8", "pq8", "pq16")
CODEBOOK_SIZE = 256
"""Pieces in the codebook of one place: what a uint8 can tell apart."""

StoredShapes: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]
_DENSE_TYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_ELEMENTS_PER_CODE = {"pq8": 4, "pq16": 8}


def is_product_quantized(row_format: RowFormat) -> bool:
    """Return whether rows of this format are codes of codebooks."""
    return row_format in _ELEMENTS_PER_CODE


def elements_per_code(row_format: RowFormat, hidden_size: int) -> int:
    """Return how many elements of a row one code of a product quantized format stands for.

    Raises :class:`UnsupportedModelError` where ``hidden_size`` cannot be cut into such pieces, and
    :class:`ValueError` for a format without codes.
    """
    if not is_product_quantized(row_format):
        raise ValueError(f"rows of format {row_format} have no codes")
    elements = _ELEMENTS_PER_CODE[row_format]
    if hidden_size % elements:
        raise UnsupportedModelError(
            f"row format {row_format} needs a hidden size that is a multiple of {elements}, but the base "
            f"model has {hidden_size}; use int8 or float16"
        )
    return elements


def stored_shapes(row_format: RowFormat, num_rows: int, window: int, hidden_size: int) -> StoredShapes:
    """Return dtype and shape of each tensor that holds the rows, by the tensor's name.

    Raises :class:`UnsupportedModelError` as :func:`elements_per_code`, and :class:`ValueError` for an
    unknown format.
    """
    if row_format not in ROW_FORMATS:
        raise ValueError(f"row format {row_format!r} is unknown; choose one of {', '.join(ROW_FORMATS)}")
    if is_product_quantized(row_format):
        elements = elements_per_code(row_format, hidden_size)
        num_codes = hidden_size // elements
        return {
            "rows": (torch.uint8, (num_rows, window, num_codes)),
            "codebooks": (torch.float16, (window, num_codes, CODEBOOK_SIZE, elements)),
        }
    shapes: StoredShapes = {"rows": (_DENSE_TYPES[row_format], (num_rows, window, hidden_size))}
    if row_format == "int8":
        shapes["row_scales"] = (torch.float32, (num_rows, window))
    return shapes


def stored_row_bytes(row_format: RowFormat, window: int, hidden_size: int) -> int:
    """Return the bytes that one row takes with its scales, without index, key and codebooks."""
    shapes = stored_shapes(row_format, 1, window, hidden_size)
    return sum(_tensor_bytes(*shapes[name]) for name in ("rows", "row_scales") if name in shapes)


def codebook_bytes(row_format: RowFormat, window: int, hidden_size: int) -> int:
    """Return the bytes of a table's codebooks, however many rows it has; 0 for a format without."""
    shapes = stored_shapes(row_format, 0, window, hidden_size)
    return _tensor_bytes(*shapes["codebooks"]) if "codebooks" in shapes else 0


def _tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()
