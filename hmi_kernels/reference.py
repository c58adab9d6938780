"""The ops in plain torch: what they mean, the backend of last resort, and the oracle of the fast ones.

Each takes the arguments of the op of its name, described there, after the op's own checks of dtypes and
shapes; here the values are checked. Sums are made in float32. ``plot_merge`` and the grouped adapters can be
differentiated with respect to tables, hidden states and arena.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hmi_kernels.decoding_reference import causal_references, causal_rows, paged_attention
from hmi_kernels.grouped_reference import (
    ACTIVATIONS,
    grouped_bias,
    grouped_bottleneck,
    grouped_bottleneck_delta,
    grouped_lora,
    grouped_lora_delta,
    grouped_product,
    grouped_scale,
    grouped_weight_gradient,
)

__all__ = [
    "ACTIVATIONS",
    "MAX_TOKEN_ID",
    "ROW_BITS",
    "causal_lookup",
    "causal_merge",
    "count_ngrams",
    "grouped_bias",
    "grouped_bottleneck",
    "grouped_bottleneck_delta",
    "grouped_lora",
    "grouped_lora_delta",
    "grouped_product",
    "grouped_scale",
    "grouped_weight_gradient",
    "mix_key",
    "packed_attention",
    "paged_attention",
    "plot_index_build",
    "plot_index_find",
    "plot_index_insert",
    "plot_lookup",
    "plot_merge",
]

BITS_PER_SLOT = 21
MAX_TOKEN_ID = (1 << BITS_PER_SLOT) - 2
ROW_BITS = 40
"""A row reference is ``table << ROW_BITS | row``; -1 says that the n-gram is in no table."""
_WORD = (1 << 64) - 1


def count_ngrams(input_ids: Tensor, sequence_offsets: Tensor, *, order: int) -> tuple[Tensor, Tensor]:
    """Counts by sorting the keys of all n-grams."""
    _require_sequences(input_ids, sequence_offsets)
    _require_token_ids(input_ids)
    _, last = _sequence_bounds(input_ids, sequence_offsets)
    starts = torch.arange(input_ids.shape[0], device=input_ids.device)
    starts = starts[starts + order - 1 <= last]
    slots = [input_ids[starts + i] if i < order else torch.full_like(starts, -1) for i in range(3)]
    keys, counts = torch.unique(_keys(*slots), return_counts=True)
    return keys, counts


def mix_key(key: int) -> int:
    """The mixed 64-bit word of a key; its high bits say where the key lives in an index."""
    word = ((key ^ (key >> 32)) * 0xD6E8FEB86659FD93) & _WORD
    return ((word ^ (word >> 32)) * 0x9E3779B97F4A7C15) & _WORD


def plot_index_build(keys: Tensor) -> Tensor:
    """Inserts one key after the other."""
    if bool((keys <= 0).any()):
        raise ValueError(f"keys must be positive, but one is {int(keys.min())}")
    if torch.unique(keys).shape[0] != keys.shape[0]:
        raise ValueError("keys must be distinct, but one comes twice")
    capacity = 2
    while capacity < 2 * keys.shape[0]:
        capacity *= 2
    index = torch.zeros(capacity, 2, dtype=torch.int64)
    _put(index, keys.tolist(), range(keys.shape[0]))
    return index.to(keys.device)


def _put(index: Tensor, keys: list[int], rows: list[int] | range) -> None:
    capacity = index.shape[0]
    slots = index[:, 0].tolist()
    for key, row in zip(keys, rows, strict=True):
        place = mix_key(key) >> (64 - (capacity.bit_length() - 1))
        while slots[place] not in (0, key):
            place = (place + 1) % capacity
        slots[place] = key
        index[place, 0], index[place, 1] = key, row


def plot_index_insert(index: Tensor, keys: Tensor, rows: Tensor) -> None:
    """Inserts one key after the other."""
    if bool((keys <= 0).any()) or bool((rows < 0).any()):
        raise ValueError("keys must be positive and rows not negative")
    num_added = torch.unique(keys[plot_index_find(index, keys) < 0]).shape[0]
    num_used = int((index[:, 0] != 0).sum())
    if 2 * (num_used + num_added) > index.shape[0]:
        raise ValueError(
            f"index of {index.shape[0]} slots holds {num_used} keys and cannot take {num_added} more: "
            "at most half may be used. Build a larger one"
        )
    _put(index, keys.tolist(), rows.tolist())


def plot_index_find(index: Tensor, keys: Tensor) -> Tensor:
    """Searches the sorted keys: where a key lies in the index makes no difference to what it means."""
    used = index[index[:, 0] != 0]
    if used.shape[0] == 0:
        return torch.full_like(keys, -1)
    sorted_keys, order = used[:, 0].sort()
    places = torch.searchsorted(sorted_keys, keys).clamp(max=sorted_keys.shape[0] - 1)
    return torch.where(sorted_keys[places] == keys, used[order, 1][places], -1)


def plot_lookup(
    input_ids: Tensor, sequence_offsets: Tensor, indexes: list[Tensor], chains: Tensor, *, window: int
) -> Tensor:
    """Searches all tables for all tokens, then picks by the chains."""
    _require_sequences(input_ids, sequence_offsets)
    _require_token_ids(input_ids)
    if bool(((chains < -1) | (chains >= len(indexes))).any()):
        raise ValueError(f"chains must hold -1..{len(indexes) - 1}, as there are {len(indexes)} indexes")
    token_chains = chains[_sequence_of_tokens(sequence_offsets)]
    position, last = _sequence_bounds(input_ids, sequence_offsets)
    place = torch.arange(input_ids.shape[0], device=input_ids.device)
    left = torch.where(position > 0, input_ids.roll(1), -1)
    right = torch.where(place < last, input_ids.roll(-1), -1)
    absent = torch.full_like(input_ids, -1)
    if window == 2:
        found = _search(indexes, token_chains, _keys(input_ids, right, absent))
        return torch.where(right >= 0, found, -1).unsqueeze(1)
    whole = _search(indexes, token_chains, _keys(left, input_ids, right))
    before = _search(indexes, token_chains, _keys(left, input_ids, absent))
    after = _search(indexes, token_chains, _keys(absent, input_ids, right))
    before = torch.where((whole < 0) & (left >= 0), before, -1)
    after = torch.where((whole < 0) & (right >= 0), after, -1)
    return torch.stack([whole, before, after], dim=1)


def _search(indexes: list[Tensor], token_chains: Tensor, keys: Tensor) -> Tensor:
    """The reference of each key in the first table of its chain that has it, or -1."""
    references = torch.full_like(keys, -1)
    rows = [plot_index_find(index, keys) for index in indexes]
    is_open = torch.ones_like(keys, dtype=torch.bool)
    for tables in token_chains.unbind(1):
        is_open = is_open & (tables >= 0)
        for table, row in enumerate(rows):
            wanted = is_open & (tables == table) & (references < 0) & (row >= 0)
            references = torch.where(wanted, table << ROW_BITS | row, references)
    return references


def plot_merge(
    input_ids: Tensor,
    sequence_offsets: Tensor,
    references: Tensor,
    row_tables: list[Tensor],
    unigram_tables: list[Tensor],
    sequence_unigram_tables: Tensor,
    position_embeddings: Tensor,
    layer_norm_weight: Tensor,
    layer_norm_bias: Tensor,
    *,
    layer_norm_eps: float,
    window: int,
    row_scales: Sequence[Tensor] = (),
    codebooks: Sequence[Tensor] = (),
) -> Tensor:
    """Gathers every slot of every window, then sums as the formula says."""
    _require_sequences(input_ids, sequence_offsets)
    position, last = _sequence_bounds(input_ids, sequence_offsets)
    if input_ids.shape[0] and int(position.max()) >= position_embeddings.shape[0]:
        raise ValueError(
            f"a sequence has {int(position.max()) + 1} tokens, but position_embeddings has "
            f"{position_embeddings.shape[0]} rows"
        )
    if bool(((sequence_unigram_tables < 0) | (sequence_unigram_tables >= len(unigram_tables))).any()):
        raise ValueError(f"sequence_unigram_tables must hold 0..{len(unigram_tables) - 1}")
    has_left = (position > 0).unsqueeze(1)
    has_right = (torch.arange(input_ids.shape[0], device=input_ids.device) < last).unsqueeze(1)
    table_of_token = sequence_unigram_tables[_sequence_of_tokens(sequence_offsets)]
    tables = _RowTables(row_tables, row_scales, codebooks)

    def unigrams(needed: Tensor, slot: int) -> Tensor:
        return _unigram_rows(unigram_tables, table_of_token, input_ids, needed.squeeze(1), slot)

    def gather(needed: Tensor, slot: int) -> Tensor:
        return _gather(tables, needed.squeeze(1), slot, position_embeddings.shape[1])

    merge = _merge_bigrams if window == 2 else _merge_trigrams
    summed = merge(references, gather, unigrams, has_left, has_right) + position_embeddings[position].float()
    weight, bias = layer_norm_weight.float(), layer_norm_bias.float()
    merged = functional.layer_norm(summed, summed.shape[1:], weight, bias, layer_norm_eps)
    return merged.to(position_embeddings.dtype)


UnigramRows = Callable[[Tensor, int], Tensor]
"""One slot of the unigram rows of the tokens where a mask bool [tokens, 1] is true, zero elsewhere."""
Gather = Callable[[Tensor, int], Tensor]
"""One slot of the rows that int64 [tokens, 1] references, zero where it is -1."""


def _merge_bigrams(
    references: Tensor, gather: Gather, unigrams: UnigramRows, has_left: Tensor, has_right: Tensor
) -> Tensor:
    left = torch.where(has_left, references.roll(1, 0), -1)
    right = torch.where(has_right, references, -1)
    rows = gather(left, 1) + gather(right, 0)
    rows = rows + unigrams(has_left & (left < 0), 1) + unigrams(has_right & (right < 0), 2)
    # U + (left - U) + (right - U), a bracket being zero without its neighbor: U counts 1, 0 or -1 times.
    return rows + _unigrams_left_over(has_left, has_right, unigrams, 0)


def _merge_trigrams(
    references: Tensor, gather: Gather, unigrams: UnigramRows, has_left: Tensor, has_right: Tensor
) -> Tensor:
    whole, before, after = references.split(1, dim=1)
    is_whole = whole >= 0
    before, after = torch.where(is_whole, -1, before), torch.where(is_whole, -1, after)
    composed = gather(before, 1) + gather(after, 1)
    left_over = _unigrams_left_over((before >= 0) | is_whole, after >= 0, unigrams, 1)
    center = gather(whole, 1) + composed + left_over
    from_left = torch.where(has_left, torch.where(is_whole, whole, after).roll(1, 0), -1)
    from_right = torch.where(has_right, torch.where(is_whole, whole, before).roll(-1, 0), -1)
    beside = gather(from_left, 2) + unigrams(has_left & (from_left < 0), 2)
    beside = beside + gather(from_right, 0) + unigrams(has_right & (from_right < 0), 0)
    return center + beside


def _unigrams_left_over(has_first: Tensor, has_second: Tensor, unigrams: UnigramRows, slot: int) -> Tensor:
    """U where both are missing, -U where both are there, zero where one is."""
    rows = unigrams(has_first == has_second, slot)
    return torch.where(has_first, -rows, rows)


class _RowTables(NamedTuple):
    contents: list[Tensor]
    scales: Sequence[Tensor]
    codebooks: Sequence[Tensor]

    def read(self, number: int, rows: Tensor, slot: int) -> Tensor:
        """float32 [rows, hidden]: one slot of these rows of a table."""
        content = self.contents[number]
        if content.dtype is torch.uint8:
            return _decode(content, self.codebooks[number], rows, slot)
        found = _take(content, rows, slot)
        if content.dtype is torch.int8:
            return found * _take(self.scales[number], rows, slot).unsqueeze(1)
        return found


def _gather(tables: _RowTables, references: Tensor, slot: int, hidden_size: int) -> Tensor:
    """float32 [tokens, hidden]: one slot of the referenced rows, zero where the reference is -1."""
    table_of, row_of = references >> ROW_BITS, references & ((1 << ROW_BITS) - 1)
    num_tables = len(tables.contents)
    rows = torch.zeros(references.shape[0], hidden_size, device=references.device)
    if bool(((references >= 0) & (table_of >= num_tables)).any()) or bool((references < -1).any()):
        raise ValueError(f"references must name a table 0..{num_tables - 1} or be -1")
    for table, content in enumerate(tables.contents):
        here = (references >= 0) & (table_of == table)
        if bool((row_of[here] >= content.shape[0]).any()):
            raise ValueError(
                f"references name a row outside row_tables[{table}], which has {content.shape[0]}"
            )
        rows = rows.index_put((here.nonzero().squeeze(1),), tables.read(table, row_of[here], slot))
    return rows


def _take(table: Tensor, rows: Tensor, slot: int) -> Tensor:
    """One slot of these rows as float32 beside ``rows``; the table may lie in host memory."""
    return table[rows.to(table.device), slot].float().to(rows.device)


def _decode(codes: Tensor, codebooks: Tensor, rows: Tensor, slot: int) -> Tensor:
    """One slot of these rows: the piece of every code, side by side; float32 beside ``rows``."""
    wanted = codes[rows.to(codes.device), slot].long().to(codebooks.device)
    pieces = codebooks[slot, torch.arange(codes.shape[2], device=codebooks.device), wanted]
    return pieces.flatten(1).float().to(rows.device)


def _unigram_rows(
    unigram_tables: list[Tensor], tables: Tensor, input_ids: Tensor, needed: Tensor, slot: int
) -> Tensor:
    """float32 [tokens, hidden]: one slot of the unigram rows of the tokens that need it, zero elsewhere."""
    hidden_size = unigram_tables[0].shape[2] if unigram_tables else 1
    rows = torch.zeros(input_ids.shape[0], hidden_size, device=input_ids.device)
    for table, content in enumerate(unigram_tables):
        here = needed & (tables == table)
        ids = input_ids[here].long()
        if bool(((ids < 0) | (ids >= content.shape[0])).any()):
            raise ValueError(
                f"input_ids hold an id outside unigram_tables[{table}], which has {content.shape[0]} rows"
            )
        found = _take(content, ids, slot)
        rows = rows.index_put((here.nonzero().squeeze(1),), found)
    return rows


def causal_lookup(windows: Tensor, indexes: list[Tensor], chains: Tensor, token_chains: Tensor) -> Tensor:
    """Searches all tables for all windows, then picks by the chains."""
    if bool((windows > MAX_TOKEN_ID).any()):
        raise ValueError(f"windows must hold token ids up to {MAX_TOKEN_ID}")
    if bool(((chains < -1) | (chains >= len(indexes))).any()):
        raise ValueError(f"chains must hold -1..{len(indexes) - 1}, as there are {len(indexes)} indexes")
    if bool(((token_chains < 0) | (token_chains >= chains.shape[0])).any()):
        raise ValueError(f"token_chains must hold 0..{chains.shape[0] - 1}")
    of_tokens = chains[token_chains]
    return causal_references(windows, lambda wanted: _search(indexes, of_tokens, _keys(*wanted.unbind(1))))


def causal_merge(
    input_ids: Tensor,
    positions: Tensor,
    references: Tensor,
    row_tables: list[Tensor],
    unigram_tables: list[Tensor],
    token_unigram_tables: Tensor,
    position_embeddings: Tensor,
    layer_norm_weight: Tensor,
    layer_norm_bias: Tensor,
    *,
    layer_norm_eps: float,
    row_scales: Sequence[Tensor] = (),
    codebooks: Sequence[Tensor] = (),
) -> Tensor:
    """Gathers one row for each token: of its window, of its last two tokens, or its own."""
    if bool(((token_unigram_tables < 0) | (token_unigram_tables >= len(unigram_tables))).any()):
        raise ValueError(f"token_unigram_tables must hold 0..{len(unigram_tables) - 1}")
    whole, shorter = references.unbind(1)
    chosen = torch.where(whole == -1, shorter, whole)
    tables = _RowTables(row_tables, row_scales, codebooks)
    rows = _gather(tables, chosen, 0, position_embeddings.shape[1])
    rows = rows + _unigram_rows(unigram_tables, token_unigram_tables, input_ids, chosen < 0, 0)
    return causal_rows(
        rows, positions, position_embeddings, layer_norm_weight, layer_norm_bias, layer_norm_eps
    )


def _keys(slot0: Tensor, slot1: Tensor, slot2: Tensor) -> Tensor:
    fields = [slot.long() + 1 for slot in (slot0, slot1, slot2)]
    return fields[0] << (2 * BITS_PER_SLOT) | fields[1] << BITS_PER_SLOT | fields[2]


def _sequence_of_tokens(sequence_offsets: Tensor) -> Tensor:
    lengths = sequence_offsets.diff()
    return torch.repeat_interleave(torch.arange(lengths.shape[0], device=lengths.device), lengths)


def _sequence_bounds(input_ids: Tensor, sequence_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """For every token, its position in its sequence and where the sequence's last token lies."""
    sequence = _sequence_of_tokens(sequence_offsets)
    position = torch.arange(input_ids.shape[0], device=input_ids.device) - sequence_offsets[sequence]
    return position, sequence_offsets[sequence + 1] - 1


def _require_sequences(input_ids: Tensor, sequence_offsets: Tensor) -> None:
    is_valid = int(sequence_offsets[0]) == 0 and int(sequence_offsets[-1]) == input_ids.shape[0]
    if not is_valid or bool((sequence_offsets.diff() < 0).any()):
        raise ValueError(f"sequence_offsets must rise from 0 to the number of tokens, {input_ids.shape[0]}")


def _require_token_ids(input_ids: Tensor) -> None:
    if bool(((input_ids < 0) | (input_ids > MAX_TOKEN_ID)).any()):
        raise ValueError(f"input_ids must lie in 0..{MAX_TOKEN_ID}")


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    num_heads: int,
    *,
    max_length: int | None = None,
) -> Tensor:
    """See :func:`hmi_kernels.packed_attention`."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    head_size = query.shape[1] // num_heads
    bounds = zip(_pairs(query_offsets, query), _pairs(key_offsets, key), strict=True)
    for (first_query, last_query), (first_key, last_key) in bounds:
        if first_query < last_query and first_key == last_key:
            raise ValueError("a sequence has queries but no keys to attend to")
        q, k, v = (
            part.float().unflatten(1, (num_heads, head_size)).transpose(0, 1)
            for part in (query[first_query:last_query], key[first_key:last_key], value[first_key:last_key])
        )
        weights = (q @ k.transpose(1, 2) * head_size**-0.5).softmax(dim=-1)
        output[first_query:last_query] = (weights @ v).transpose(0, 1).flatten(1)
    return output


def _pairs(offsets: Tensor, rows: Tensor) -> list[tuple[int, int]]:
    """Bounds of each sequence; raises unless they describe all rows."""
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != rows.shape[0] or ends != sorted(ends):
        raise ValueError(f"offsets must run from 0 to the number of rows {rows.shape[0]} and not decrease")
    return list(itertools.pairwise(ends))
