"""Sequences of a training batch without padding: those of one length together, whoever they belong to.

Linear layers and adapters take all tokens as one matrix; attention takes each group of equally long sequences
as one dense block, which needs no mask.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.nn import functional

from hmi_engine.construct.trainable_layers import Reading
from hmi_engine.construct.training_cache import HiddenStateCache
from hmi_engine.construct.training_data import WordPlaces
from hmi_engine.models.packing import PackedSequences

__all__ = ["PackedBatch", "Segments"]


@dataclass(frozen=True)
class Segments:
    """Which rows belong to which slot, as the grouped ops take it.

    Attributes:
        offsets: int64 [segments + 1].
        slots: int32 [segments].
    """

    offsets: Tensor
    slots: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Sequences of several slots, by length and then by slot.

    Attributes:
        hidden_states: float32 [T, H], or with ``halfway`` [T, 2H], as a ``HiddenStateCache`` holds them.
        token_ids: of the S sequences, the shortest first.
        slots: of the S sequences.
        places: int64 [S], where the sequences were when the batch was packed.
        halfway: what the hidden states are.
    """

    hidden_states: Tensor
    token_ids: tuple[list[int], ...]
    slots: tuple[int, ...]
    places: Tensor
    halfway: bool

    @classmethod
    def pack(cls, texts: Sequence[tuple[int, HiddenStateCache, int]]) -> PackedBatch:
        """Packs (slot, its cache, number of the text in it); all caches are alike ``halfway``."""
        lengths = [len(states.token_ids[number]) for _, states, number in texts]
        order = sorted(range(len(texts)), key=lambda place: (lengths[place], texts[place][0]))
        parts = []
        for place in order:
            _, states, number = texts[place]
            begin = int(states.offsets[number])
            parts.append(states.hidden_states[begin : begin + lengths[place]])
        return cls(
            hidden_states=torch.cat(parts),
            token_ids=tuple(texts[place][1].token_ids[texts[place][2]] for place in order),
            slots=tuple(texts[place][0] for place in order),
            places=torch.tensor(order),
            halfway=texts[0][1].halfway,
        )

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Of the S sequences, ascending."""
        return tuple(map(len, self.token_ids))

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
        return self.hidden_states.shape[0]

    @property
    def num_sequences(self) -> int:
        """S, the number of sequences."""
        return len(self.token_ids)

    def sequences(self) -> PackedSequences:
        """The same sequences as the serving layers take them."""
        return PackedSequences.pack(list(self.token_ids))

    def token_segments(self) -> Segments:
        """Segments of the tokens; neighbours of one slot are one segment."""
        return self._segments(self.lengths)

    def sequence_segments(self) -> Segments:
        """Segments of rows of which every sequence has one."""
        return self._segments([1] * self.num_sequences)

    def _segments(self, counts: Sequence[int]) -> Segments:
        runs = [
            (slot, sum(counts[place] for place in run))
            for slot, run in groupby(range(self.num_sequences), lambda place: self.slots[place])
        ]
        offsets = torch.tensor([0, *accumulate(count for _, count in runs)])
        return Segments(offsets, torch.tensor([slot for slot, _ in runs], dtype=torch.int32))

    def rows(self) -> Tensor:
        """The hidden states, one row a token."""
        return self.hidden_states

    def first_rows(self, rows: Tensor) -> Tensor:
        """Of rows [T, *] those of the sequences' first tokens, [S, *]."""
        return rows[torch.tensor([0, *accumulate(self.lengths)][:-1])]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
        """Attention within each sequence; query [T, H] or [S, H], key and value [T, H] -> as the query."""
        groups = self._groups()
        is_first_only = query.shape[0] != key.shape[0]
        sizes = [length * count for length, count in groups]
        query_sizes = [count for _, count in groups] if is_first_only else sizes
        parts = zip(groups, query.split(query_sizes), key.split(sizes), value.split(sizes), strict=True)
        contexts = []
        for (_, count), *rows in parts:
            q, k, v = (part.view(count, -1, num_heads, part.shape[1] // num_heads) for part in rows)
            context = functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            )
            contexts.append(context.transpose(1, 2).reshape(-1, query.shape[1]))
        return torch.cat(contexts)

    def read(self, rows: Tensor, reading: Reading, words: WordPlaces | None) -> Tensor:
        """What heads read of the last layer's rows, sequences in the order in which they were packed.

        ``reading`` ``"cls"``: the first tokens, which are all of ``rows`` [S, H]; ``"mean"``: over the tokens
        of rows [T, H]; ``"words"``: the tokens ``words``.
        """
        if reading == "words":
            assert words is not None
            starts = torch.tensor([0, *accumulate(self.lengths)][:-1])[self._back()]
            return rows[starts[words.sequences] + words.places]
        if reading == "mean":
            groups = self._groups()
            blocks = zip(rows.split([length * count for length, count in groups]), groups, strict=True)
            rows = torch.cat([block.view(count, length, -1).mean(1) for block, (length, count) in blocks])
        return rows[self._back()]

    def _back(self) -> Tensor:
        """For each sequence in the order in which they were packed, where it is now."""
        return torch.argsort(self.places)

    def _groups(self) -> list[tuple[int, int]]:
        """(length, number of sequences) of the groups of one length."""
        return [(length, len(list(run))) for length, run in groupby(self.lengths)]
