"""A decoder's domain layers over windows of a token and those before it: the last slot alone is a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from hmi_engine.models.gpt2_block import Gpt2Block
from hmi_engine.models.linear import rounded_rows

__all__ = ["CausalWindowLayers"]

ROWS_PER_STEP = 1536
"""Slots computed at a time: few enough that they stay in the caches, enough for fast matrix products."""


class CausalWindowLayers:
    """Blocks 0 to K-1 over windows of up to three tokens; safe to call from many threads.

    A window stands at positions 0, 1, 2 from the left, over its tokens alone.
    """

    def __init__(self, words: torch.Tensor, positions: torch.Tensor, blocks: Sequence[Gpt2Block]) -> None:
        """Takes the embeddings of words [V, H] and of positions [P, H].

        Raises:
            ValueError: there are no blocks.
        """
        if not blocks:
            raise ValueError("windows need at least one domain layer; plot_layers is 0")
        self._words, self._positions = words, positions
        self._blocks = tuple(blocks)
        self.hidden_size = words.shape[1]

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states of the last tokens of windows after the domain layers.

        Args:
            tokens: int32 [M, W] token ids in the order of the text, -1 behind the last.

        Returns:
            float32 [M, 1, H].
        """
        rows = torch.empty(len(tokens), 1, self.hidden_size)
        lengths = (tokens >= 0).sum(1)
        for length in range(1, tokens.shape[1] + 1):
            chosen = (lengths == length).nonzero()[:, 0]
            for part in chosen.split(max(1, ROWS_PER_STEP // length)) if chosen.numel() else ():
                # More windows than there are, so that products come in few sizes.
                missing = rounded_rows(len(part)) - len(part)
                windows = functional.pad(tokens[part, :length], (0, 0, 0, missing))
                rows[part, 0] = self._last_states(windows)[: len(part)]
        return rows

    def _last_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Windows [M, W] without absent tokens -> [M, H]."""
        num_windows, width = tokens.shape
        embedded = functional.embedding(tokens.long(), self._words) + self._positions[:width]
        hidden_states = embedded.view(num_windows * width, self.hidden_size)

        def attend(_: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            heads = self._blocks[0].num_heads
            q, k, v = (
                part.reshape(num_windows, width, heads, -1).transpose(1, 2) for part in (query, key, value)
            )
            context = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return context.transpose(1, 2).reshape(num_windows * width, self.hidden_size)

        for block in self._blocks:
            hidden_states = block.forward(hidden_states, attend)
        return hidden_states.view(num_windows, width, self.hidden_size)[:, -1]
