"""Addresses of a list of tensors, written to the device by launches alone.

A copy from the host would wait for the device, or break graph capture. Here the addresses travel as kernel
arguments, a few tables at a launch, and a kernel that chooses a table at run time reads them from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["WORDS_PER_TABLE", "address_table"]

WORDS_PER_TABLE = tl.constexpr(4)
_WORDS_PER_LAUNCH = 16


def address_table(tables: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """int64 [tables, 4] on the device: up to four words (addresses, sizes, codes) of each table."""
    words_per_table = int(WORDS_PER_TABLE)
    table = torch.empty(len(tables), words_per_table, dtype=torch.int64, device=device)
    padding = (0,) * words_per_table
    words = list(itertools.chain.from_iterable((*of, *padding)[:words_per_table] for of in tables))
    for first in range(0, len(words), _WORDS_PER_LAUNCH):
        part = words[first : first + _WORDS_PER_LAUNCH]
        rest = [0] * (_WORDS_PER_LAUNCH - len(part))
        place = table[first // words_per_table :] if first else table
        _store_words[(1,)](place, len(part), *part, *rest, num_warps=1)
    return table


_WORDS = [f"word{i}" for i in range(_WORDS_PER_LAUNCH)]


# Annotated with a type and not specialized: one compiled kernel for all values.
@triton.jit(do_not_specialize=["count", *_WORDS], do_not_specialize_on_alignment=["table"])
def _store_words(
    table: tl.tensor,
    count: tl.tensor,
    word0: tl.int64,
    word1: tl.int64,
    word2: tl.int64,
    word3: tl.int64,
    word4: tl.int64,
    word5: tl.int64,
    word6: tl.int64,
    word7: tl.int64,
    word8: tl.int64,
    word9: tl.int64,
    word10: tl.int64,
    word11: tl.int64,
    word12: tl.int64,
    word13: tl.int64,
    word14: tl.int64,
    word15: tl.int64,
) -> None:
    words = (
        word0, word1, word2, word3, word4, word5, word6, word7,
        word8, word9, word10, word11, word12, word13, word14, word15,
    )  # fmt: skip
    for i in tl.static_range(16):
        tl.store(table + i, words[i].to(tl.int64), mask=i < count)
