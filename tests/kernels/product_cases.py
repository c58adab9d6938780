"""Batches for the grouped products, drawn by hypothesis, and their results in float64, by segments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import hmi_kernels

__all__ = ["ProductBatch", "int32", "make_products", "product_batches"]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class ProductBatch:
    """Inputs with their segments, matrices of slots, and gradients of the products."""

    inputs: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_rows: Tensor
    slot_columns: Tensor
    output_gradients: Tensor

    def indexes(self) -> tuple[Tensor, ...]:
        return (
            self.segment_offsets,
            self.segment_slots,
            self.slot_offsets,
            self.slot_rows,
            self.slot_columns,
        )

    def product(self, *, transposed: bool) -> Tensor:
        """Of the inputs, or of the gradients with the transposes."""
        rows, other = self.sides(transposed)
        return hmi_kernels.grouped_product(
            rows, self.arena, *self.indexes(), output_size=other.shape[1], transposed=transposed
        )

    def weight_gradient(self) -> Tensor:
        return hmi_kernels.grouped_weight_gradient(
            self.inputs, self.output_gradients, *self.indexes(), arena_size=len(self.arena)
        )

    def sides(self, transposed: bool) -> tuple[Tensor, Tensor]:
        sides = self.inputs, self.output_gradients
        return sides[::-1] if transposed else sides

    def segments(self) -> list[tuple[slice, int]]:
        """Tokens and slot of each segment that has a matrix."""
        offsets, found = self.segment_offsets.tolist(), []
        for g, slot in enumerate(self.segment_slots.tolist()):
            if slot >= 0 and self.slot_rows[slot] > 0 and self.slot_columns[slot] > 0:
                found.append((slice(offsets[g], offsets[g + 1]), slot))
        return found

    def block(self, slot: int) -> tuple[slice, int, int]:
        rows, columns = int(self.slot_rows[slot]), int(self.slot_columns[slot])
        begin = int(self.slot_offsets[slot])
        return slice(begin, begin + rows * columns), rows, columns

    def expected_product(self, *, transposed: bool) -> Tensor:
        rows, other = self.sides(transposed)
        result = torch.zeros(len(rows), other.shape[1], dtype=torch.float64)
        for tokens, slot in self.segments():
            place, *shape = self.block(slot)
            matrix = self.arena[place].double().view(shape)
            matrix = matrix.T if transposed else matrix
            depth, width = matrix.shape
            result[tokens, :width] = rows[tokens, :depth].double() @ matrix
        return result

    def expected_weight_gradient(self) -> Tensor:
        result = torch.zeros(len(self.arena), dtype=torch.float64)
        for tokens, slot in self.segments():
            place, rows, columns = self.block(slot)
            left = self.inputs[tokens, :rows].double()
            result[place] += (left.T @ self.output_gradients[tokens, :columns].double()).flatten()
        return result


def make_products(
    lengths: list[int],
    slots: list[int],
    shapes: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    before: int = 0,
    after: int = 0,
    multiple: int = 1,
    order: list[int] | None = None,
) -> ProductBatch:
    """``shapes`` by slot; ``before`` and ``after`` tokens belong to no segment; rows lie in wider tensors."""
    num_tokens = before + sum(lengths) + after
    offsets, end = [0] * len(shapes), 0
    for slot in order or range(len(shapes)):
        offsets[slot] = end
        end += -(-shapes[slot][0] * shapes[slot][1] // multiple) * multiple + multiple
    widest = [max(1, *(shape[side] for shape in shapes)) for side in (0, 1)]
    widths = [-(-width // multiple) * multiple for width in widest]

    def rows(width: int) -> Tensor:
        return torch.randn(num_tokens, width + 2 * multiple).to(dtype)[:, multiple : multiple + width]

    return ProductBatch(
        inputs=rows(widths[0]),
        arena=torch.randn(end).to(dtype),
        segment_offsets=torch.tensor([0, *lengths]).cumsum(0) + before,
        segment_slots=int32(slots),
        slot_offsets=torch.tensor(offsets),
        slot_rows=int32([shape[0] for shape in shapes]),
        slot_columns=int32([shape[1] for shape in shapes]),
        output_gradients=rows(widths[1]),
    )


@st.composite
def product_batches(
    draw: st.DrawFn, *, dtype: torch.dtype = torch.float32, multiple: int = 1, most: int = 64
) -> ProductBatch:
    """Thin and wide matrices of ranks up to ``most``; empty segments, repeated slots, tokens without one."""
    num_slots = draw(st.integers(1, 4))
    ranks = draw(st.lists(st.integers(0, most // multiple), min_size=num_slots, max_size=num_slots))
    size = draw(st.integers(1, 2 * most // multiple)) * multiple
    is_wide_first = draw(st.booleans())
    shapes = [(size, rank * multiple) if is_wide_first else (rank * multiple, size) for rank in ranks]
    slots = draw(st.lists(st.integers(-1, num_slots - 1), min_size=1, max_size=6))
    lengths = draw(st.lists(st.integers(0, 90), min_size=len(slots), max_size=len(slots)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return make_products(
        lengths,
        slots,
        shapes,
        dtype=dtype,
        before=draw(st.integers(0, 3)),
        after=draw(st.integers(0, 3)),
        multiple=multiple,
        order=draw(st.permutations(range(num_slots))),
    )
