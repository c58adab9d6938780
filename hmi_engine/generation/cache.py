"""Keys and values of texts under way: the blocks they lie in, and attention over them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn import functional

import hmi_kernels
from hmi_engine.knowledge.general import GeneralInfo

__all__ = ["BlockTables", "KeyValueCache", "PagedAttention"]


class KeyValueCache:
    """Keys and values of the upper layers, in blocks; domain layers have none.

    Attributes:
        block_size: tokens of a block.
        spare_block: one behind the ``num_blocks`` that sequences may have, for tokens that are nobody's.
        keys: per upper layer [num_blocks + 1, heads, d, block_size].
        values: per upper layer [num_blocks + 1, heads, block_size, d].
    """

    def __init__(
        self,
        general: GeneralInfo,
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """On the CPU it reserves addresses; the operating system gives pages as blocks are written."""
        heads, size = general.num_heads, general.hidden_size // general.num_heads

        def blocks(*sizes: int) -> list[torch.Tensor]:
            shape = (num_blocks + 1, heads, *sizes)
            return [torch.empty(shape, dtype=dtype, device=device) for _ in general.upper_layers]

        self.block_size = block_size
        self.spare_block = num_blocks
        self.keys = blocks(size, block_size)
        self.values = blocks(block_size, size)

    @staticmethod
    def bytes_per_token(general: GeneralInfo, dtype: torch.dtype = torch.float32) -> int:
        """What a token takes in all upper layers together."""
        return 2 * dtype.itemsize * general.hidden_size * general.num_upper_layers


class BlockTables(NamedTuple):
    """Where the sequences of a step have their tokens, as ``hmi_kernels.paged_attention`` takes it.

    Attributes:
        blocks: int32 [sequences, width].
        offsets: int64 [sequences + 1], of the step's new tokens.
        lengths: int64 [sequences], with the new tokens.
    """

    blocks: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(
        cls, blocks: Sequence[list[int]], token_counts: Sequence[int], lengths: Sequence[int]
    ) -> BlockTables:
        """Those of sequences with blocks for ``lengths`` tokens, the last ``token_counts`` of them new."""
        width = max(map(len, blocks))
        filled: list[int] = []
        for each in blocks:
            filled += each + [-1] * (width - len(each))
        return cls(
            torch.tensor(filled, dtype=torch.int32).view(-1, width),
            torch.tensor([0, *accumulate(token_counts)]),
            torch.tensor(lengths),
        )

    def with_spare(self, num_tokens: int, block: int) -> BlockTables:
        """With a sequence of so many tokens behind, all of them in a block that nobody has."""
        blocks = functional.pad(self.blocks, (0, 0, 0, 1), value=-1)
        blocks[-1, 0] = block
        return BlockTables(
            blocks,
            functional.pad(self.offsets, (0, 1), value=int(self.offsets[-1]) + num_tokens),
            functional.pad(self.lengths, (0, 1), value=num_tokens),
        )


class PagedAttention:
    """Attention of a step's tokens over the cache; a ``hmi_engine.models.gpt2_block.Attend``."""

    def __init__(self, cache: KeyValueCache, tables: BlockTables, first_layer: int) -> None:
        """Of the layers from ``first_layer`` on; ``tables`` are where the cache is."""
        self._cache, self._tables, self._first_layer = cache, tables, first_layer

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attend, and keep the new keys and values."""
        place = layer - self._first_layer
        return hmi_kernels.paged_attention(
            query, key, value, self._cache.keys[place], self._cache.values[place], *self._tables
        )
