"""Self-attention over packed sequences of different lengths."""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["packed_attention"]


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    num_heads: int,
) -> torch.Tensor:
    """Bidirectional attention inside each sequence, nothing across sequences and no padding.

    Semantics: ``out[s] = softmax(q[s] k[s].T / sqrt(d)) v[s]`` per head, for every sequence s.

    Args:
        query: [Q, H], the queries of all sequences one after another.
        key: [T, H].
        value: [T, H].
        query_lengths: S numbers of queries, summing to Q.
        key_lengths: S numbers of keys, summing to T.
        num_heads: heads of H / num_heads columns each.

    Returns:
        [Q, H].
    """
    head_size = query.shape[-1] // num_heads
    outputs = []
    for q, k, v in zip(
        query.split(query_lengths), key.split(key_lengths), value.split(key_lengths), strict=True
    ):
        heads = [part.view(1, -1, num_heads, head_size).transpose(1, 2) for part in (q, k, v)]
        context = functional.scaled_dot_product_attention(*heads)
        outputs.append(context.transpose(1, 2).reshape(-1, query.shape[-1]))
    return torch.cat(outputs)
