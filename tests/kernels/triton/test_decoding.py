"""What decoders need on a GPU, by Triton: merge of single tokens, attention over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from kernels.paged_cases import Cache, expected, offsets
from torch import Tensor
from torch.nn import functional

import hmi_kernels

COMPUTE_TYPES = (torch.float16, torch.bfloat16, torch.float32)
ROW_TYPES = (*COMPUTE_TYPES, torch.int8, torch.uint8)
HIDDEN = 24
NUM_POSITIONS = 8


def attention_bound(rows: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Largest error of an element: weights (at most 1 together) and results are rounded to the dtype."""
    largest = float(rows[2].float().abs().max())
    return 2e-5 * largest if dtype is torch.float32 else 1.1 * largest * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", COMPUTE_TYPES)
@pytest.mark.parametrize(("head_size", "block_size"), [(1, 3), (32, 16), (60, 7)])
@pytest.mark.parametrize("lengths", [[1], [2, 0, 1, 3], [17, 16, 130, 1]])
def test_attention_equals_torch(
    lengths: list[int], head_size: int, block_size: int, dtype: torch.dtype
) -> None:
    rows = torch.randn(sum(lengths), 3 * 2 * head_size).to(dtype).split(2 * head_size, dim=1)
    cache = Cache(lengths, 2, head_size, block_size, dtype)
    found = cache.attend(rows, lengths, lengths)
    wanted = expected(*rows, lengths, 2)
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), wanted, atol=attention_bound(rows, dtype), rtol=0)


@pytest.mark.parametrize("dtype", COMPUTE_TYPES)
def test_tokens_that_come_in_pieces(dtype: torch.dtype) -> None:
    """A prompt in pieces, then token by token, beside another that waits meanwhile."""
    heads, head_size, lengths = 2, 16, [100, 12]
    rows = [torch.randn(sum(lengths), heads * head_size).to(dtype) for _ in range(3)]
    cache = Cache(lengths, heads, head_size, 8, dtype)
    found = torch.empty_like(rows[0])
    done = [0, 0]
    for counts in ([70, 3], [25, 0], [1, 1], [1, 8], [3, 0]):
        starts = [done[0], lengths[0] + done[1]]
        done = [before + count for before, count in zip(done, counts, strict=True)]
        index = torch.cat(
            [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        )
        found[index] = cache.attend([part[index] for part in rows], counts, done)
    wanted = expected(*rows, lengths, heads)
    torch.testing.assert_close(found.float(), wanted, atol=attention_bound(rows, dtype), rtol=0)


def test_nothing_of_others_is_read() -> None:
    """Other sequences' keys and values are NaN, and so is what no token has been written to."""
    lengths, dtype = [9, 70], torch.float16
    rows = [torch.randn(79, 32).to(dtype) for _ in range(3)]
    clean = Cache(lengths, 2, 16, 4, dtype).attend(rows, lengths, lengths)
    for part in rows:
        part[:9] = torch.nan
    dirty = Cache(lengths, 2, 16, 4, dtype).attend(rows, lengths, lengths)
    assert dirty[:9].isnan().all()
    assert torch.equal(dirty[9:], clean[9:])


@pytest.mark.parametrize(
    ("counts", "lengths", "block"), [([3], [2], 0), ([3], [9], 0), ([3], [3], 4), ([3], [3], -1)]
)
def test_a_sequence_that_cannot_be_gets_zeros(counts: list[int], lengths: list[int], block: int) -> None:
    """What lies on a device is checked there: nothing is written or read out of bounds."""
    keys, values = torch.zeros(4, 2, 4, 4), torch.zeros(4, 2, 4, 4)
    rows = [torch.ones(3, 8) for _ in range(3)]
    tables = torch.tensor([[block, 1]], dtype=torch.int32)
    found = hmi_kernels.paged_attention(*rows, keys, values, tables, offsets(counts), torch.tensor(lengths))
    assert not found.any() and not keys.any() and not values.any()


def test_no_sequences() -> None:
    cache = Cache([5], 2, 4, 4)
    assert cache.attend([torch.randn(0, 8) for _ in range(3)], [], [], []).shape == (0, 8)


def merge_arguments(dtype: torch.dtype, row_type: torch.dtype) -> dict[str, object]:
    """Two tables, the second of which is of ``row_type``, and a token for each row, unigrams in between."""
    plain, table = torch.randn(3, 1, HIDDEN).to(dtype), torch.randn(6, 1, HIDDEN)
    scales, codebooks = torch.empty(0), torch.empty(0, dtype=torch.float16)
    if row_type is torch.int8:
        table, scales = hmi_kernels.quantize_rows(table)
    elif row_type is torch.uint8:
        codebooks = torch.randn(1, HIDDEN // 4, 256, 4).half()
        table = torch.randint(0, 256, (6, 1, HIDDEN // 4), dtype=torch.uint8)
    else:
        table = table.to(row_type)
    references = [[-1, -1]]
    for number, rows in enumerate((plain, table)):
        for row in range(len(rows)):
            reference = number << hmi_kernels.ROW_BITS | row
            references += [[reference, -1], [-1, reference], [-1, -1]]
    count = len(references)
    return {
        "input_ids": torch.randint(0, 5, (count,), dtype=torch.int32),
        "positions": torch.arange(count) % NUM_POSITIONS,
        "references": torch.tensor(references),
        "row_tables": [plain, table],
        "unigram_tables": [torch.randn(5, 1, HIDDEN).to(dtype) for _ in range(2)],
        "token_unigram_tables": torch.arange(count, dtype=torch.int32) % 2,
        "position_embeddings": torch.randn(NUM_POSITIONS, HIDDEN).to(dtype),
        "layer_norm_weight": torch.randn(HIDDEN).to(dtype),
        "layer_norm_bias": torch.randn(HIDDEN).to(dtype),
        "layer_norm_eps": 1e-5,
        "row_scales": [torch.empty(0), scales],
        "codebooks": [torch.empty(0, dtype=torch.float16), codebooks],
    }


def decoded(arguments: dict[str, object], number: int, row: int) -> Tensor:
    """A row of a table, float64 [hidden]."""
    content = arguments["row_tables"][number][row, 0]
    if content.dtype is torch.uint8:
        book = arguments["codebooks"][number][0].double()
        return torch.cat([book[place, code] for place, code in enumerate(content.tolist())])
    if content.dtype is torch.int8:
        return content.double() * arguments["row_scales"][number][row].double()
    return content.double()


@pytest.mark.parametrize("row_type", ROW_TYPES)
@pytest.mark.parametrize("dtype", COMPUTE_TYPES)
def test_merge_takes_the_first_row_that_is_there(dtype: torch.dtype, row_type: torch.dtype) -> None:
    arguments = merge_arguments(dtype, row_type)
    rows = []
    for token, references in enumerate(arguments["references"].tolist()):
        found = next((each for each in references if each >= 0), None)
        if found is None:
            unigrams = arguments["unigram_tables"][token % 2]
            rows.append(unigrams[arguments["input_ids"][token], 0].double())
        else:
            mask = (1 << hmi_kernels.ROW_BITS) - 1
            rows.append(decoded(arguments, found >> hmi_kernels.ROW_BITS, found & mask))
    positions = arguments["position_embeddings"][arguments["positions"]].double()
    weight, bias = (arguments[name].double() for name in ("layer_norm_weight", "layer_norm_bias"))
    wanted = functional.layer_norm(torch.stack(rows) + positions, (HIDDEN,), weight, bias, 1e-5)
    merged = hmi_kernels.causal_merge(**arguments)
    assert merged.dtype is dtype
    # Sums in float32, and one rounding of the result.
    torch.testing.assert_close(merged.double(), wanted, atol=1e-4, rtol=0.51 * torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"positions": torch.tensor([NUM_POSITIONS])},
        {"positions": torch.tensor([-1])},
        {"input_ids": torch.tensor([5], dtype=torch.int32)},
        {"references": torch.tensor([[3, -1]])},
        {"references": torch.tensor([[2 << hmi_kernels.ROW_BITS, -1]])},
        {"references": torch.tensor([[-2, -1]])},
        {"token_unigram_tables": torch.tensor([2], dtype=torch.int32)},
    ],
)
def test_a_token_that_cannot_be_gets_zeros(change: dict[str, Tensor]) -> None:
    """Beside one that can."""
    arguments = merge_arguments(torch.float32, torch.float32)
    names = ("input_ids", "positions", "references", "token_unigram_tables")
    first = {name: arguments[name][:1] for name in names}
    alone = hmi_kernels.causal_merge(**arguments | first)
    both = {name: torch.cat([first[name], change.get(name, first[name])]) for name in names}
    merged = hmi_kernels.causal_merge(**arguments | both)
    assert torch.equal(merged[:1], alone)
    assert not merged[1].any()


def test_merge_of_nothing() -> None:
    arguments = merge_arguments(torch.float16, torch.float16)
    names = ("input_ids", "positions", "references", "token_unigram_tables")
    assert hmi_kernels.causal_merge(**arguments | {n: arguments[n][:0] for n in names}).shape == (0, HIDDEN)
