"""The grouped ops in plain torch; see :mod:`hmi_kernels.reference`, of which they are a part.

Sums are made in float32, of float64 tensors in float64. All of them can be differentiated by torch itself:
that is what the formulas of :mod:`hmi_kernels.products` and :mod:`hmi_kernels.deltas` are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "ACTIVATIONS",
    "grouped_bias",
    "grouped_bottleneck",
    "grouped_bottleneck_delta",
    "grouped_lora",
    "grouped_lora_delta",
    "grouped_product",
    "grouped_scale",
    "grouped_weight_gradient",
]

ACTIVATIONS = ("relu", "gelu", "silu", "gelu_tanh", "tanh")


def grouped_bottleneck(
    output: Tensor,
    hidden_states: Tensor,
    arena: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_ranks: Tensor,
    slot_activations: Tensor,
    slot_scales: Tensor,
    *,
    layer_norm_weight: Tensor | None = None,
    layer_norm_bias: Tensor | None = None,
    layer_norm_eps: float = 1e-12,
    max_rank: int | None = None,
) -> None:
    """One segment after the other; ``max_rank`` is a hint to kernels."""
    hidden_size = output.shape[1]
    segments = _segments(output, segment_offsets, segment_slots, slot_offsets, slot_ranks)
    blocks = []
    for _, slot, offset, rank in segments:
        sizes = [hidden_size * rank, rank, rank * hidden_size, hidden_size]
        blocks.append(_split_block(arena, slot, offset, sizes))
        if not 0 <= int(slot_activations[slot]) < len(ACTIVATIONS):
            raise ValueError(f"slot_activations[{slot}] is {int(slot_activations[slot])}, not 0..4")
    for (tokens, slot, _, rank), (down, down_bias, up, up_bias) in zip(segments, blocks, strict=True):
        inner = _wide(hidden_states[tokens]) @ down.view(hidden_size, rank) + down_bias
        inner = _activate(ACTIVATIONS[int(slot_activations[slot])], inner)
        output[tokens] += slot_scales[slot] * (inner @ up.view(rank, hidden_size) + up_bias)
    if layer_norm_weight is not None and layer_norm_bias is not None and segment_slots.shape[0]:
        rows = output[int(segment_offsets[0]) : int(segment_offsets[-1])]
        norm = _wide(layer_norm_weight), _wide(layer_norm_bias), layer_norm_eps
        rows.copy_(functional.layer_norm(_wide(rows), rows.shape[1:], *norm))


def grouped_lora(
    output: Tensor,
    hidden_states: Tensor,
    arena: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_ranks: Tensor,
    slot_scales: Tensor,
    *,
    output_sizes: Sequence[int] = (),
    max_rank: int | None = None,
) -> None:
    """One projection and one segment after the other; ``max_rank`` is a hint to kernels."""
    in_size = hidden_states.shape[1]
    sizes_of_columns = list(output_sizes or output.shape[1:])
    starts = accumulate(sizes_of_columns[:-1], initial=0)
    # Not split: autograd lets no one change one of several views that were made together.
    columns = [output.narrow(1, start, size) for start, size in zip(starts, sizes_of_columns, strict=True)]
    tables = [table.view(len(columns), -1) for table in (slot_offsets, slot_ranks, slot_scales)]
    work = []
    for projection, offsets, ranks, scales in zip(columns, *tables, strict=True):
        for tokens, slot, offset, rank in _segments(output, segment_offsets, segment_slots, offsets, ranks):
            sizes = [in_size * rank, rank * projection.shape[1]]
            work.append((projection, tokens, scales[slot], rank, _split_block(arena, slot, offset, sizes)))
    for projection, tokens, scale, rank, (a, b) in work:
        inner = _wide(hidden_states[tokens]) @ a.view(in_size, rank)
        projection[tokens] += scale * (inner @ b.view(rank, -1))


def grouped_scale(
    hidden_states: Tensor, arena: Tensor, segment_offsets: Tensor, segment_slots: Tensor, slot_offsets: Tensor
) -> None:
    """One segment after the other."""
    for tokens, vector in _vectors(hidden_states, arena, segment_offsets, segment_slots, slot_offsets):
        hidden_states[tokens] *= vector


def grouped_bias(
    output: Tensor, arena: Tensor, segment_offsets: Tensor, segment_slots: Tensor, slot_offsets: Tensor
) -> None:
    """One segment after the other."""
    for tokens, vector in _vectors(output, arena, segment_offsets, segment_slots, slot_offsets):
        output[tokens] += vector


def _vectors(
    rows: Tensor, arena: Tensor, segment_offsets: Tensor, segment_slots: Tensor, slot_offsets: Tensor
) -> list[tuple[slice, Tensor]]:
    """The tokens and the vector of every segment that has one."""
    # As blocks of rank 1 or 0, whose place is looked at below.
    has_vector = (slot_offsets >= 0).to(torch.int32)
    if bool((slot_offsets < -1).any()):
        raise ValueError("slot_offsets must be -1 or not negative")
    segments = _segments(rows, segment_offsets, segment_slots, slot_offsets, has_vector)
    return [
        (tokens, _split_block(arena, slot, offset, [rows.shape[1]])[0])
        for tokens, slot, offset, _ in segments
    ]


def _segments(
    output: Tensor, segment_offsets: Tensor, segment_slots: Tensor, slot_offsets: Tensor, slot_ranks: Tensor
) -> list[tuple[slice, int, int, int]]:
    """(tokens, slot, offset of its block, rank) of every segment that has an adapter here."""
    offsets, slots = segment_offsets.tolist(), segment_slots.tolist()
    if offsets != sorted(offsets) or offsets[0] < 0 or offsets[-1] > output.shape[0]:
        raise ValueError(f"segment_offsets must not decrease and lie in 0..{output.shape[0]}, not {offsets}")
    num_slots = slot_ranks.shape[0]
    if any(not -1 <= slot < num_slots for slot in slots):
        raise ValueError(f"segment_slots must lie in -1..{num_slots - 1}, not {slots}")
    segments = []
    for begin, end, slot in zip(offsets[:-1], offsets[1:], slots, strict=True):
        rank = int(slot_ranks[slot]) if slot >= 0 else 0
        if rank < 0:
            raise ValueError(f"slot_ranks[{slot}] is {rank}, but ranks are not negative")
        if rank > 0:
            segments.append((slice(begin, end), slot, int(slot_offsets[slot]), rank))
    return segments


def _split_block(arena: Tensor, slot: int, offset: int, sizes: list[int]) -> tuple[Tensor, ...]:
    """The parts of a slot's block, wide."""
    if offset < 0 or offset + sum(sizes) > arena.shape[0]:
        raise ValueError(
            f"slot_offsets[{slot}] is {offset}, but its block of {sum(sizes)} elements (by slot_ranks) "
            f"does not fit into the arena of {arena.shape[0]}"
        )
    return torch.split(_wide(arena[offset : offset + sum(sizes)]), sizes)


def _activate(name: str, values: Tensor) -> Tensor:
    if name == "gelu_tanh":
        return functional.gelu(values, approximate="tanh")
    function = {"relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu, "tanh": torch.tanh}[
        name
    ]
    return function(values)


def grouped_bottleneck_delta(
    hidden_states: Tensor,
    arena: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_ranks: Tensor,
    slot_activations: Tensor,
    slot_scales: Tensor,
    *,
    max_rank: int,
) -> Tensor:
    """What :func:`grouped_bottleneck` adds."""
    delta = torch.zeros_like(hidden_states, memory_format=torch.contiguous_format)
    batch = (hidden_states, arena, segment_offsets, segment_slots)
    grouped_bottleneck(delta, *batch, slot_offsets, slot_ranks, slot_activations, slot_scales)
    return delta


def grouped_lora_delta(
    hidden_states: Tensor,
    arena: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_ranks: Tensor,
    slot_scales: Tensor,
    *,
    output_sizes: Sequence[int],
    max_rank: int,
) -> Tensor:
    """What :func:`grouped_lora` adds."""
    delta = hidden_states.new_zeros(hidden_states.shape[0], sum(output_sizes))
    batch = (hidden_states, arena, segment_offsets, segment_slots)
    grouped_lora(delta, *batch, slot_offsets, slot_ranks, slot_scales, output_sizes=output_sizes)
    return delta


def grouped_product(
    inputs: Tensor,
    arena: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_rows: Tensor,
    slot_columns: Tensor,
    *,
    output_size: int,
    transposed: bool = False,
    any_matrix: bool = False,
) -> Tensor:
    """One segment after the other."""
    output = inputs.new_zeros(inputs.shape[0], output_size)
    sizes = (output_size, inputs.shape[1]) if transposed else (inputs.shape[1], output_size)
    batch = (inputs, segment_offsets, segment_slots)
    for tokens, slot, offset, (rows, columns) in _matrices(
        *batch, slot_offsets, slot_rows, slot_columns, sizes
    ):
        matrix = _split_block(arena, slot, offset, [rows * columns])[0].view(rows, columns)
        matrix = matrix.T if transposed else matrix
        product = _wide(inputs[tokens, : matrix.shape[0]]) @ matrix
        output[tokens, : matrix.shape[1]] = product.to(output.dtype)
    return output


def grouped_weight_gradient(
    inputs: Tensor,
    output_gradients: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_rows: Tensor,
    slot_columns: Tensor,
    *,
    arena_size: int,
    any_matrix: bool = True,
) -> Tensor:
    """One segment after the other."""
    sums = _wide(inputs.new_zeros(arena_size))
    sizes = (inputs.shape[1], output_gradients.shape[1])
    batch = (inputs, segment_offsets, segment_slots)
    found = _matrices(*batch, slot_offsets, slot_rows, slot_columns, sizes)
    _require_disjoint({slot: (offset, rows * columns) for _, slot, offset, (rows, columns) in found})
    for tokens, slot, offset, (rows, columns) in found:
        _split_block(sums, slot, offset, [rows * columns])
        product = _wide(inputs[tokens, :rows]).T @ _wide(output_gradients[tokens, :columns])
        sums[offset : offset + rows * columns] += product.flatten()
    return sums.to(inputs.dtype)


def _matrices(
    inputs: Tensor,
    segment_offsets: Tensor,
    segment_slots: Tensor,
    slot_offsets: Tensor,
    slot_rows: Tensor,
    slot_columns: Tensor,
    most: tuple[int, int],
) -> list[tuple[slice, int, int, tuple[int, int]]]:
    """(tokens, slot, offset, (rows, columns)) of every segment that has a matrix."""
    has_matrix = ((slot_rows != 0) & (slot_columns != 0)).to(torch.int32)
    segments = _segments(inputs, segment_offsets, segment_slots, slot_offsets, has_matrix)
    found = []
    for tokens, slot, offset, _ in segments:
        sizes = int(slot_rows[slot]), int(slot_columns[slot])
        for name, size, largest in zip(("slot_rows", "slot_columns"), sizes, most, strict=True):
            if not 0 <= size <= largest:
                raise ValueError(f"{name}[{slot}] is {size}, not 0..{largest}")
        found.append((tokens, slot, offset, sizes))
    return found


def _require_disjoint(blocks: dict[int, tuple[int, int]]) -> None:
    """Raises ValueError if two slots' blocks, (offset, size) by slot, share an element."""
    end, before = 0, -1
    for slot, (offset, size) in sorted(blocks.items(), key=lambda item: item[1]):
        if before >= 0 and offset < end:
            raise ValueError(
                f"slot_offsets[{slot}] is {offset}, within the matrix of slot {before}: gradients of "
                "matrices that overlap cannot be told apart"
            )
        end, before = offset + size, slot


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in the type in which its sums are made."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()
