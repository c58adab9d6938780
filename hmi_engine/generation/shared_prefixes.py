"""What prompts that begin alike have in common although their tenants' weights differ.

Below the first layer that a tenant adapts its hidden states, keys and values are the base's own. So a prompt
need not go through these layers where another tenant's has gone before: its keys and values there are copied,
and its tokens enter at the first layer that is the tenant's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hmi_engine.generation.block_pool import PrefixKeys
from hmi_engine.generation.cache import KeyValueCache
from hmi_engine.generation.sequence import DecoderSequence

__all__ = ["PrefixBlock", "SharedPiece", "SharedPrefixes"]


class PrefixBlock(NamedTuple):
    """A full block of a prompt, as it is below some layer.

    Attributes:
        hidden_states: [block_size, H], what enters the layer.
        keys: [layers below, heads, d, block_size].
        values: [layers below, heads, block_size, d].
    """

    hidden_states: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self)


@dataclass(frozen=True)
class SharedPiece:
    """A sequence's part of a step that begins with full blocks of its prompt.

    Attributes:
        layer: the first that the tenant adapts, above the first upper layer.
        keys: of the full blocks, as they are below that layer.
        blocks: of the cache, where their keys and values lie or will lie.
        known: the first of the blocks, as far as they are known; at least one token of the part is not.
    """

    layer: int
    keys: Sequence[bytes]
    blocks: Sequence[int]
    known: Sequence[PrefixBlock]

    @property
    def num_known_tokens(self) -> int:
        """Tokens that enter at ``layer``."""
        return sum(len(block.hidden_states) for block in self.known)


class SharedPrefixes:
    """Blocks of prompts by digests of tables, layer and tokens up to their end, within a budget of bytes.

    The one unused for longest goes first. For one thread, and on a device for its stream ``compute``.

    Attributes:
        num_tokens: that entered at a later layer so far.
    """

    def __init__(self, cache: KeyValueCache, first_layer: int, capacity_bytes: int) -> None:
        """Of prompts whose keys and values from ``first_layer`` on lie in ``cache``."""
        self._cache = cache
        self._first_layer = first_layer
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self.num_tokens = 0
        self._blocks: OrderedDict[bytes, PrefixBlock] = OrderedDict()

    def piece(self, sequence: DecoderSequence, num_tokens: int, layer: int | None) -> SharedPiece | None:
        """A sequence's next tokens, if they begin with full blocks of a prompt that others may have too.

        ``layer`` is the first that the tenant adapts; of one that adapts none, prompts are shared whole.
        """
        size, start = self._cache.block_size, sequence.num_computed
        if num_tokens < size or layer is None or layer <= self._first_layer:
            return None
        end = min(start + num_tokens, sequence.num_prompt)
        if start % size or end - start < size:
            return None
        if sequence.base_keys is None:
            weights = sequence.base_weights + layer.to_bytes(4, "little")
            sequence.base_keys = PrefixKeys(weights, b"", size)
        places = slice(start // size, end // size)
        keys = sequence.base_keys.extend(sequence.token_ids)[places]
        return SharedPiece(layer, keys, sequence.blocks[places], self._find(keys[: (num_tokens - 1) // size]))

    def write_known(self, pieces: Sequence[SharedPiece | None]) -> None:
        """Copies keys and values of what is known to where the sequences have theirs."""
        for piece in pieces:
            if piece is None:
                continue
            self.num_tokens += piece.num_known_tokens
            for block, known in zip(piece.blocks, piece.known, strict=False):
                for place in range(piece.layer - self._first_layer):
                    self._cache.keys[place][block].copy_(known.keys[place])
                    self._cache.values[place][block].copy_(known.values[place])

    def enter(
        self,
        pieces: Sequence[SharedPiece | None],
        counts: Sequence[int],
        hidden_states: torch.Tensor,
        layer: int,
    ) -> torch.Tensor:
        """Puts known tokens before the others of their sequences, where they enter; keeps what is new.

        hidden_states [T, H] have ``counts`` rows of each sequence; -> [T + known tokens, H].
        """
        parts: list[torch.Tensor] = []
        for piece, rows in zip(pieces, hidden_states.split(list(counts)), strict=True):
            if piece is not None and piece.layer == layer:
                parts += [known.hidden_states for known in piece.known]
                self._keep(piece, rows)
            parts.append(rows)
        return torch.cat(parts)

    def _find(self, keys: Sequence[bytes]) -> list[PrefixBlock]:
        """The longest run from the first on that is there."""
        found = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        for key in reversed(keys[: len(found)]):  # without the first the others are of no use
            self._blocks.move_to_end(key)
        return found

    def _keep(self, piece: SharedPiece, rows: torch.Tensor) -> None:
        """Takes the blocks behind the known ones, of which ``rows`` are the first rows."""
        size, num_known = self._cache.block_size, len(piece.known)
        layers = range(piece.layer - self._first_layer)
        new = list(enumerate(zip(piece.keys[num_known:], piece.blocks[num_known:], strict=True)))
        for place, (key, block) in reversed(new):
            if key in self._blocks:  # of a sequence before this one in the step
                continue
            self._add(
                key,
                PrefixBlock(
                    # Not a view, which would keep all rows.
                    rows[place * size : (place + 1) * size].clone(),
                    torch.stack([self._cache.keys[each][block] for each in layers]),
                    torch.stack([self._cache.values[each][block] for each in layers]),
                ),
            )

    def _add(self, key: bytes, block: PrefixBlock) -> None:
        self._blocks[key] = block
        self._used_bytes += block.num_bytes
        while self._used_bytes > self._capacity_bytes:
            _, dropped = self._blocks.popitem(last=False)
            self._used_bytes -= dropped.num_bytes
