"""What decoders need, in plain torch: look-up and merge of single tokens, attention over a paged cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["causal_references", "causal_rows", "paged_attention"]

Search = Callable[[Tensor], Tensor]
"""References, int64 [tokens], of windows int32 [tokens, 3] whose absent places are -1."""


def causal_references(windows: Tensor, search: Search) -> Tensor:
    """See :func:`hmi_kernels.causal_lookup`."""
    present = windows >= 0
    if bool((windows < -1).any()) or not bool((present[:, 0] & (present[:, 1] | ~present[:, 2])).all()):
        raise ValueError("windows must hold 1 to 3 token ids, and -1 only behind them")
    whole = torch.where(present[:, 1], search(windows), -1)
    last_two = torch.cat([windows[:, 1:], torch.full_like(windows[:, :1], -1)], dim=1)
    last_two = torch.where(present[:, 2:], last_two, windows)
    shorter = torch.where(present[:, 2] & (whole < 0), search(last_two), -1)
    return torch.stack([whole, shorter], dim=1)


def causal_rows(
    rows: Tensor, positions: Tensor, position_embeddings: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm of rows float32 [tokens, hidden] and the embeddings of their positions."""
    if bool(((positions < 0) | (positions >= position_embeddings.shape[0])).any()):
        raise ValueError(f"positions must lie in 0..{position_embeddings.shape[0] - 1}")
    total = rows + position_embeddings[positions].float()
    normalized = functional.layer_norm(total, total.shape[-1:], weight.float(), bias.float(), eps)
    return normalized.to(position_embeddings.dtype)


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_offsets: Tensor,
    context_lengths: Tensor,
) -> Tensor:
    """See :func:`hmi_kernels.paged_attention`: sequence by sequence."""
    num_blocks, num_heads, head_size, block_size = key_cache.shape
    offsets, lengths, tables = query_offsets.tolist(), context_lengths.tolist(), block_tables.tolist()
    if offsets[0] != 0 or offsets[-1] != query.shape[0] or offsets != sorted(offsets):
        raise ValueError(f"query_offsets must run from 0 to {query.shape[0]} and not decrease")
    for sequence, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        num_new = offsets[sequence + 1] - offsets[sequence]
        if not num_new <= length <= len(table) * block_size:
            raise ValueError(f"sequence {sequence} has {length} tokens, {num_new} of them new")
        if any(not 0 <= block < num_blocks for block in table[: -(-length // block_size)]):
            raise ValueError(f"sequence {sequence} names a block that the cache does not have")
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for sequence, length in enumerate(lengths):
        new = slice(offsets[sequence], offsets[sequence + 1])
        num_new = new.stop - new.start
        places = torch.arange(length, device=query.device)
        blocks = block_tables[sequence].long()[places // block_size]
        inside = places % block_size
        written = slice(length - num_new, length)
        key_cache[blocks[written], :, :, inside[written]] = key[new].unflatten(1, (num_heads, head_size))
        value_cache[blocks[written], :, inside[written]] = value[new].unflatten(1, (num_heads, head_size))
        q = query[new].float().unflatten(1, (num_heads, head_size)).transpose(0, 1)
        k = key_cache[blocks, :, :, inside].float().transpose(0, 1)
        v = value_cache[blocks, :, inside].float().transpose(0, 1)
        is_later = places[None, :] > places[written][:, None]
        scores = (q @ k.transpose(1, 2) * head_size**-0.5).masked_fill(is_later, -torch.inf)
        output[new] = (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1).to(query.dtype)
    return output
