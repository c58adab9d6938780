"""n-grams: their keys, and how often they occur."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from hmi_kernels import reference
from hmi_kernels.checks import require_on_cpu, require_order, require_packed, require_tensor, require_vector
from hmi_kernels.library import Implementation, define
from hmi_kernels.native import native, native_reason
from hmi_kernels.reference import BITS_PER_SLOT, MAX_TOKEN_ID

__all__ = ["NgramCounter", "count_ngrams", "ngram_keys", "ngram_tokens"]

_MAX_SLOTS = 3


def ngram_keys(tokens: Tensor) -> Tensor:
    """The keys of n-grams given by the tokens in their slots.

    Semantics: ``keys[i] = (tokens[i, 0] + 1) << 42 | (tokens[i, 1] + 1) << 21 | (tokens[i, 2] + 1)``

    Args:
        tokens: int32 [n, slots], 1 to 3 slots; -1 for an absent place. Slots that are not given are absent.

    Returns: int64 [n], all positive.
    Raises ValueError on a token outside -1..``MAX_TOKEN_ID`` and on an n-gram with no token at all.
    """
    require_tensor("tokens", tokens, torch.int32, (None, None))
    num_slots = tokens.shape[1]
    if not 1 <= num_slots <= _MAX_SLOTS:
        raise ValueError(f"tokens must have 1 to {_MAX_SLOTS} slots, not {num_slots}")
    if bool(((tokens < -1) | (tokens > MAX_TOKEN_ID)).any()):
        raise ValueError(f"tokens must lie in -1..{MAX_TOKEN_ID}, but one is {_farthest(tokens)}")
    fields = tokens.long() + 1
    shifts = [BITS_PER_SLOT * (_MAX_SLOTS - 1 - slot) for slot in range(num_slots)]
    keys = torch.stack([fields[:, slot] << shift for slot, shift in enumerate(shifts)]).sum(0)
    if bool((keys == 0).any()):
        raise ValueError(f"tokens[{int((keys == 0).nonzero()[0])}] is an n-gram without any token")
    return keys


def _farthest(tokens: Tensor) -> int:
    lowest, highest = int(tokens.min()), int(tokens.max())
    return lowest if lowest < -1 else highest


def ngram_tokens(keys: Tensor) -> Tensor:
    """The tokens of n-grams given by their keys: the inverse of :func:`ngram_keys`.

    Args:
        keys: int64 [n].

    Returns: int32 [n, 3], -1 for an absent place.
    """
    require_vector("keys", keys, torch.int64)
    mask = (1 << BITS_PER_SLOT) - 1
    fields = [keys >> (2 * BITS_PER_SLOT), keys >> BITS_PER_SLOT & mask, keys & mask]
    return (torch.stack(fields, dim=1) - 1).int()


def count_ngrams(input_ids: Tensor, sequence_offsets: Tensor, *, order: int) -> tuple[Tensor, Tensor]:
    """Counts the n-grams of one batch; for more text than fits in one, use :class:`NgramCounter`.

    Semantics: ``Counter(tuple(s[i:i+order]) for s in sequences for i in range(len(s) - order + 1))``

    Args:
        input_ids: int32 [tokens], the sequences laid end to end.
        sequence_offsets: int64 [sequences + 1]; no n-gram reaches over an offset.
        order: 1, 2 or 3 tokens, in slots 0..order-1 of the key.

    Returns: keys int64 [n], ascending and distinct; counts int64 [n].
    Raises TypeError or ValueError on arguments of another kind, ValueError on ids outside
    0..``MAX_TOKEN_ID``.
    """
    return cast(tuple[Tensor, Tensor], _count_ngrams(input_ids, sequence_offsets, order=order))


class _CountArguments(NamedTuple):
    input_ids: Tensor
    sequence_offsets: Tensor
    order: int


def _check_count(arguments: _CountArguments) -> None:
    require_order(arguments.order)
    require_packed(arguments.input_ids, arguments.sequence_offsets)


def _count_on_cpu(arguments: _CountArguments) -> tuple[Tensor, Tensor]:
    counter = native.NgramCounter(arguments.order)
    _add_to_native(counter, arguments.input_ids, arguments.sequence_offsets)
    return _native_items(counter, 1)


def _fake_count(arguments: _CountArguments) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    keys = arguments.input_ids.new_empty(size, dtype=torch.int64)
    return keys, torch.empty_like(keys)


def _add_to_native(counter: native.NgramCounter, input_ids: Tensor, sequence_offsets: Tensor) -> None:
    counter.add(
        input_ids.data_ptr(),
        input_ids.shape[0],
        sequence_offsets.data_ptr(),
        sequence_offsets.shape[0] - 1,
        torch.get_num_threads(),
    )


def _native_items(counter: native.NgramCounter, min_count: int) -> tuple[Tensor, Tensor]:
    return _unpack(counter.items(min_count, torch.get_num_threads()))


def _unpack(items: bytearray) -> tuple[Tensor, Tensor]:
    if not items:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    pairs = torch.frombuffer(items, dtype=torch.int64).view(-1, 2)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


_count_ngrams = define(
    "count_ngrams(Tensor input_ids, Tensor sequence_offsets, *, int order) -> (Tensor, Tensor)",
    arguments=_CountArguments,
    check=_check_count,
    implementations={"cpu": Implementation(_count_on_cpu)},
    reference=reference.count_ngrams,
    fake=_fake_count,
)


class _TorchCounter:
    """The counter where the compiled one is missing: adds up the counts of batches."""

    def __init__(self, order: int) -> None:
        self._order = order
        self._keys = torch.empty(0, dtype=torch.int64)
        self._counts = torch.empty(0, dtype=torch.int64)
        self.total = 0

    def add(self, input_ids: Tensor, sequence_offsets: Tensor) -> None:
        """Counts a batch."""
        keys, counts = reference.count_ngrams(input_ids, sequence_offsets, order=self._order)
        self._keys, places = torch.unique(torch.cat([self._keys, keys]), return_inverse=True)
        all_counts = torch.cat([self._counts, counts])
        self._counts = torch.zeros_like(self._keys).index_add_(0, places, all_counts)
        self.total += int(counts.sum())

    def __len__(self) -> int:
        """How many distinct n-grams were seen."""
        return self._keys.shape[0]

    @property
    def memory_bytes(self) -> int:
        """The memory that the counts take."""
        return 2 * self._keys.nbytes

    def items(self, min_count: int) -> tuple[Tensor, Tensor]:
        """Keys and counts of those seen at least so often."""
        wanted = self._counts >= min_count
        return self._keys[wanted], self._counts[wanted]

    def drain(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and counts of all, in one piece; forgets them."""
        keys, counts = self._keys, self._counts
        self._keys, self._counts = keys[:0].clone(), counts[:0].clone()
        yield keys, counts


class NgramCounter:
    """Counts n-grams over any number of batches; 32 to 64 bytes of memory for each distinct one.

    Not to be changed from two threads at once.
    """

    def __init__(self, order: int) -> None:
        """``order``: 1, 2 or 3 tokens. Raises ValueError on another."""
        require_order(order)
        self.order = order
        self._counter = _TorchCounter(order) if native_reason else native.NgramCounter(order)

    def add(self, input_ids: Tensor, sequence_offsets: Tensor) -> None:
        """Counts a batch of CPU tensors, as :func:`count_ngrams` takes it; on an error nothing of it."""
        require_packed(input_ids, sequence_offsets)
        require_on_cpu("input_ids", input_ids)
        require_on_cpu("sequence_offsets", sequence_offsets)
        if isinstance(self._counter, _TorchCounter):
            self._counter.add(input_ids, sequence_offsets)
        else:
            _add_to_native(self._counter, input_ids, sequence_offsets)

    def __len__(self) -> int:
        """How many distinct n-grams were seen."""
        return len(self._counter)

    @property
    def total(self) -> int:
        """How many n-grams were seen."""
        return self._counter.total

    @property
    def memory_bytes(self) -> int:
        """The memory that the counts take."""
        return self._counter.memory_bytes

    def items(self, min_count: int = 1) -> tuple[Tensor, Tensor]:
        """Those seen at least ``min_count`` times: keys int64 [n], ascending, and counts int64 [n]."""
        if isinstance(self._counter, _TorchCounter):
            return self._counter.items(min_count)
        return _native_items(self._counter, min_count)

    def drain(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Takes everything out piece by piece, which gives its memory back; ``total`` stays.

        Yields keys int64 [n], ascending and distinct in the piece and in no other one, and counts int64 [n].
        An n-gram that is added later is counted from nothing.
        """
        if isinstance(self._counter, _TorchCounter):
            yield from self._counter.drain()
            return
        for shard in range(self._counter.num_shards):
            yield _unpack(self._counter.take_shard(shard))
