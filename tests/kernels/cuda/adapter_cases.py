"""Batches for the CUDA adapter kernels, their results in float64, and how far a kernel may be from these."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import hmi_kernels
from hmi_kernels.cuda import driver

__all__ = ["ACTIVATIONS", "DTYPES", "AdapterCase", "assert_close", "make_case"]

DTYPES = (torch.float16, torch.bfloat16)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}
STEEPEST = 1.13
"""The largest derivative of any of them (GELU's)."""
FLOAT32 = 2.0**-23
"""Largest relative error of one float32 operation: tensor cores cut off where others round (2^-24)."""
LAYER_NORM_EPS = 1e-5


@dataclasses.dataclass
class AdapterCase:
    """A batch for grouped_bottleneck (``slot_activations``) or grouped_lora, in tensors as they take them."""

    output: Tensor
    hidden_states: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    """[projections, slots], as are ranks and scales."""
    slot_ranks: Tensor
    slot_scales: Tensor
    output_sizes: tuple[int, ...]
    slot_activations: Tensor | None = None
    layer_norm: tuple[Tensor, Tensor] | None = None
    max_rank: int | None = None
    padding: int = 8
    """Columns on either side of the output's own."""

    def run(self) -> Tensor:
        """The op's result; ``output`` itself stays. AssertionError if columns beside it were written."""
        num_tokens, columns = self.output.shape
        padded = torch.full((num_tokens, columns + 2 * self.padding), -7.0, dtype=self.output.dtype)
        output = padded[:, self.padding : self.padding + columns].copy_(self.output)
        shared = (output, self.hidden_states, self.arena, self.segment_offsets, self.segment_slots)
        if self.slot_activations is None:
            tables = (self.slot_offsets, self.slot_ranks, self.slot_scales)
            hmi_kernels.grouped_lora(*shared, *tables, output_sizes=self.output_sizes, max_rank=self.max_rank)
        else:
            weight, bias = self.layer_norm or (None, None)
            hmi_kernels.grouped_bottleneck(
                *shared,
                self.slot_offsets[0],
                self.slot_ranks[0],
                self.slot_activations,
                self.slot_scales[0],
                layer_norm_weight=weight,
                layer_norm_bias=bias,
                layer_norm_eps=LAYER_NORM_EPS,
                max_rank=self.max_rank,
            )
        assert (padded[:, : self.padding] == -7).all()
        assert (padded[:, self.padding + columns :] == -7).all()
        return output.clone()

    def plan(self) -> Any:
        """The AdapterPlan of :meth:`run`; within ``emulated()``."""
        (num_tokens, input_size), sizes = self.hidden_states.shape, self.output_sizes
        shape = (num_tokens, len(self.segment_slots), input_size, sum(sizes), len(sizes))
        max_rank = 256 if self.max_rank is None else self.max_rank
        return driver.module().plan_adapter(
            *shape, max_rank, self.layer_norm is not None, driver.max_shared_bytes(0)
        )

    def segments(self) -> list[tuple[slice, int]]:
        """Rows and slot of each segment."""
        offsets = self.segment_offsets.tolist()
        slots = self.segment_slots.tolist()
        return [(slice(offsets[g], offsets[g + 1]), slot) for g, slot in enumerate(slots)]

    def blocks(self, projection: int, slot: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``down, down_bias, up, up_bias`` in float64, as views would have them; LoRA's biases are zeros."""
        rank = int(self.slot_ranks[projection, slot])
        input_size, output_size = self.hidden_states.shape[1], self.output_sizes[projection]
        has_biases = self.slot_activations is not None
        sizes = [input_size * rank, rank * has_biases, rank * output_size, output_size * has_biases]
        begin = int(self.slot_offsets[projection, slot])
        down, down_bias, up, up_bias = self.arena[begin : begin + sum(sizes)].double().split(sizes)
        zeros = torch.zeros(1, dtype=torch.float64)
        biases = (down_bias, up_bias) if has_biases else (zeros, zeros)
        return down.view(input_size, rank), biases[0], up.view(rank, output_size), biases[1]

    def expected(self) -> tuple[Tensor, Tensor]:
        """The result in float64, and the largest error that rounding can make; derived beside each step.

        An operation in the 16-bit type has a relative error of eps / 2, in float32 of 2^-23; a sum of n
        products in float32, in any order, an error of at most n 2^-23 of the sum of their magnitudes (Higham,
        Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). The smallest float16 above zero is
        2^-24.
        """
        result, bound = self.output.double(), torch.zeros_like(self.output, dtype=torch.float64)
        half_eps, smallest = torch.finfo(self.output.dtype).eps / 2, 2.0**-25
        for rows, slot in self.segments():
            if slot >= 0:
                column = 0
                for p, size in enumerate(self.output_sizes):
                    columns = slice(column, column + size)
                    column += size
                    if self.slot_ranks[p, slot] == 0:
                        continue
                    change, error = self._change(rows, p, slot, half_eps, smallest)
                    result[rows, columns] += change
                    # Two more operations in float32 and the rounding of the result.
                    error += 3 * FLOAT32 * (change.abs() + self.output[rows, columns].double().abs())
                    bound[rows, columns] = error + half_eps * (result[rows, columns].abs() + error) + smallest
            if self.layer_norm is not None:
                result[rows], bound[rows] = self._normalized(result[rows], bound[rows], half_eps, smallest)
        return result, bound

    def _change(
        self, rows: slice, p: int, slot: int, half_eps: float, smallest: float
    ) -> tuple[Tensor, Tensor]:
        down, down_bias, up, up_bias = self.blocks(p, slot)
        hidden_states, scale = self.hidden_states[rows].double(), float(self.slot_scales[p, slot])
        inner = hidden_states @ down + down_bias
        # A sum of input_size products and a bias, then an activation, itself a few operations; rounded.
        magnitude = hidden_states.abs() @ down.abs() + down_bias.abs()
        inner_error = STEEPEST * (down.shape[0] + 1) * FLOAT32 * magnitude
        if self.slot_activations is not None:
            inner = list(ACTIVATIONS.values())[int(self.slot_activations[slot])](inner)
            inner_error = inner_error + 16 * FLOAT32 * (inner.abs() + magnitude)
        inner_error = inner_error + half_eps * (inner.abs() + inner_error) + smallest
        change = inner @ up + up_bias
        error = inner_error @ up.abs()
        error += (up.shape[0] + 1) * FLOAT32 * ((inner.abs() + inner_error) @ up.abs() + up_bias.abs())
        return scale * change, abs(scale) * error

    def _normalized(
        self, rows: Tensor, error: Tensor, half_eps: float, smallest: float
    ) -> tuple[Tensor, Tensor]:
        """LayerNorm of rows that are wrong by up to ``error``.

        Of z = (v - mean v) / s the first-order change is (dv - mean dv) / s - z mean(z dv) / s, and
        mean(z dv) is at most the root mean square of dv. A tenth more for higher orders; 32 float32
        operations on numbers of the size of v / s.
        """
        assert self.layer_norm is not None
        weight, bias = (part.double() for part in self.layer_norm)
        centered = rows - rows.mean(1, keepdim=True)
        deviation = (centered.square().mean(1, keepdim=True) + LAYER_NORM_EPS).sqrt()
        normal = centered / deviation
        result = normal * weight + bias
        spread = (
            error + error.mean(1, keepdim=True) + normal.abs() * error.square().mean(1, keepdim=True).sqrt()
        )
        changed = 1.1 * spread / deviation * weight.abs()
        sizes = (rows.abs() + rows.abs().mean(1, keepdim=True)) / deviation * weight.abs() + bias.abs()
        changed = changed + 32 * FLOAT32 * (sizes + normal.abs() * sizes.mean(1, keepdim=True))
        return result, changed + half_eps * (result.abs() + changed) + smallest


def make_case(
    lengths: Sequence[int],
    *,
    hidden_size: int = 256,
    output_sizes: Sequence[int] | None = None,
    ranks: Sequence[Sequence[int]] = ((16, 8, 24),),
    slots: Sequence[int] | None = None,
    activations: Sequence[str] | None = None,
    has_layer_norm: bool = False,
    dtype: torch.dtype = torch.float16,
    num_tokens: int = 0,
    is_aligned: bool = False,
    seed: int = 0,
) -> AdapterCase:
    """Random tensors; a bottleneck if there are ``activations`` (one a slot), else LoRA.

    ``output_sizes``: of LoRA's projections. ``ranks``: one sequence a projection, one entry a slot.
    ``slots`` of the segments: by default one after the other. ``num_tokens``: at least so many, the
    additional ones before and after all segments: they choose the tile's rows (csrc/cuda/adapter_plan.cpp).
    ``is_aligned``: rows and blocks begin at multiples of 32 bytes, whole sectors of memory; without it at
    multiples of 16, as the kernels demand.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    is_bottleneck = activations is not None
    sizes = tuple(output_sizes or (hidden_size,))
    table = torch.tensor(ranks, dtype=torch.int32)
    padding = 16 if is_aligned else 8
    arena, offsets = _make_arena(table, hidden_size, sizes, is_bottleneck, normal, alignment=padding)
    used = sum(lengths)
    before = max(0, num_tokens - used) // 3
    total = max(num_tokens, used)
    cumulative = torch.tensor([0, *lengths]).cumsum(0) + before
    chosen = slots if slots is not None else [g % table.shape[1] for g in range(len(lengths))]
    names = list(ACTIVATIONS)
    return AdapterCase(
        output=normal(total, sum(sizes)).to(dtype),
        hidden_states=normal(total, hidden_size + padding).to(dtype)[:, :hidden_size],
        arena=arena.to(dtype),
        segment_offsets=cumulative,
        segment_slots=torch.tensor(chosen, dtype=torch.int32),
        slot_offsets=offsets,
        slot_ranks=table,
        slot_scales=normal(*table.shape),
        output_sizes=sizes,
        slot_activations=torch.tensor([names.index(name) for name in activations], dtype=torch.int32)
        if activations is not None
        else None,
        layer_norm=(1 + normal(sizes[0]).to(dtype) / 4, normal(sizes[0]).to(dtype))
        if has_layer_norm
        else None,
        max_rank=int(table.max()),
        padding=padding,
    )


def _make_arena(
    ranks: Tensor,
    input_size: int,
    sizes: Sequence[int],
    is_bottleneck: bool,
    normal: Callable[..., Tensor],
    *,
    alignment: int,
) -> tuple[Tensor, Tensor]:
    """Blocks with NaN between them, so that what is read beyond one shows."""
    pieces, offsets, end = [], torch.zeros(ranks.shape, dtype=torch.int64), 0
    for (p, size), slot in itertools.product(enumerate(sizes), range(ranks.shape[1])):
        rank = int(ranks[p, slot])
        down, up = (
            normal(input_size * rank) / math.sqrt(input_size),
            normal(rank * size) / math.sqrt(max(rank, 1)),
        )
        block = torch.cat([down, normal(rank), up, normal(size)] if is_bottleneck else [down, up])
        gap = torch.full((alignment + -len(block) % alignment,), math.nan)
        offsets[p, slot] = end
        pieces += [block, gap]
        end += len(block) + len(gap)
    return torch.cat(pieces), offsets


def assert_close(result: Tensor, case: AdapterCase) -> None:
    """Raises AssertionError unless every element is within its bound of the float64 result; NaN never is."""
    expected, bound = case.expected()
    error = (result.double() - expected).abs()
    wrong = ~(error <= bound)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, the first at [{row}, {column}]: "
            f"{float(result[row, column])} instead of {float(expected[row, column])} "
            f"+- {float(bound[row, column]):.3g}"
        )
