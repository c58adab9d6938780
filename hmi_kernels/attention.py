"""Self-attention over packed sequences of different lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hmi_kernels import reference
from hmi_kernels.checks import require_rows, require_vector
from hmi_kernels.library import Implementation, define
from hmi_kernels.native import native

__all__ = ["attend_jagged", "packed_attention"]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    *,
    num_heads: int,
    max_length: int | None = None,
) -> Tensor:
    """Attention of each sequence to itself, in both directions; nothing across sequences, nothing padded.

    Semantics, for every sequence s and head: ``out[q] = softmax(query[q] @ key[k].T / sqrt(d)) @ value[k]``
    with q in ``query_offsets[s] .. query_offsets[s + 1]``, k in ``key_offsets[s] .. key_offsets[s + 1]``,
    and d = hidden / num_heads (Vaswani et al., arXiv 1706.03762).
    A query's result depends neither on other queries nor on the number of threads, bit for bit.

    Args:
        query: float32 [queries, hidden]; rows may lie apart (a column slice of a wider tensor).
        key: float32 [keys, hidden], likewise.
        value: float32 [keys, hidden], likewise.
        query_offsets: int64 [sequences + 1], first 0, last ``queries``. Fewer queries than keys are those
            whose results somebody reads.
        key_offsets: int64 [sequences + 1], first 0, last ``keys``.
        num_heads: heads of hidden / num_heads columns each.
        max_length: at least the most keys and queries of a sequence, if the caller knows it: without it a GPU
            has to be waited for. On a GPU offsets are not checked; torch's own kernels attend there.

    Returns:
        float32 [queries, hidden].

    Raises TypeError or ValueError on arguments of another kind or out of bounds.
    """
    result: Tensor = _packed_attention(
        query, key, value, query_offsets, key_offsets, num_heads, max_length=max_length
    )
    return result


class _Arguments(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    num_heads: int
    max_length: int | None = None


def _check(arguments: _Arguments) -> None:
    require_rows("query", arguments.query, (None, None))
    num_keys, hidden_size = arguments.key.shape[0], arguments.query.shape[1]
    require_rows("key", arguments.key, (num_keys, hidden_size))
    require_rows("value", arguments.value, (num_keys, hidden_size))
    require_vector("query_offsets", arguments.query_offsets, torch.int64)
    num_offsets = arguments.query_offsets.shape[0]
    if num_offsets == 0:
        raise ValueError("query_offsets must hold at least the offset 0, not be empty")
    require_vector("key_offsets", arguments.key_offsets, torch.int64, num_offsets)
    if arguments.num_heads < 1 or hidden_size % arguments.num_heads:
        raise ValueError(f"num_heads must divide the hidden size {hidden_size}, not be {arguments.num_heads}")


def _make_output(arguments: _Arguments) -> Tensor:
    return torch.empty(arguments.query.shape, dtype=torch.float32, device=arguments.query.device)


def _run_on_cpu(arguments: _Arguments) -> Tensor:
    query, key, value = arguments.query, arguments.key, arguments.value
    output = _make_output(arguments)
    native.packed_attention(
        query.data_ptr(),
        query.stride(0),
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        output.data_ptr(),
        output.stride(0),
        arguments.query_offsets.data_ptr(),
        arguments.key_offsets.data_ptr(),
        arguments.query_offsets.shape[0] - 1,
        query.shape[0],
        key.shape[0],
        arguments.num_heads,
        query.shape[1] // arguments.num_heads,
        torch.get_num_threads(),
    )
    return output


def attend_jagged(arguments: _Arguments) -> Tensor:
    """By torch's attention over jagged tensors, which on a GPU is one kernel, float32 included.

    torch's ``varlen_attn``, which needs no nested tensors, is for 16-bit types only.
    """
    query, key, value, query_offsets, key_offsets, num_heads, max_length = arguments
    if query.shape[0] == 0:
        return _make_output(arguments)
    if max_length is None:
        max_length = int(torch.maximum(query_offsets.diff().amax(), key_offsets.diff().amax()))

    def by_head(rows: Tensor, offsets: Tensor) -> Tensor:
        heads = rows.contiguous().unflatten(1, (num_heads, -1))
        jagged = torch.nested.nested_tensor_from_jagged(heads, offsets, min_seqlen=0, max_seqlen=max_length)
        return jagged.transpose(1, 2)

    attended = functional.scaled_dot_product_attention(
        by_head(query, query_offsets), by_head(key, key_offsets), by_head(value, key_offsets)
    )
    return attended.transpose(1, 2).values().flatten(1)


_packed_attention = define(
    "packed_attention(Tensor query, Tensor key, Tensor value, Tensor query_offsets, Tensor key_offsets, "
    "int num_heads, *, int? max_length=None) -> Tensor",
    arguments=_Arguments,
    check=_check,
    implementations={
        "cuda": Implementation(attend_jagged),
        "triton": Implementation(attend_jagged),
        "cpu": Implementation(_run_on_cpu),
    },
    reference=reference.packed_attention,
    fake=_make_output,
)
