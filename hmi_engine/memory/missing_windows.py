"""The windows of a batch that no table holds: each once, and which of them to compute under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import hmi_kernels
from hmi_engine.models.packing import PackedSequences, window_tokens

__all__ = ["MissingWindows", "WindowBudget", "find_missing", "most_wanted"]

_ROUNDING = 1e-6
"""Of a window: that a share so often added up is less than the whole number which it makes."""


@dataclass(frozen=True)
class MissingWindows:
    """Distinct windows of one layer identity that a batch lacks.

    Attributes:
        identity: names the domain layers that compute them.
        keys: int64 [M], distinct.
        positions: int64 [P], the packed tokens whose windows they are.
        members: int64 [P], which of the M each position's window is.
    """

    identity: str
    keys: torch.Tensor
    positions: torch.Tensor
    members: torch.Tensor

    def occurrences(self) -> torch.Tensor:
        """How often the batch has each window, int64 [M]."""
        return torch.bincount(self.members, minlength=len(self.keys))

    def only(self, chosen: torch.Tensor) -> MissingWindows:
        """Those of the windows that ``chosen`` bool [M] marks."""
        kept = chosen[self.members]
        renumbered = chosen.cumsum(0) - 1
        return MissingWindows(
            self.identity, self.keys[chosen], self.positions[kept], renumbered[self.members[kept]]
        )


class WindowBudget:
    """How many missing windows to compute: a share of the tokens, over batches that may be small.

    What a batch's tokens do not fill up to a window counts for the next, as does one window that nobody
    missed; more is not saved up, so that no batch computes more than its own share and one. For one thread.
    """

    def __init__(self, share: float) -> None:
        """``share`` windows may be computed per token."""
        self._share = share
        self._left = 0.0

    def grant(self, num_tokens: int) -> int:
        """The most windows to compute for the next batch, of so many tokens; then :meth:`spend` is called."""
        self._left = min(self._left, 1.0) + self._share * num_tokens
        return int(self._left + _ROUNDING)

    def spend(self, num_computed: int) -> None:
        """So many of them were computed."""
        self._left -= num_computed


def find_missing(
    sequences: PackedSequences, references: torch.Tensor, identities: Sequence[str], *, window: int
) -> list[MissingWindows]:
    """The missing windows of a batch by layer identity; identities that lack none are left out.

    Args:
        sequences: S packed sequences of T tokens.
        references: int64 [T, 1] or [T, 3], as ``hmi_kernels.plot_lookup`` returns them.
        identities: of each sequence, the identity of its domain's layers.
        window: 2 or 3. A single token is a window of width 3, but not of width 2: its row is its unigram's.
    """
    tokens = window_tokens(sequences, window)
    missing = references[:, 0] < 0
    if window == 2:
        missing &= tokens[:, 1] >= 0
    distinct = list(dict.fromkeys(identities))
    found = []
    for identity in distinct:
        chosen = missing
        if len(distinct) > 1:
            wanted = torch.tensor([other == identity for other in identities])
            chosen = missing & wanted.repeat_interleave(torch.tensor(sequences.lengths))
        positions = chosen.nonzero()[:, 0]
        if positions.numel():
            keys, members = torch.unique(hmi_kernels.ngram_keys(tokens[positions]), return_inverse=True)
            found.append(MissingWindows(identity, keys, positions, members))
    return found


def most_wanted(
    missing: Sequence[MissingWindows], weights: Sequence[torch.Tensor], limit: int
) -> list[MissingWindows]:
    """The ``limit`` windows that a batch has most often; of equals those of the greatest weight.

    Args:
        missing: windows by identity.
        weights: for each of ``missing`` float64 [M], not negative: how frequent windows are elsewhere.
        limit: how many windows may stay.
    """
    if not missing:
        return []
    weight = torch.cat(list(weights))
    # Below one, so that it only decides between equal numbers of occurrences.
    tie_break = weight / (weight.amax() + 1.0)
    priority = torch.cat([part.occurrences() for part in missing]) + tie_break
    chosen = torch.zeros(len(priority), dtype=torch.bool)
    chosen[torch.topk(priority, min(limit, len(priority))).indices] = True
    parts = chosen.split([len(part.keys) for part in missing])
    return [part.only(own) for part, own in zip(missing, parts, strict=True) if bool(own.any())]
