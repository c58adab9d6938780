"""What the first domain layer makes of a token at a slot by itself: looked up, not computed."""

from __future__ import annotations

import threading

import torch

from hmi_engine.models.bert_layer import BertEmbeddings, BertLayer

__all__ = ["TokenProjections"]

_MAX_SLOTS = 3
_ABSENT = -1


class TokenProjections:
    """Embedding, query, key and value of layer 0 by (token, slot), computed when first asked for.

    Rows are written once and never replaced: when the memory is used up, others are computed each time. Words
    come by Zipf's law, so those that came first are with few exceptions the frequent ones. Safe to use from
    many threads; two that need the same new token at once both compute it.
    """

    def __init__(self, embed: BertEmbeddings, layer: BertLayer, capacity_bytes: int) -> None:
        """Reserves address space; the operating system gives pages as rows arrive."""
        self._embed, self._layer = embed, layer
        self.hidden_size = layer.query.weight.shape[1]
        row_bytes = 4 * self.hidden_size * torch.float32.itemsize
        capacity = min(max(1, capacity_bytes // row_bytes), _MAX_SLOTS * embed.vocab_size)
        self._rows = torch.empty(capacity, 4 * self.hidden_size)
        self._numbers = torch.full((_MAX_SLOTS, embed.vocab_size), _ABSENT, dtype=torch.int32)
        self._used = 0
        self._lock = threading.Lock()

    def look_up(self, tokens: torch.Tensor, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and projections of layer 0, ordered by slot, then by window.

        Args:
            tokens: int32 [M, P], all present.
            slots: the P slots that they stand at.

        Returns:
            Embeddings [P * M, H], and queries, keys and values side by side [P * M, 3H]: views of one tensor.
        """
        found = torch.empty(len(slots), len(tokens), 4 * self.hidden_size)
        for part, slot, column in zip(found, slots, tokens.long().unbind(1), strict=True):
            self._look_up_slot(column, slot, part)
        flat = found.view(-1, 4 * self.hidden_size)
        return flat[:, : self.hidden_size], flat[:, self.hidden_size :]

    def _look_up_slot(self, tokens: torch.Tensor, slot: int, found: torch.Tensor) -> None:
        with self._lock:
            numbers = self._numbers[slot][tokens]
        missing = (numbers < 0).nonzero()[:, 0]
        torch.index_select(self._rows, 0, numbers.clamp_(min=0), out=found)
        if missing.numel():
            new, members = torch.unique(tokens[missing], return_inverse=True)
            rows = self._compute(new, slot)
            found[missing] = rows[members]
            self._keep(new, slot, rows)

    def _compute(self, tokens: torch.Tensor, slot: int) -> torch.Tensor:
        """tokens int64 [N] -> [N, 4H]."""
        embedded = self._embed(tokens, torch.full_like(tokens, slot))
        return torch.cat([embedded, self._layer.query_key_value(embedded)], dim=1)

    def _keep(self, tokens: torch.Tensor, slot: int, rows: torch.Tensor) -> None:
        with self._lock:
            start = self._used
            end = min(start + len(tokens), len(self._rows))
            self._used = end
        kept = end - start
        self._rows[start:end] = rows[:kept]
        with self._lock:  # only now may others read them
            self._numbers[slot, tokens[:kept]] = torch.arange(start, end, dtype=torch.int32)
