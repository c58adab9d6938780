"""What look-up and merge of PLOT move, counted by the emulator, beside the least that they must.

Rows, positions and index slots lie far apart: of these memory gives whole sectors of 32 bytes, and hardly
ever do two tokens of a block ask for the same. The rest lies in one piece.
"""

from __future__ import annotations

import torch
from emulator.harness import counters, emulated
from kernels.cuda.gemv_traffic import TrafficRow
from torch import Tensor

import hmi_kernels
from hmi_kernels.reference import ROW_BITS, mix_key

__all__ = ["lookup_rows", "merge_rows"]

SECTOR = 32
LENGTH = 128
"""Of every sequence: more than a block takes tokens, so that it meets no position twice."""
VOCABULARY = 2000
LOOKUP_TOKENS = 1024
KEYS = 20_000
SHARE = 0.6
"""Of the windows that have a row; half of the others have each of their bigrams."""
# window, hidden size, type of the rows, tokens: so many that a block reads its layer norm for several tokens
MERGES = (
    (2, 256, torch.float16, 1024),
    (2, 256, torch.int8, 1024),
    (2, 384, torch.float16, 1024),
    (2, 768, torch.float16, 2048),
    (2, 768, torch.int8, 2048),
    (3, 768, torch.float16, 2048),
    (3, 768, torch.int8, 2048),
    (2, 1024, torch.float16, 2048),
    (3, 4096, torch.float16, 1024),
)


def lookup_rows() -> list[TrafficRow]:
    return [_lookup_row(window) for window in (2, 3)]


def merge_rows(shapes: tuple[tuple[int, int, torch.dtype, int], ...] = MERGES) -> list[TrafficRow]:
    return [_merge_row(*shape) for shape in shapes]


def _offsets(num_tokens: int) -> Tensor:
    return torch.arange(0, num_tokens + 1, LENGTH)


def _lookup_row(window: int) -> TrafficRow:
    """An index that holds about half of the windows, and some of the bigrams of the others."""
    ids = torch.randint(0, VOCABULARY, (LOOKUP_TOKENS,), dtype=torch.int32)
    offsets = _offsets(LOOKUP_TOKENS)
    keys = _window_keys(ids, offsets, window)
    some = torch.unique(keys[(torch.rand(keys.shape) < 0.5) & (keys > 0)])
    others = hmi_kernels.ngram_keys(torch.randint(VOCABULARY, 2 * VOCABULARY, (KEYS, 3), dtype=torch.int32))
    index = hmi_kernels.plot_index_build(torch.unique(torch.cat([some, others])))
    chains = torch.zeros(len(offsets) - 1, 1, dtype=torch.int32)
    with emulated("count"):
        references = hmi_kernels.plot_lookup(ids, offsets, [index], chains, window=window)
        (launch,) = counters()
    searched = keys[:, 0].tolist()
    if window == 3:
        searched += keys[references[:, 0] < 0, 1:].flatten().tolist()
    slots = index[:, 0].tolist()
    least = (ids.nbytes + references.nbytes) + SECTOR * sum(_sectors(slots, key) for key in searched if key)
    shape = f"window {window}; {LOOKUP_TOKENS} tokens, {index.shape[0]} slots"
    return TrafficRow(shape, 1, launch.block_bytes, least, launch.excess_wavefronts)


def _window_keys(ids: Tensor, offsets: Tensor, window: int) -> Tensor:
    """int64 [tokens, 1 or 3]: the keys that a token may be searched by; 0 for none."""
    left, right = ids.roll(1), ids.roll(-1)
    left[offsets[:-1]] = -1
    right[offsets[1:] - 1] = -1
    absent = torch.full_like(ids, -1)
    columns = (
        [(ids, right, absent)]
        if window == 2
        else [(left, ids, right), (left, ids, absent), (absent, ids, right)]
    )
    keys = torch.stack([hmi_kernels.ngram_keys(torch.stack(column, dim=1)) for column in columns], dim=1)
    if window == 2:
        keys[right < 0] = 0
    else:
        keys[left < 0, 1] = 0
        keys[right < 0, 2] = 0
    return keys


def _sectors(slots: list[int], key: int) -> int:
    """Sectors of two slots on the way from the key's home to the key or to an empty slot."""
    place = mix_key(key) >> (65 - len(slots).bit_length())
    passed = {place // 2}
    while slots[place] not in (0, key):
        place = (place + 1) % len(slots)
        passed.add(place // 2)
    return len(passed)


def _merge_row(window: int, hidden_size: int, row_type: torch.dtype, num_tokens: int) -> TrafficRow:
    ids = torch.randint(0, VOCABULARY, (num_tokens,), dtype=torch.int32)
    offsets = _offsets(num_tokens)
    references = _random_references(num_tokens, window)
    num_rows = int(references.max()) + 1
    table = torch.randint(-127, 128, (num_rows, window, hidden_size), dtype=torch.int8).to(row_type)
    scales = torch.ones(num_rows, window) if row_type is torch.int8 else torch.empty(0)
    positions, weight, bias = (
        torch.randn(shape).half() for shape in ((LENGTH, hidden_size), hidden_size, hidden_size)
    )
    unigrams = torch.randn(VOCABULARY, 3, hidden_size).half()
    of_sequence = torch.zeros(len(offsets) - 1, dtype=torch.int32)
    shared = (ids, offsets, references, [table], [unigrams], of_sequence, positions, weight, bias)
    with emulated("count"):
        output = hmi_kernels.plot_merge(*shared, layer_norm_eps=1e-5, window=window, row_scales=[scales])
        (launch,) = counters()
    num_table_rows, num_unigram_rows, num_ids = _summands(references, offsets, window)
    least = output.nbytes + references.nbytes + weight.nbytes + bias.nbytes + num_tokens * positions[0].nbytes
    least += num_table_rows * table[0, 0].nbytes + num_unigram_rows * unigrams[0, 0].nbytes
    least += num_ids * ids.element_size()
    if row_type is torch.int8:
        least += SECTOR * int((references >= 0).sum())
    name = str(row_type).removeprefix("torch.")
    shape = f"window {window}, hidden size {hidden_size}, {name} rows; {num_tokens} tokens"
    return TrafficRow(shape, 1, launch.block_bytes, least, launch.excess_wavefronts)


def _random_references(num_tokens: int, window: int) -> Tensor:
    """Every reference to a row of its own."""
    references = torch.randperm(3 * num_tokens).view(num_tokens, 3)
    whole_is_there = torch.rand(num_tokens) < SHARE
    references[~whole_is_there, 0] = -1
    references[whole_is_there, 1:] = -1
    references[:, 1:][torch.rand(num_tokens, 2) < 0.5] = -1
    assert int(references.max()) < 1 << ROW_BITS
    return references[:, :1].contiguous() if window == 2 else references


def _summands(references: Tensor, offsets: Tensor, window: int) -> tuple[int, int, int]:
    """Rows of the table and of unigrams that are summed over all tokens, and tokens that need a unigram."""
    num_rows = num_unigrams = num_ids = 0
    is_there = (references >= 0).tolist()
    starts, ends = set(offsets[:-1].tolist()), {end - 1 for end in offsets[1:].tolist()}
    for t, own in enumerate(is_there):
        neighbors = [] if t in starts else [is_there[t - 1][0] or (window == 3 and is_there[t - 1][2])]
        if t not in ends:
            neighbors.append(own[0] if window == 2 else is_there[t + 1][0] or is_there[t + 1][1])
        center = [] if window == 2 else [own[0] or own[1], own[2]]
        # The unigram by itself: minus one for both neighbors of window 2, as for both bigrams of window 3.
        is_alone = len(neighbors) != 1 if window == 2 else center[0] == center[1]
        unigrams = neighbors.count(False) + is_alone
        num_rows += sum(neighbors) + sum(center)
        num_unigrams += unigrams
        num_ids += unigrams > 0
    return num_rows, num_unigrams, num_ids
