"""Sequences in a paged cache, and torch's own causal attention over each of them whole."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional

import hmi_kernels


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)


class Cache:
    """Keys and values of some sequences, whose blocks lie in a shuffled order."""

    def __init__(self, lengths, heads, head_size, block_size, dtype=torch.float32):
        per_sequence = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(per_sequence) + 2).tolist()
        width = max(per_sequence)
        tables = []
        for count in per_sequence:
            own, order = order[:count], order[count:]
            tables.append(own + [-7] * (width - count))
        self.block_tables = torch.tensor(tables, dtype=torch.int32)
        self.keys = torch.full((sum(per_sequence) + 2, heads, head_size, block_size), torch.nan).to(dtype)
        self.values = torch.full((sum(per_sequence) + 2, heads, block_size, head_size), torch.nan).to(dtype)

    def attend(self, rows, counts, lengths, sequences=None):
        """New tokens of some sequences, which then have so many tokens."""
        chosen = slice(None) if sequences is None else torch.tensor(sequences, dtype=torch.int64)
        tables = self.block_tables[chosen]
        return hmi_kernels.paged_attention(
            *rows, self.keys, self.values, tables, offsets(counts), torch.tensor(lengths, dtype=torch.int64)
        )


def expected(query, key, value, lengths, heads):
    parts = []
    for part in zip(*(rows.split(lengths) for rows in (query, key, value)), strict=True):
        split = [rows.double().unflatten(1, (heads, -1)).transpose(0, 1) for rows in part]
        parts.append(
            functional.scaled_dot_product_attention(*split, is_causal=True).transpose(0, 1).flatten(1)
        )
    return torch.cat(parts).float()
