"""Batches padded so that their products come in few sizes; see ``hmi_engine.models.linear.rounded_rows``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hmi_engine.models.linear import rounded_rows
from hmi_engine.models.packing import (
    PackedSequences,
    PaddedBounds,
    PaddedSelection,
    Readout,
    RowSelection,
    SequenceBounds,
)

__all__ = ["PaddedBatch", "pad_batch"]


class PaddedBatch(NamedTuple):
    """What the layers are told of a padded batch; see :func:`pad_batch`."""

    num_tokens: int
    sequences: SequenceBounds
    readout: RowSelection | None

    def pad(self, hidden_states: Tensor) -> Tensor:
        """The batch's hidden states [T, H] with rows of zeros behind: [num_tokens, H]."""
        missing = self.num_tokens - len(hidden_states)
        return functional.pad(hidden_states, (0, 0, 0, missing)) if missing else hidden_states


def pad_batch(sequences: PackedSequences, readout: Readout | None) -> PaddedBatch:
    """Adds a sequence of tokens that nobody reads, and to the last sequence rows that nobody reads.

    What the layers give begins with what they would have given of the batch itself.
    """
    num_tokens = rounded_rows(sequences.num_tokens)
    spare = num_tokens - sequences.num_tokens
    bounds = PaddedBounds(_continued(sequences.offsets, num_tokens, spare), max(sequences.max_length, spare))
    if readout is None:
        return PaddedBatch(num_tokens, bounds, None)
    num_rows = rounded_rows(len(readout.rows))
    rows = functional.pad(readout.rows, (0, num_rows - len(readout.rows)))
    offsets = readout.offsets.clone()
    offsets[-1] = num_rows
    # An added sequence is read nowhere.
    return PaddedBatch(num_tokens, bounds, PaddedSelection(rows, _continued(offsets, num_rows, spare)))


def _continued(offsets: Tensor, end: int, spare: int) -> Tensor:
    """The offsets with one more behind, if there is anything to add."""
    return torch.cat([offsets, offsets.new_tensor([end])]) if spare else offsets
