"""PLOT look-up: a program searches the tables for a block of tokens, all their windows one after the other.

Data movement: ids and chains of a block are read once; each probe of an index is one 8-byte read of a key
and, at the hit, one of its row, wherever they lie. Nothing is summed, so no block size changes a result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmi_kernels.reference import BITS_PER_SLOT, MAX_TOKEN_ID, ROW_BITS
from hmi_kernels.settings import is_triton_interpreted
from hmi_kernels.triton.address_table import WORDS_PER_TABLE, address_table
from hmi_kernels.triton.segments import last_at_most
from hmi_kernels.triton.tuned import tuned_launch

if TYPE_CHECKING:
    from hmi_kernels.plot import LookupArguments

__all__ = ["plot_lookup", "plot_lookup_refuses"]

BLOCK_CONFIGS = [
    triton.Config({"block": 64}, num_warps=2),
    triton.Config({"block": 128}, num_warps=4),
    triton.Config({"block": 256}, num_warps=4),
]
"""Tokens of a program. Tried for each window and number of tokens (its power of two)."""

_MAX_TOKEN_ID = tl.constexpr(MAX_TOKEN_ID)
_BITS_PER_SLOT = tl.constexpr(BITS_PER_SLOT)
_ROW_BITS = tl.constexpr(ROW_BITS)
_ABSENT = tl.constexpr(-1)
_NO_KEY = tl.constexpr(0)
_MISSING = tl.constexpr(-1)


def plot_lookup(arguments: LookupArguments) -> Tensor:
    """See :func:`hmi_kernels.plot_lookup`."""
    input_ids, chains, window = arguments.input_ids, arguments.chains, arguments.window
    num_tokens, num_sequences = input_ids.shape[0], chains.shape[0]
    references = arguments.new_references()
    if 0 in (num_tokens, num_sequences, len(arguments.indexes)):
        return references.fill_(-1)
    shifts = (65 - index.shape[0].bit_length() for index in arguments.indexes)
    words = [(i.data_ptr(), i.shape[0], shift) for i, shift in zip(arguments.indexes, shifts, strict=True)]

    tokens_class = triton.next_power_of_2(num_tokens)

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(num_tokens, chosen["block"]),)

    with torch.cuda.device_of(input_ids):
        tuned_launch(
            _lookup_kernel,
            grid,
            (tokens_class, window),
            references,
            input_ids,
            num_tokens,
            arguments.sequence_offsets,
            num_sequences,
            address_table(words, input_ids.device),
            len(words),
            chains,
            chains.shape[1],
            tokens_class,
            window=window,
        )
    return references


def plot_lookup_refuses(arguments: LookupArguments) -> str:
    """Why these kernels cannot take the arguments: there is no such reason."""
    return ""


@triton.autotune(
    configs=BLOCK_CONFIGS[:1] if is_triton_interpreted() else BLOCK_CONFIGS, key=["tokens_class", "window"]
)
@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_indexes", "chain_width", "tokens_class"])
def _lookup_kernel(
    references: tl.tensor,
    input_ids: tl.tensor,
    num_tokens: tl.tensor,
    sequence_offsets: tl.tensor,
    num_sequences: tl.tensor,
    indexes: tl.tensor,
    num_indexes: tl.tensor,
    chains: tl.tensor,
    chain_width: tl.tensor,
    tokens_class: tl.tensor,  # only chooses the config
    window: tl.constexpr,
    block: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    sequence = last_at_most(sequence_offsets, num_sequences, t)
    begin = tl.load(sequence_offsets + sequence)
    end = tl.load(sequence_offsets + sequence + 1)
    is_token = (begin >= 0) & (begin <= t) & (t < end) & (end <= num_tokens)
    has_left = is_token & (t > begin)
    has_right = is_token & (t + 1 < end)
    middle = _load_id(input_ids + t, is_token)
    left = _load_id(input_ids + t - 1, has_left)
    right = _load_id(input_ids + t + 1, has_right)
    absent = tl.full([block], _ABSENT, tl.int32)
    chain = chains + sequence * chain_width
    if window == 2:
        found = _search(_key(middle, right, absent, has_right), chain, chain_width, indexes, num_indexes)
        tl.store(references + t, found, mask=t < num_tokens)
    else:
        whole = _search(_key(left, middle, right, is_token), chain, chain_width, indexes, num_indexes)
        before = _key(left, middle, absent, has_left & (whole == _MISSING))
        after = _key(absent, middle, right, has_right & (whole == _MISSING))
        row = references + t * 3
        tl.store(row, whole, mask=t < num_tokens)
        tl.store(row + 1, _search(before, chain, chain_width, indexes, num_indexes), mask=t < num_tokens)
        tl.store(row + 2, _search(after, chain, chain_width, indexes, num_indexes), mask=t < num_tokens)


@triton.jit
def _load_id(places: tl.tensor, is_there: tl.tensor) -> tl.tensor:
    """The token ids, absent where nothing is there, and less than that where an id cannot be."""
    ids = tl.load(places, mask=is_there, other=_ABSENT)
    return tl.where(is_there & ((ids < 0) | (ids > _MAX_TOKEN_ID)), _ABSENT - 1, ids)


@triton.jit
def _key(slot0: tl.tensor, slot1: tl.tensor, slot2: tl.tensor, is_wanted: tl.tensor) -> tl.tensor:
    """The n-gram keys (csrc/common/ngram_key.h), no key where it is not wanted or an id cannot be."""
    high = (slot0.to(tl.int64) + 1) << (2 * _BITS_PER_SLOT)
    key = high | ((slot1.to(tl.int64) + 1) << _BITS_PER_SLOT) | (slot2.to(tl.int64) + 1)
    is_key = is_wanted & (slot0 >= _ABSENT) & (slot1 >= _ABSENT) & (slot2 >= _ABSENT)
    return tl.where(is_key, key, _NO_KEY)


@triton.jit
def _search(
    key: tl.tensor, chain: tl.tensor, chain_width: tl.tensor, indexes: tl.tensor, num_indexes: tl.tensor
) -> tl.tensor:
    """The reference of each key in the first table of its chain that has it, or missing."""
    found = key * 0 + _MISSING
    is_open = key != _NO_KEY
    for depth in range(0, chain_width):
        table = tl.load(chain + depth, mask=is_open, other=-1).to(tl.int64)
        is_open = is_open & (table >= 0) & (table < num_indexes)
        row = _find(key, indexes + tl.where(is_open, table, 0) * WORDS_PER_TABLE, is_open)
        is_hit = row != _MISSING
        found = tl.where(is_hit, (table << _ROW_BITS) | row, found)
        is_open = is_open & (row == _MISSING)
    return found


@triton.jit
def _find(key: tl.tensor, words: tl.tensor, is_wanted: tl.tensor) -> tl.tensor:
    """The row of each wanted key in its own index, or missing: linear probing, to the end of no index."""
    slots = tl.load(words, mask=is_wanted, other=0).to(tl.pointer_type(tl.int64))
    capacity = tl.load(words + 1, mask=is_wanted, other=1)
    shift = tl.load(words + 2, mask=is_wanted, other=0).to(tl.uint64)
    place = (_mixed(key) >> shift).to(tl.int64)
    row = key * 0 + _MISSING
    is_searching = is_wanted
    probes = 0
    while tl.max(is_searching.to(tl.int32), axis=0) > 0:
        stored = tl.load(slots + 2 * place, mask=is_searching, other=_NO_KEY)
        is_hit = is_searching & (stored == key)
        row = tl.where(is_hit, tl.load(slots + 2 * place + 1, mask=is_hit, other=_MISSING), row)
        probes += 1
        is_searching = is_searching & (stored != key) & (stored != _NO_KEY) & (probes < capacity)
        place = (place + 1) & (capacity - 1)
    return row


@triton.jit
def _mixed(key: tl.tensor) -> tl.tensor:
    """``reference.mix_key`` of int64 keys, as uint64."""
    word = key.to(tl.uint64)
    word = (word ^ (word >> 32)) * 0xD6E8FEB86659FD93
    return (word ^ (word >> 32)) * 0x9E3779B97F4A7C15
