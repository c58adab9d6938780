"""PLOT by torch alone: sorted keys and ``searchsorted``, gathers, sums and a layer norm.

Best case: all tables in one, references given as places in it, what is known of the sequences made before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PackedBatch", "TorchLookup", "TorchMerge"]

_SLOT_BITS = 21


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end.

    Attributes:
        input_ids: int32 [T].
        has_left: bool [T], whether a token of the same sequence comes before.
        has_right: likewise after.
        positions: int64 [T], places in the sequences.
    """

    input_ids: Tensor
    has_left: Tensor
    has_right: Tensor
    positions: Tensor


class TorchLookup:
    """int64 references [T, 1] or [T, 3] by binary search."""

    name = "torch.searchsorted"
    description = "keys of all tables sorted beforehand, one search for each column of the references"

    def __init__(self, keys: Tensor, references: Tensor, batch: PackedBatch, *, window: int) -> None:
        """``keys`` int64 [N], distinct; ``references`` int64 [N]."""
        self._keys, order = keys.sort()
        self._references = references[order]
        self._batch, self._window = batch, window

    def run(self) -> Tensor:
        """What ``plot_lookup`` gives."""
        batch = self._batch
        middle = batch.input_ids.long() + 1
        left = torch.where(batch.has_left, middle.roll(1), 0)
        right = torch.where(batch.has_right, middle.roll(-1), 0)
        if self._window == 2:
            return torch.where(batch.has_right, self._find(middle, right, None), -1).unsqueeze(1)
        whole = self._find(left, middle, right)
        is_missing = whole < 0
        before = torch.where(is_missing & batch.has_left, self._find(left, middle, None), -1)
        after = torch.where(is_missing & batch.has_right, self._find(None, middle, right), -1)
        return torch.stack([whole, before, after], dim=1)

    def _find(self, first: Tensor | None, second: Tensor, third: Tensor | None) -> Tensor:
        keys = second << _SLOT_BITS
        if first is not None:
            keys = keys | (first << 2 * _SLOT_BITS)
        if third is not None:
            keys = keys | third
        places = torch.searchsorted(self._keys, keys).clamp_(max=len(self._keys) - 1)
        return torch.where(self._keys[places] == keys, self._references[places], -1)


class TorchMerge:
    """Hidden states [T, H] from found rows."""

    name = "torch gathers and layer norm"
    description = "index_select of each slot and of the unigrams, sums in float32, one layer norm"

    def __init__(
        self,
        places: Tensor,
        rows: Tensor,
        unigrams: Tensor,
        batch: PackedBatch,
        norm: tuple[Tensor, Tensor, Tensor, float],
    ) -> None:
        """``places`` int64 [T, 1 or 3] into ``rows`` [N, window, H], -1: none; ``unigrams`` [V, 3, H].

        ``norm``: position embeddings [P, H], weight and bias [H], epsilon.
        """
        self._places = list(places.unbind(1))
        self._window, self._rows = rows.shape[1], rows.flatten(0, 1)
        self._unigrams, self._batch, self._norm = unigrams.flatten(0, 1), batch, norm

    def run(self) -> Tensor:
        """What ``plot_merge`` gives."""
        positions, weight, bias, epsilon = self._norm
        state = self._bigrams() if self._window == 2 else self._trigrams()
        state += positions[self._batch.positions]
        normal = functional.layer_norm(state, weight.shape, weight.float(), bias.float(), epsilon)
        return normal.to(positions.dtype)

    def _bigrams(self) -> Tensor:
        right = torch.where(self._batch.has_right, self._places[0], -1)
        left = torch.where(self._batch.has_left, self._places[0].roll(1), -1)
        has_left, has_right = self._batch.has_left, self._batch.has_right
        state = self._slot(left, 1) + self._unigram((has_left & (left < 0)).float(), 1)
        state += self._slot(right, 0) + self._unigram((has_right & (right < 0)).float(), 2)
        return state + self._unigram(1.0 - has_left.float() - has_right.float(), 0)

    def _trigrams(self) -> Tensor:
        whole, before, after = self._places
        is_whole = whole >= 0
        from_left = torch.where(is_whole, whole, after).roll(1)
        from_left = torch.where(self._batch.has_left, from_left, -1)
        from_right = torch.where(is_whole, whole, before).roll(-1)
        from_right = torch.where(self._batch.has_right, from_right, -1)
        state = self._slot(whole, 1) + self._slot(before, 1) + self._slot(after, 1)
        has_first, has_second = (before >= 0) | is_whole, after >= 0
        state += self._unigram(1.0 - has_first.float() - has_second.float(), 1)
        state += self._unigram((self._batch.has_left & (from_left < 0)).float(), 2)
        state += self._unigram((self._batch.has_right & (from_right < 0)).float(), 0)
        return state + self._slot(from_left, 2) + self._slot(from_right, 0)

    def _slot(self, places: Tensor, slot: int) -> Tensor:
        found = self._rows.index_select(0, places.clamp(min=0) * self._window + slot).float()
        return torch.where((places >= 0)[:, None], found, 0.0)

    def _unigram(self, factor: Tensor, slot: int) -> Tensor:
        """One of a token's unigram rows, times a number for each token."""
        return factor[:, None] * self._unigrams.index_select(0, self._batch.input_ids * 3 + slot).float()
