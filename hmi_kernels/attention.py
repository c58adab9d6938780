"""Self-attention over packed sequences of different lengths."""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hmi_kernels import reference
from hmi_kernels.checks import COMPUTE_TYPES, require_rows, require_vector
from hmi_kernels.cuda.segments import misaligned
from hmi_kernels.library import Implementation, define
from hmi_kernels.native import native

__all__ = ["attend_jagged", "attend_packed", "packed_attention"]

FLASH_HEAD_SIZES = (8, 256)
"""Columns per head that torch's kernel for packed rows takes: multiples of the first, up to the second."""
_FLASH_CAPABILITY = 8
"""GPUs before Ampere have no kernel for packed sequences, and torch before 2.10 no name for it."""
_FLASH_MODULE = "torch.nn.attention.varlen"


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
        query: [queries, hidden] of float32, or on a GPU and in the reference float16 or bfloat16; rows may
            lie apart (a column slice of a wider tensor).
        key: [keys, hidden] of the same dtype, likewise.
        value: likewise.
        query_offsets: int64 [sequences + 1], first 0, last ``queries``. Fewer queries than keys are those
            whose results somebody reads.
        key_offsets: int64 [sequences + 1], first 0, last ``keys``.
        num_heads: heads of hidden / num_heads columns each.
        max_length: at least the most keys and queries of a sequence, if the caller knows it: without it a GPU
            has to be waited for. On a GPU offsets are not checked; torch's own kernels attend there.

    Returns:
        [queries, hidden] of that dtype. Sums are made in float32.

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
    require_rows("query", arguments.query, (None, None), COMPUTE_TYPES)
    dtypes = (arguments.query.dtype,)
    num_keys, hidden_size = arguments.key.shape[0], arguments.query.shape[1]
    require_rows("key", arguments.key, (num_keys, hidden_size), dtypes)
    require_rows("value", arguments.value, (num_keys, hidden_size), dtypes)
    require_vector("query_offsets", arguments.query_offsets, torch.int64)
    num_offsets = arguments.query_offsets.shape[0]
    if num_offsets == 0:
        raise ValueError("query_offsets must hold at least the offset 0, not be empty")
    require_vector("key_offsets", arguments.key_offsets, torch.int64, num_offsets)
    if arguments.num_heads < 1 or hidden_size % arguments.num_heads:
        raise ValueError(f"num_heads must divide the hidden size {hidden_size}, not be {arguments.num_heads}")


def _make_output(arguments: _Arguments) -> Tensor:
    return arguments.query.new_empty(arguments.query.shape)


def _cpu_refuses(arguments: _Arguments) -> str:
    dtype = arguments.query.dtype
    return "" if dtype is torch.float32 else f"query must be torch.float32, not {dtype}"


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


def attend_packed(arguments: _Arguments) -> Tensor:
    """By torch's kernel for packed sequences where it can, else by :func:`attend_jagged`."""
    query, key, value, query_offsets, key_offsets, num_heads, _ = arguments
    head_size = query.shape[1] // num_heads
    is_flash_type = query.dtype is not torch.float32 and _has_flash(query.device)
    if not is_flash_type or head_size % FLASH_HEAD_SIZES[0] or head_size > FLASH_HEAD_SIZES[1]:
        return attend_jagged(arguments)
    if query.shape[0] == 0:
        return _make_output(arguments)
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (_aligned(rows).unflatten(1, (num_heads, head_size)) for rows in (query, key, value))
    longest = _max_length(arguments)
    attended = varlen_attn(q, k, v, query_offsets.int(), key_offsets.int(), longest, longest)
    assert isinstance(attended, Tensor)  # nothing else was asked for
    return attended.flatten(1)


def _aligned(rows: Tensor) -> Tensor:
    """The rows, or a copy of rows of 16 bits where these cannot be read 16 bytes at a time.

    As FlashAttention reads them.
    """
    if rows.element_size() == 2 and misaligned("rows", rows):
        return rows.clone(memory_format=torch.contiguous_format)
    return rows


@functools.cache
def _has_flash(device: torch.device) -> bool:
    if device.type != "cuda" or importlib.util.find_spec(_FLASH_MODULE) is None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= _FLASH_CAPABILITY


def _max_length(arguments: _Arguments) -> int:
    if arguments.max_length is not None:
        return arguments.max_length
    lengths = arguments.query_offsets.diff().amax(), arguments.key_offsets.diff().amax()
    return int(torch.maximum(*lengths))


def attend_jagged(arguments: _Arguments) -> Tensor:
    """By torch's attention over jagged tensors, which on a GPU is one kernel, of float32 too.

    The host is busy for longer than with ``varlen_attn``, which needs no nested tensors, but takes 16 bits
    only.
    """
    query, key, value, query_offsets, key_offsets, num_heads, _ = arguments
    if query.shape[0] == 0:
        return _make_output(arguments)
    max_length = _max_length(arguments)

    def by_head(rows: Tensor, offsets: Tensor) -> Tensor:
        heads = _aligned(rows).contiguous().unflatten(1, (num_heads, -1))
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
        "cuda": Implementation(attend_packed),
        "triton": Implementation(attend_packed),
        "cpu": Implementation(_run_on_cpu, _cpu_refuses),
    },
    reference=reference.packed_attention,
    fake=_make_output,
)
