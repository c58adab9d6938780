"""Rows of all windows that the composition study reads, computed once for each distinct window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.composition_texts import neighbors
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import PackedSequences

__all__ = ["StudyRows", "WindowRows", "compute_rows", "contextual_states"]

WINDOWS_PER_BATCH = 4096
TOKENS_PER_BATCH = 8192
ABSENT = -1


@dataclass(frozen=True)
class WindowRows:
    """States of one kind of window around T tokens.

    Attributes:
        rows: float32 [n, W, H] of the distinct windows.
        place: int64 [T], each token's window.
    """

    rows: Tensor
    place: Tensor

    def slot(self, number: int, shift: int = 0) -> Tensor:
        """float32 [T, H]: for token t, this slot of the window of token ``t + shift``.

        Past the ends of all text the tokens wrap around; callers mask what lies in another text.
        """
        return self.rows[self.place.roll(-shift), number]


@dataclass(frozen=True)
class StudyRows:
    """What tables of both widths hold, for T packed tokens.

    Attributes:
        has_left: bool [T, 1], whether the text has a token before.
        has_right: bool [T, 1], and after.
        first: windows of the token alone at slot 0, W = 1: the unigram row of tables of width 2.
        middle: of the token alone at slot 1, W = 3: that of width 3.
        pair: windows of the token and its right neighbor, W = 2, at slots 0 and 1.
        right_pair: the same at slots 1 and 2, W = 3.
        triple: windows around the token, W = 3; at a text's ends those of two tokens.
        pair_masked: of the token, its right neighbor and the placeholder, W = 3.
        masked_pair: of the placeholder, the token and its right neighbor, W = 3.
        masked_left: of the placeholder and the token, W = 2: a neighbor is there, but unknown.
        masked_right: of the token and the placeholder, W = 2.
        masked_around: of the token between two placeholders, W = 3.
        masked_after: of the token and two placeholders, W = 3.
        masked_before: of two placeholders and the token, W = 3.
    """

    has_left: Tensor
    has_right: Tensor
    first: WindowRows
    middle: WindowRows
    pair: WindowRows
    right_pair: WindowRows
    triple: WindowRows
    pair_masked: WindowRows
    masked_pair: WindowRows
    masked_left: WindowRows
    masked_right: WindowRows
    masked_around: WindowRows
    masked_after: WindowRows
    masked_before: WindowRows


@torch.no_grad()
def compute_rows(model: HierarchicalBert, sequences: PackedSequences, placeholder: int) -> StudyRows:
    """Runs every distinct window of the texts through the model's domain layers.

    ``placeholder`` is the id of the token that says that some word stands there, ``[MASK]`` of BERT.
    """
    left, right = neighbors(sequences)
    ids, absent = sequences.input_ids, torch.full_like(left, ABSENT)
    unknown = torch.full_like(left, placeholder)

    def windows(*slots: Tensor) -> WindowRows:
        return _window_rows(model, torch.stack(slots, dim=1))

    return StudyRows(
        has_left=(left >= 0)[:, None],
        has_right=(right >= 0)[:, None],
        first=windows(ids),
        middle=windows(absent, ids, absent),
        pair=windows(ids, right),
        right_pair=windows(absent, ids, right),
        triple=windows(left, ids, right),
        pair_masked=windows(ids, right, unknown),
        masked_pair=windows(unknown, ids, right),
        masked_left=windows(unknown, ids),
        masked_right=windows(ids, unknown),
        masked_around=windows(unknown, ids, unknown),
        masked_after=windows(ids, unknown, unknown),
        masked_before=windows(unknown, unknown, ids),
    )


def _window_rows(model: HierarchicalBert, tokens: Tensor) -> WindowRows:
    distinct, place = torch.unique(tokens, dim=0, return_inverse=True)
    rows = torch.cat([model.window_states(part) for part in distinct.split(WINDOWS_PER_BATCH)])
    return WindowRows(rows, place)


@torch.no_grad()
def contextual_states(model: HierarchicalBert, sequences: PackedSequences) -> Tensor:
    """float32 [T, H]: what the plain base model has after the domain layers, whole texts in view."""
    token_ids = [ids.tolist() for ids in sequences.input_ids.split(sequences.lengths)]
    states, first = [], 0
    while first < len(token_ids):
        last, tokens = first, 0
        while last < len(token_ids) and tokens < TOKENS_PER_BATCH:
            tokens += len(token_ids[last])
            last += 1
        batch = PackedSequences.pack(token_ids[first:last])
        embedded = model.embed(batch.input_ids, batch.positions())
        states.append(model.run_layers(embedded, batch, first=0, last=model.plot_layers))
        first = last
    return torch.cat(states)
