"""Which windows a batch needs, each once, and which of their rows make each token's merged state.

The serving path looks rows up and merges them (``hmi_kernels.plot_lookup`` and ``plot_merge``); here every
row is computed, with gradients. So the merge is written as what it is: each token's state is a sum of rows
with coefficients 1 and -1. A test compares it with the serving path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.construct.distillation_corpus import Misses
from hmi_engine.models.packing import PackedSequences, window_tokens

__all__ = ["MergePlan", "plan_merge"]

ABSENT = -1


@dataclass(frozen=True)
class MergePlan:
    """How the merged states of a batch come from rows.

    Attributes:
        windows: int64 [M, W] distinct windows, every place filled; their W slots are the first M * W rows,
            row ``slot * M + window`` (all windows' slot 0 first).
        tokens: int64 [A] distinct tokens that stand alone in a window, at slot 0: the rows after those.
            None for trigram windows.
        rows: int64 [terms] the row of each term, terms of the same token side by side.
        coefficients: float32 [terms], 1 or -1.
        offsets: int64 [T], where each token's terms begin.
    """

    windows: Tensor
    tokens: Tensor
    rows: Tensor
    coefficients: Tensor
    offsets: Tensor

    def to(self, device: torch.device) -> MergePlan:
        """The same on a device."""
        return MergePlan(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class _Term:
    """A row that some tokens add up: windows int64 [T, W] (width 1: the token alone), ``slot`` of each.

    ``coefficients`` [T] are 0 where the token has no such term.
    """

    windows: Tensor
    slot: int
    coefficients: Tensor


def plan_merge(sequences: PackedSequences, misses: Misses, window: int, placeholder: int) -> MergePlan:
    """Plans the merge of packed sequences as docs/architecture.md defines it.

    Args:
        sequences: the batch, T tokens.
        misses: which n-grams are not in the table.
        window: 2 or 3.
        placeholder: id of the token that stands for one that is not known.
    """
    ids = sequences.input_ids.long()
    around = window_tokens(sequences, 3).long()
    if window == 2:
        return _collect(_bigram_terms(ids, around, misses, placeholder), window)
    return _collect(_trigram_terms(ids, around, misses, placeholder), window)


def _before(flags: Tensor) -> Tensor:
    """What is said of token t - 1, at t; the first token has no neighbour, so its value is never used."""
    return flags.roll(1, 0)


def _after(flags: Tensor) -> Tensor:
    """What is said of token t + 1, at t; not used at the last token."""
    return flags.roll(-1, 0)


def _bigram_terms(ids: Tensor, around: Tensor, misses: Misses, placeholder: int) -> list[_Term]:
    """m[t] = R(t-1, t)[1] + R(t, t+1)[0] - U(t), U counting 1, 0, -1 times with no, one, two neighbours."""
    before, _, after = around.unbind(1)
    has_left, has_right = before >= 0, after >= 0
    left = torch.stack([before.masked_fill(_before(misses.pairs), placeholder), ids], 1)
    right = torch.stack([ids, after.masked_fill(misses.pairs, placeholder)], 1)
    alone = 1 - has_left.long() - has_right.long()
    return [
        _Term(left, 1, has_left.float()),
        _Term(right, 0, has_right.float()),
        _Term(ids[:, None], 0, alone.float()),
    ]


def _trigram_terms(ids: Tensor, around: Tensor, misses: Misses, placeholder: int) -> list[_Term]:
    """m[t] = R(t)[1] + R(t-1)[2] + R(t+1)[0] inside the sequence, a missing R composed of its bigrams."""
    before, _, after = around.unbind(1)
    has_left, has_right = before >= 0, after >= 0
    whole = ~misses.windows
    no_left = ~has_left | _before(misses.pairs)
    no_right = ~has_right | misses.pairs
    unknown = torch.full_like(ids, placeholder)
    exact = torch.stack([before, ids, after], 1)
    exact[exact < 0] = placeholder
    left = torch.stack([before.masked_fill(no_left, placeholder), ids, unknown], 1)
    right = torch.stack([unknown, ids, after.masked_fill(no_right, placeholder)], 1)
    middle = torch.stack([unknown, ids, unknown], 1)
    # Slot 1 of a window that is not whole: left[1] + right[1] - middle[1], each falling to the middle one.
    missing = (~whole).float()
    # The neighbour's window as this token sees it: whole, or the bigram of both, or the token among places
    # that are not known.
    from_left = torch.where(_before(whole)[:, None], exact.roll(1, 0), right.roll(1, 0))
    from_right = torch.where(_after(whole)[:, None], exact.roll(-1, 0), left.roll(-1, 0))
    lone_left = torch.stack([unknown, unknown, ids], 1)
    lone_right = torch.stack([ids, unknown, unknown], 1)
    from_left = torch.where((~_before(whole) & no_left)[:, None], lone_left, from_left)
    from_right = torch.where((~_after(whole) & no_right)[:, None], lone_right, from_right)
    return [
        _Term(exact, 1, whole.float()),
        _Term(left, 1, missing),
        _Term(right, 1, missing),
        _Term(middle, 1, -missing),
        _Term(from_left, 2, has_left.float()),
        _Term(from_right, 0, has_right.float()),
    ]


def _collect(terms: list[_Term], window: int) -> MergePlan:
    """Numbers the distinct windows, and lays the terms of each token side by side."""
    wide = [term for term in terms if term.windows.shape[1] == window]
    narrow = [term for term in terms if term.windows.shape[1] != window]
    windows, window_numbers = _distinct(wide)
    tokens, token_numbers = _distinct(narrow) if narrow else (windows.new_empty(0, 1), [])
    rows = [term.slot * len(windows) + numbers for term, numbers in zip(wide, window_numbers, strict=True)]
    rows += [window * len(windows) + numbers for numbers in token_numbers]
    coefficients = torch.stack([term.coefficients for term in wide + narrow], 1)
    used = coefficients != 0
    counts = used.sum(1)
    return MergePlan(
        windows,
        tokens[:, 0],
        torch.stack(rows, 1)[used],
        coefficients[used],
        counts.cumsum(0) - counts,
    )


def _distinct(terms: list[_Term]) -> tuple[Tensor, list[Tensor]]:
    """The distinct windows [M, W] that terms use, and for each term the number of each token's window."""
    used = [term.coefficients != 0 for term in terms]
    windows = torch.cat([term.windows[here] for term, here in zip(terms, used, strict=True)])
    keys, members = hmi_kernels.ngram_keys(windows.int()).unique(return_inverse=True)
    distinct = hmi_kernels.ngram_tokens(keys)[:, : windows.shape[1]].long()
    numbers = []
    for here, found in zip(used, members.split([int(here.sum()) for here in used]), strict=True):
        numbers.append(torch.zeros(len(here), dtype=torch.int64))
        numbers[-1][here] = found
    return distinct, numbers
