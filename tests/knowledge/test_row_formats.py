"""Row formats: what they cost, and which tensors hold them."""

from __future__ import annotations

import pytest
import torch

from hmi_engine.errors import UnsupportedModelError
from hmi_engine.knowledge.row_formats import (
    ROW_FORMATS,
    RowFormat,
    codebook_bytes,
    elements_per_code,
    is_product_quantized,
    stored_row_bytes,
    stored_shapes,
)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_bytes_are_those_of_the_tensors(row_format: RowFormat, window: int) -> None:
    def total(num_rows: int) -> int:
        shapes = stored_shapes(row_format, num_rows, window, 64)
        return sum(torch.empty(shape, dtype=dtype).nbytes for dtype, shape in shapes.values())

    row, codebooks = stored_row_bytes(row_format, window, 64), codebook_bytes(row_format, window, 64)
    assert [total(0), total(1), total(7)] == [codebooks, codebooks + row, codebooks + 7 * row]
    assert bool(codebooks) == is_product_quantized(row_format)


def test_formats_are_as_small_as_they_say() -> None:
    half = stored_row_bytes("float16", 2, 384)
    assert half == 2 * 2 * 384
    assert stored_row_bytes("float32", 2, 384) == 2 * half
    assert stored_row_bytes("int8", 2, 384) == half // 2 + 2 * 4
    assert (stored_row_bytes("pq8", 2, 384), stored_row_bytes("pq16", 2, 384)) == (half // 8, half // 16)


def test_sizes_that_cannot_be_cut_are_refused() -> None:
    for row_format, hidden_size in (("pq8", 30), ("pq16", 36)):
        with pytest.raises(UnsupportedModelError, match=f"the base model has {hidden_size}; use int8"):
            stored_shapes(row_format, 1, 2, hidden_size)
    assert elements_per_code("pq8", 36) == 4
    with pytest.raises(ValueError, match="have no codes"):
        elements_per_code("int8", 36)
    with pytest.raises(ValueError, match="'int4' is unknown; choose one of float32, float16"):
        stored_shapes("int4", 1, 2, 64)  # type: ignore[arg-type]
