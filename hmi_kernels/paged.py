"""Causal self-attention of new tokens over keys and values that lie in the blocks of a paged cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hmi_kernels import reference
from hmi_kernels.checks import COMPUTE_TYPES, require_rows, require_tensor, require_vector
from hmi_kernels.library import Implementation, define, implemented_in
from hmi_kernels.native import native

__all__ = ["PagedArguments", "paged_attention"]


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
    """Appends the keys and values of new tokens to the cache, and attends to all tokens up to each of them.

    Semantics, for every sequence s with n new tokens and head h: token i of the sequence lies in block
    ``block_tables[s, i // block_size]`` at place ``i % block_size``; the new ones are the last n of
    ``context_lengths[s]``. Then ``out[q] = softmax(query[q] @ keys.T / sqrt(d)) @ values`` over the tokens up
    to q's own. Paging is that of Kwon et al., "Efficient Memory Management for Large Language Model Serving
    with PagedAttention", SOSP 2023.
    A query's result depends neither on other queries, nor on how many tokens came with it, nor on the number
    of threads, bit for bit (backend ``cpu``).

    Args:
        query: [tokens, heads * d]; rows may lie apart (a column slice of a wider tensor). float32, or on a
            GPU and in the reference float16 or bfloat16.
        key: of the same dtype and shape, likewise.
        value: likewise.
        key_cache: [blocks, heads, d, block_size] of that dtype; changed in place.
        value_cache: [blocks, heads, block_size, d], likewise.
        block_tables: int32 [sequences, width]; what lies behind a sequence's last block is not read.
        query_offsets: int64 [sequences + 1], first 0, last ``tokens``.
        context_lengths: int64 [sequences], with the new tokens. No block that a new token goes to may belong
            to another sequence too.

    Returns:
        [tokens, heads * d] of that dtype. Sums are made in float32.

    Raises TypeError or ValueError on arguments of another kind or out of bounds; then the cache is unchanged.
    On a GPU values are not checked: a sequence that cannot be gets zeros, and nothing is written for it.
    """
    result: Tensor = _paged_attention(
        query, key, value, key_cache, value_cache, block_tables, query_offsets, context_lengths
    )
    return result


class PagedArguments(NamedTuple):
    """What :func:`paged_attention` is given."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_offsets: Tensor
    context_lengths: Tensor

    def new_output(self) -> Tensor:
        """Memory for the result."""
        return self.query.new_empty(self.query.shape)


def _check(arguments: PagedArguments) -> None:
    require_rows("query", arguments.query, (None, None), COMPUTE_TYPES)
    dtype, (num_tokens, hidden_size) = arguments.query.dtype, arguments.query.shape
    require_rows("key", arguments.key, (num_tokens, hidden_size), (dtype,))
    require_rows("value", arguments.value, (num_tokens, hidden_size), (dtype,))
    require_tensor("key_cache", arguments.key_cache, dtype, (None, None, None, None))
    num_blocks, num_heads, head_size, block_size = arguments.key_cache.shape
    require_tensor(
        "value_cache", arguments.value_cache, dtype, (num_blocks, num_heads, block_size, head_size)
    )
    if num_heads * head_size != hidden_size or block_size < 1:
        raise ValueError(
            f"key_cache must hold heads of together {hidden_size} elements in blocks of at least one token, "
            f"not {list(arguments.key_cache.shape)}"
        )
    require_vector("context_lengths", arguments.context_lengths, torch.int64)
    num_sequences = arguments.context_lengths.shape[0]
    require_vector("query_offsets", arguments.query_offsets, torch.int64, num_sequences + 1)
    require_tensor("block_tables", arguments.block_tables, torch.int32, (num_sequences, None))


def _cpu_refuses(arguments: PagedArguments) -> str:
    dtype = arguments.query.dtype
    return "" if dtype is torch.float32 else f"query must be torch.float32, not {dtype}"


def _run_on_cpu(arguments: PagedArguments) -> Tensor:
    query, key, value = arguments.query, arguments.key, arguments.value
    num_blocks, num_heads, head_size, block_size = arguments.key_cache.shape
    output = arguments.new_output()
    native.paged_attention(
        query.data_ptr(),
        query.stride(0),
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        output.data_ptr(),
        output.stride(0),
        arguments.key_cache.data_ptr(),
        arguments.value_cache.data_ptr(),
        num_blocks,
        block_size,
        arguments.block_tables.data_ptr(),
        arguments.block_tables.shape[1],
        arguments.query_offsets.data_ptr(),
        arguments.context_lengths.data_ptr(),
        arguments.context_lengths.shape[0],
        query.shape[0],
        num_heads,
        head_size,
        torch.get_num_threads(),
    )
    return output


_paged_attention = define(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor block_tables, Tensor query_offsets, Tensor context_lengths) -> Tensor",
    arguments=PagedArguments,
    check=_check,
    implementations={
        "triton": implemented_in("hmi_kernels.triton.paged_attention", "paged_attention"),
        "cpu": Implementation(_run_on_cpu, _cpu_refuses),
    },
    reference=reference.paged_attention,
    fake=PagedArguments.new_output,
)
