"""The least that a call must read and write, and what it must compute: by formula, in this place alone.

Bytes are those of the operands, each counted once, whatever a kernel really moves; a multiplication and an
addition are two operations. What is read again or kept between kernels is what these figures show up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Cost", "bottleneck_cost", "copy_cost", "lookup_cost", "lora_cost", "merge_cost", "vector_cost"]

OFFSET_BYTES = 8
SLOT_BYTES = 4
TOKEN_BYTES = 4
REFERENCE_BYTES = 8
INDEX_SLOT_BYTES = 16
LORA_ENTRY_BYTES = 8 + 4 + 4
"""Of a slot: where its block lies, its rank, its scale."""
BOTTLENECK_ENTRY_BYTES = LORA_ENTRY_BYTES + 4
"""And its activation."""


@dataclass(frozen=True)
class Cost:
    """What a call cannot do with less of."""

    bytes: int
    flop: int


def lora_cost(
    segments: Sequence[tuple[int, int]],
    *,
    input_size: int,
    output_sizes: Sequence[int],
    element_bytes: int,
) -> Cost:
    """Of ``output += scale * (x @ a) @ b``, several projections reading x once.

    ``segments`` holds (tokens, rank) of each, every one with a slot of its own, the same rank for all
    projections.
    """
    num_tokens = sum(tokens for tokens, _ in segments)
    total_output = sum(output_sizes)
    per_rank = len(output_sizes) * input_size + total_output
    elements = num_tokens * (input_size + 2 * total_output)
    elements += sum(rank * per_rank for tokens, rank in segments if tokens)
    tables = _segment_bytes(len(segments)) + len(segments) * len(output_sizes) * LORA_ENTRY_BYTES
    flop = sum(2 * tokens * rank * per_rank for tokens, rank in segments)
    return Cost(elements * element_bytes + tables, flop)


def bottleneck_cost(
    segments: Sequence[tuple[int, int]], *, hidden_size: int, element_bytes: int, has_layer_norm: bool
) -> Cost:
    """Of ``output = LayerNorm(output + activation(x @ down + bias) @ up + bias)``; see :func:`lora_cost`.

    Operations are those of the two products: biases, activation and layer norm are left out.
    """
    num_tokens = sum(tokens for tokens, _ in segments)
    elements = 3 * num_tokens * hidden_size + 2 * hidden_size * has_layer_norm
    elements += sum(2 * hidden_size * rank + rank + hidden_size for tokens, rank in segments if tokens)
    tables = _segment_bytes(len(segments)) + len(segments) * BOTTLENECK_ENTRY_BYTES
    flop = sum(4 * tokens * rank * hidden_size for tokens, rank in segments)
    return Cost(elements * element_bytes + tables, flop)


def vector_cost(segment_tokens: Sequence[int], *, hidden_size: int, element_bytes: int) -> Cost:
    """Of ``rows *= vector`` or ``rows += vector``, each segment with a vector of its own."""
    num_tokens = sum(segment_tokens)
    num_vectors = sum(tokens > 0 for tokens in segment_tokens)
    num_segments = len(segment_tokens)
    elements = (2 * num_tokens + num_vectors) * hidden_size
    tables = _segment_bytes(num_segments) + num_segments * OFFSET_BYTES
    return Cost(elements * element_bytes + tables, num_tokens * hidden_size)


def lookup_cost(*, num_tokens: int, num_sequences: int, distinct_keys: int, window: int) -> Cost:
    """Of the look-up: ids once, one slot of an index for each key that differs, references once."""
    columns = 1 if window == 2 else 3
    per_token = TOKEN_BYTES + columns * REFERENCE_BYTES
    sequences = (num_sequences + 1) * OFFSET_BYTES + num_sequences * SLOT_BYTES
    return Cost(num_tokens * per_token + sequences + distinct_keys * INDEX_SLOT_BYTES, 0)


def merge_cost(
    *,
    num_tokens: int,
    num_sequences: int,
    row_slots: int,
    unigram_rows: int,
    position_rows: int,
    hidden_size: int,
    window: int,
    row_bytes: int,
    element_bytes: int,
) -> Cost:
    """Of the merge: each row slot, unigram and position that occurs once; ids, references, output once.

    ``row_slots`` counts the different (row, slot) that are needed, of ``row_bytes`` an element (1 for int8,
    which has a float32 scale for each slot besides); unigrams, positions and output are of
    ``element_bytes``. Operations are the additions of rows and positions.
    """
    columns = 1 if window == 2 else 3
    scales = 4 * row_slots if row_bytes == 1 else 0
    rows = row_slots * hidden_size * row_bytes + scales
    others = (unigram_rows + position_rows + num_tokens + 2) * hidden_size * element_bytes
    per_token = TOKEN_BYTES + columns * REFERENCE_BYTES
    sequences = (num_sequences + 1) * OFFSET_BYTES + num_sequences * SLOT_BYTES
    return Cost(rows + others + num_tokens * per_token + sequences, 3 * num_tokens * hidden_size)


def copy_cost(piece_bytes: Iterable[int]) -> Cost:
    """Of copies: what crosses the bus, once."""
    return Cost(sum(piece_bytes), 0)


def _segment_bytes(num_segments: int) -> int:
    return (num_segments + 1) * OFFSET_BYTES + num_segments * SLOT_BYTES
