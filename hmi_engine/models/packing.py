"""Packed batches: the tokens of all sequences in one row, without padding."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch

__all__ = [
    "PackedSequences",
    "PaddedBounds",
    "PaddedSelection",
    "Readout",
    "RowSelection",
    "SequenceBounds",
    "causal_windows",
    "window_tokens",
]


class SequenceBounds(Protocol):
    """What layers ask of packed sequences."""

    @property
    def offsets(self) -> torch.Tensor:
        """int64 [S+1], as of :class:`PackedSequences`."""

    @property
    def max_length(self) -> int:
        """At least the tokens of the longest sequence."""


class RowSelection(Protocol):
    """What the last layer asks of a readout."""

    @property
    def rows(self) -> torch.Tensor:
        """int64 [Q], as of :class:`Readout`."""

    @property
    def offsets(self) -> torch.Tensor:
        """int64 [S+1], likewise."""


class PaddedBounds(NamedTuple):
    """:class:`SequenceBounds` of a batch with sequences that nobody reads behind."""

    offsets: torch.Tensor
    max_length: int


class PaddedSelection(NamedTuple):
    """:class:`RowSelection` of such a batch."""

    rows: torch.Tensor
    offsets: torch.Tensor


@dataclass(frozen=True)
class PackedSequences:
    """The tokens of S sequences one after another.

    Attributes:
        input_ids: int32 [T].
        offsets: int64 [S+1]; sequence s owns tokens ``offsets[s]`` to ``offsets[s+1]``.
        lengths: the S lengths, as Python integers.
    """

    input_ids: torch.Tensor
    offsets: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def pack(cls, sequences: list[list[int]]) -> PackedSequences:
        """Packs lists of token ids; each must hold at least one token."""
        lengths = tuple(len(sequence) for sequence in sequences)
        ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32)
        return cls(ids, torch.tensor([0, *accumulate(lengths)], dtype=torch.int64), lengths)

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
        return self.input_ids.numel()

    @functools.cached_property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def num_sequences(self) -> int:
        """S, the number of sequences."""
        return len(self.lengths)

    def between(self, first: int, last: int) -> PackedSequences:
        """Sequences ``first`` to ``last`` (exclusive), at least one, as a batch of their own."""
        start, end = int(self.offsets[first]), int(self.offsets[last])
        return PackedSequences(
            self.input_ids[start:end], self.offsets[first : last + 1] - start, self.lengths[first:last]
        )

    def positions(self) -> torch.Tensor:
        """Index of each token in its own sequence, int64 [T]."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.arange(self.num_tokens) - torch.repeat_interleave(self.offsets[:-1], lengths)


def window_tokens(sequences: PackedSequences, window: int) -> torch.Tensor:
    """Token ids of each position's window by slot, -1 where absent: int32 [T, 3] for both widths.

    ``window`` 2: the token and its right neighbor; 3: the left neighbor, the token, the right neighbor.
    """
    ids = sequences.input_ids
    absent = torch.full((1,), -1, dtype=torch.int32)
    before, after = torch.cat([absent, ids[:-1]]), torch.cat([ids[1:], absent])
    before[sequences.offsets[:-1]] = -1
    after[sequences.offsets[1:] - 1] = -1
    if window == 2:
        return torch.stack([ids, after, absent.expand(sequences.num_tokens)], dim=1)
    return torch.stack([before, ids, after], dim=1)


def causal_windows(sequences: PackedSequences, window: int) -> torch.Tensor:
    """Each token behind the up to ``window`` - 1 before it, as a decoder looks it up: int32 [T, 3].

    In the order of the text; -1 fills up behind the token.
    """
    ids, places = sequences.input_ids, sequences.positions()
    windows = torch.full((sequences.num_tokens, 3), -1, dtype=torch.int32)
    for distance in range(window):
        # Tokens with at most ``distance`` before them stand at their own place; the rest at the last one.
        column = places.clamp(max=window - 1) - distance
        has_one = column >= 0
        tokens = torch.arange(sequences.num_tokens)[has_one]
        windows[tokens, column[has_one]] = ids[tokens - distance]
    return windows


@dataclass(frozen=True)
class Readout:
    """The tokens whose last hidden state somebody reads; the last layer computes no others.

    Attributes:
        rows: int64 [Q], increasing indexes into the packed tokens.
        offsets: int64 [S+1]; sequence s owns ``rows[offsets[s]:offsets[s+1]]``.
        counts: the S numbers of rows, as Python integers.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    counts: tuple[int, ...]

    @classmethod
    def select(cls, sequences: PackedSequences, first_only: list[bool]) -> Readout | None:
        """Reads the first token of sequences marked in ``first_only`` and all tokens of the others.

        Returns None when every token is read.
        """
        if not any(first and length > 1 for first, length in zip(first_only, sequences.lengths, strict=True)):
            return None
        starts = sequences.offsets.tolist()
        rows: list[int] = []
        counts = []
        for start, length, first in zip(starts, sequences.lengths, first_only, strict=False):
            count = 1 if first else length
            rows.extend(range(start, start + count))
            counts.append(count)
        offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int64)
        return cls(torch.tensor(rows, dtype=torch.int64), offsets, tuple(counts))

    def between(self, sequences: PackedSequences, first: int, last: int) -> Readout:
        """What is read of ``sequences.between(first, last)``."""
        start, end = int(self.offsets[first]), int(self.offsets[last])
        rows = self.rows[start:end] - sequences.offsets[first]
        return Readout(rows, self.offsets[first : last + 1] - start, self.counts[first:last])
