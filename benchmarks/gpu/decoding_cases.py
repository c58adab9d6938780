"""What only decoders call, as the other ops of the checks: once or twice, with what is hazardous in it."""

from __future__ import annotations

import torch
from torch import Tensor

import hmi_kernels
from benchmarks.gpu.op_case import OpCase, int32, random_tensor
from hmi_kernels.row_tables import quantize_rows

__all__ = ["decoding_cases"]

HEADS, HEAD_SIZE, BLOCK_SIZE = 4, 40, 16
NEW_TOKENS, KEPT_TOKENS = (40, 0, 1, 17, 1), (0, 3, 70, 5, 15)
HIDDEN_SIZE = 264
NUM_ROWS, VOCABULARY, NUM_POSITIONS = 30, 7, 40


def decoding_cases(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> list[OpCase]:
    """Attention over a paged cache for each dtype, merges of two types of rows."""
    return [
        *(_attention(device, dtype) for dtype in dtypes),
        *(_merge(device, row_type) for row_type in (torch.float16, torch.int8)),
    ]


def _attention(device: torch.device, dtype: torch.dtype) -> OpCase:
    """Prompts, a sequence without new tokens, and texts, one of which fills its block."""
    lengths = [new + kept for new, kept in zip(NEW_TOKENS, KEPT_TOKENS, strict=True)]
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).tolist()
    tables = []
    for count in counts:
        own, order = order[:count], order[count:]
        tables.append(own + [-1] * (max(counts) - count))
    num_tokens, hidden_size = sum(NEW_TOKENS), HEADS * HEAD_SIZE
    rows = random_tensor((num_tokens, 3 * hidden_size), device, dtype)
    first = [
        random_tensor((sum(counts), HEADS, *sizes), device, dtype, seed)
        for seed, sizes in enumerate(((HEAD_SIZE, BLOCK_SIZE), (BLOCK_SIZE, HEAD_SIZE)), 1)
    ]
    caches = [cache.clone() for cache in first]
    blocks = torch.tensor(tables, dtype=torch.int32, device=device)
    offsets = torch.tensor([0, *NEW_TOKENS], device=device).cumsum(0)
    contexts = torch.tensor(lengths, device=device)

    def run() -> Tensor:
        for cache, start in zip(caches, first, strict=True):
            cache.copy_(start)
        query, key, value = rows.chunk(3, dim=1)
        return hmi_kernels.paged_attention(query, key, value, *caches, blocks, offsets, contexts)

    def refill(seed: int) -> None:
        for tensor, number in ((rows, 3 * seed), (first[0], 3 * seed + 1), (first[1], 3 * seed + 2)):
            tensor.copy_(random_tensor(tuple(tensor.shape), device, dtype, number))

    return OpCase(f"paged_attention, {str(dtype).removeprefix('torch.')}", run, refill)


def _merge(device: torch.device, row_type: torch.dtype) -> OpCase:
    """Rows of windows, of shorter ones, and of unigrams, from two tables of each."""
    rows = [random_tensor((NUM_ROWS, 1, HIDDEN_SIZE), device, torch.float16, seed) for seed in (1, 2)]
    scales: list[Tensor] = []
    if row_type is torch.int8:
        quantized = [quantize_rows(part) for part in rows]
        rows, scales = [part for part, _ in quantized], [part for _, part in quantized]
    unigrams = [random_tensor((VOCABULARY, 1, HIDDEN_SIZE), device, torch.float16, seed) for seed in (3, 4)]
    norm = random_tensor((NUM_POSITIONS + 2, HIDDEN_SIZE), device, torch.float16, 5)
    count = 3 * NUM_ROWS
    ids, unigram_tables = int32([0] * count, device), int32([0, 1] * (count // 2), device)
    positions = torch.zeros(count, dtype=torch.int64, device=device)
    references = torch.full((count, 2), -1, device=device)

    def refill(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids.copy_(torch.randint(0, VOCABULARY, (count,), generator=generator))
        positions.copy_(torch.randint(0, NUM_POSITIONS, (count,), generator=generator))
        found = torch.randint(0, NUM_ROWS, (count, 2), generator=generator)
        found += torch.randint(0, 2, (count, 2), generator=generator) << hmi_kernels.ROW_BITS
        found[torch.rand(count, 2, generator=generator) < 0.4] = -1
        references.copy_(found)

    def run() -> Tensor:
        return hmi_kernels.causal_merge(
            ids,
            positions,
            references,
            rows,
            unigrams,
            unigram_tables,
            norm[:NUM_POSITIONS],
            norm[NUM_POSITIONS],
            norm[NUM_POSITIONS + 1],
            layer_norm_eps=1e-5,
            row_scales=scales,
        )

    refill(0)
    return OpCase(f"causal_merge, {str(row_type).removeprefix('torch.')} rows", run, refill)
