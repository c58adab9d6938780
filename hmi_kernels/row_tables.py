"""The tables of rows that a merge reads: what they must be like, and how rows become int8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hmi_kernels.checks import COMPUTE_TYPES, require_tensor

if TYPE_CHECKING:
    from hmi_kernels.causal import MergeArguments as CausalMergeArguments
    from hmi_kernels.plot import MergeArguments

__all__ = ["CODEBOOK_SIZE", "MAY_BE_ON_HOST", "pageable_tables", "quantize_rows", "require_row_tables"]

MAY_BE_ON_HOST = ("row_tables", "row_scales", "unigram_tables", "codebooks")
"""Of a merge's arguments: what a GPU reads in place where it lies in page-locked host memory."""

CODEBOOK_SIZE = 256
"""Pieces that a uint8 can tell apart."""
_ROW_TYPES = (*COMPUTE_TYPES, torch.int8, torch.uint8)
_LARGEST_INT8 = 127
_ROWS_PER_STEP = 8192


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 with a scale each, for :func:`plot_merge`.

    Semantics: ``rows[n, w] = scales[n, w] * int8_rows[n, w]``, symmetric: the largest magnitude is 127. What
    is lost of an element is at most half of its row's scale, which is ``max(abs(row)) / 127``.

    Args:
        rows: floating point [rows, window, hidden], finite.

    Returns: int8 [rows, window, hidden] and float32 [rows, window]; the scale of a row of zeros is 0.
    Raises TypeError or ValueError on another dtype or shape, ValueError on NaN and infinity.
    """
    require_tensor("rows", rows.detach(), (*COMPUTE_TYPES, torch.float64), (None, None, None))
    quantized = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scales = torch.zeros(rows.shape[:2], dtype=torch.float32, device=rows.device)
    if rows.numel() == 0:
        return quantized, scales
    smallest = torch.finfo(torch.float32).tiny
    steps = (tensor.split(_ROWS_PER_STEP) for tensor in (rows.detach(), quantized, scales))
    for row, quantized_row, scale in zip(*steps, strict=True):
        largest = row.abs().amax(dim=2).double()
        if not bool(largest.isfinite().all()):
            raise ValueError("rows hold NaN or infinity, which int8 cannot")
        # A scale below the smallest normal number has fewer bits, and may round to zero.
        scale.copy_(torch.where(largest > 0, (largest / _LARGEST_INT8).clamp(min=smallest), 0.0))
        divisor = torch.where(scale > 0, scale, 1.0).double().unsqueeze(2)
        quantized_row.copy_((row.double() / divisor).round())
    return quantized, scales


def require_row_tables(
    tables: Sequence[Tensor],
    scales: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    *,
    window: int,
    hidden_size: int,
) -> None:
    """Raises TypeError or ValueError unless they are as :func:`hmi_kernels.plot_merge` describes them."""
    _require_companions("row_scales", scales, tables, torch.int8)
    _require_companions("codebooks", codebooks, tables, torch.uint8)
    for i, table in enumerate(tables):
        if table.dtype is torch.uint8:
            _require_codes(i, table, codebooks[i], window, hidden_size)
            continue
        require_tensor(f"row_tables[{i}]", table, _ROW_TYPES, (None, window, hidden_size))
        if table.dtype is torch.int8:
            require_tensor(f"row_scales[{i}]", scales[i], torch.float32, (table.shape[0], window))


def pageable_tables(arguments: MergeArguments | CausalMergeArguments) -> str:
    """Why a GPU cannot read the tables of a merge in place; "" if it can."""
    for name in MAY_BE_ON_HOST:
        for i, tensor in enumerate(getattr(arguments, name)):
            if not (tensor.is_cuda or tensor.numel() == 0 or tensor.is_pinned()):
                return (
                    f"{name}[{i}] lies in pageable host memory: "
                    "pin it (Tensor.pin_memory) or move it to the device"
                )
    return ""


def _require_companions(
    name: str, companions: Sequence[Tensor], tables: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Raises ValueError unless each table of that dtype has one, and the others an empty one or none."""
    if companions and len(companions) != len(tables):
        raise ValueError(f"{name} must be {len(tables)}, one for each of row_tables, not {len(companions)}")
    for i, table in enumerate(tables):
        if table.dtype is dtype and not companions:
            raise ValueError(f"row_tables[{i}] is {dtype}: {name} must hold what its rows are read with")
        if table.dtype is not dtype and companions and companions[i].numel():
            raise ValueError(f"{name}[{i}] must be empty, as row_tables[{i}] is {table.dtype}")


def _require_codes(number: int, codes: Tensor, codebook: Tensor, window: int, hidden_size: int) -> None:
    require_tensor(f"row_tables[{number}]", codes, torch.uint8, (None, window, None))
    num_codes = codes.shape[2]
    if num_codes == 0 or hidden_size % num_codes:
        raise ValueError(
            f"row_tables[{number}] must have a number of codes that divides {hidden_size}, not {num_codes}"
        )
    shape = (window, num_codes, CODEBOOK_SIZE, hidden_size // num_codes)
    require_tensor(f"codebooks[{number}]", codebook, torch.float16, shape)
