"""The few shapes that batches are padded to, so that a graph captured of one can run another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hmi_engine.models.packing import PackedSequences

__all__ = ["GraphShape"]

SHORT = 128
"""Attention is launched for sequences of up to so many tokens, or for the longest that the model takes."""
MOST_SEQUENCES = 1024
LEAST_TOKENS = 64
LEAST_PADDING = 8
"""Tokens, so that there is always a sequence of padding; products like multiples of 8."""
STEPS = 4
"""Numbers of tokens between a power of two and the next."""


class GraphShape(NamedTuple):
    """What graphs of a batch have to agree in.

    Attributes:
        num_tokens: with padding.
        num_sequences: with those of padding.
        max_length: at least the longest sequence's tokens.
        reads_first: whether of each sequence the first row is read and no other.
    """

    num_tokens: int
    num_sequences: int
    max_length: int
    reads_first: bool

    @classmethod
    def of(cls, sequences: PackedSequences, rows_read: Sequence[int], max_positions: int) -> GraphShape:
        """Of a batch, of whose sequences so many rows are read."""
        num_tokens = _bucket(sequences.num_tokens) + LEAST_PADDING
        max_length = SHORT if sequences.max_length <= SHORT else max_positions
        padding = -(-(num_tokens - sequences.num_tokens) // max_length)
        num_sequences = 1 << (sequences.num_sequences + padding - 1).bit_length()
        return cls(num_tokens, num_sequences, max_length, all(count == 1 for count in rows_read))

    @classmethod
    def most_rows(cls, max_batch_tokens: int) -> tuple[int, int]:
        """Most tokens and sequences of a shape for batches of up to so many tokens."""
        return _bucket(max_batch_tokens) + LEAST_PADDING, MOST_SEQUENCES

    @property
    def is_usable(self) -> bool:
        """Not for so many sequences that padding could have more of them than keys to give them."""
        return self.num_sequences <= MOST_SEQUENCES

    def bounds(self, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For a batch's ``offsets``, int64 [S+1]: offsets of the padded sequences, and what first rows are.

        Each int64: offsets [num_sequences + 1]; rows [num_sequences]; offsets [num_sequences + 1] of the
        sequences into these. A sequence has one row; those of padding share theirs evenly, and padding's
        tokens, as a sequence without tokens has nothing to attend to.
        """
        count, end = len(offsets) - 1, int(offsets[-1])
        spare_tokens, spare_sequences = self.num_tokens - end, self.num_sequences - count
        sharing = min(spare_tokens, spare_sequences)
        part = torch.arange(1, spare_sequences + 1).clamp_(max=sharing)
        padded = torch.cat([offsets, end + part * spare_tokens // sharing])
        rows = padded[:-1].clamp(max=self.num_tokens - 1)
        of_rows = torch.cat([torch.arange(count + 1), count + part * spare_sequences // sharing])
        return padded, rows, of_rows


def _bucket(num_tokens: int) -> int:
    """The least number of tokens, of those that there are shapes for, that is no smaller."""
    octave = 1 << max(num_tokens - 1, 1).bit_length() - 1
    step = max(LEAST_TOKENS, octave // STEPS)
    return -(-num_tokens // step) * step
