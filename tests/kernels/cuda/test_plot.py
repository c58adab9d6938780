"""Look-up and merge of PLOT by the emulated CUDA kernels, against the formulas in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from emulator.harness import emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.plot_cases import (
    VOCABULARY,
    Case,
    assert_merged,
    expected_references,
    make_case,
    make_tables,
    merge,
)
from torch import Tensor

import hmi_kernels
from hmi_kernels.cuda import driver
from hmi_kernels.reference import mix_key

COMPUTE_TYPES = (torch.float16, torch.bfloat16, torch.float32)
ROW_TYPES = (*COMPUTE_TYPES, torch.int8, torch.uint8)
HIDDEN_SIZES = (256, 264, 384, 768, 1024, 4096)


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    with emulated():
        yield
        driver.raise_faults()


def empty_index() -> Tensor:
    return torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lookup(window: int, share: float) -> None:
    case = make_case(window, share=share)
    assert case.lookup().tolist() == expected_references(case)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(
    "lengths", [[], [0], [0, 0, 0], [1], [2], [31, 1, 33], [256], [257], [255, 2, 0, 300]]
)
def test_lookup_of_few_tokens_and_of_ends_within_blocks(window: int, lengths: list[int]) -> None:
    base = make_case(window)
    sequences = [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths]
    case = Case(sequences, base.ngrams, [[0, 1]] * len(lengths), window)
    case.chain_tensor = case.chain_tensor.view(-1, 2)
    assert case.lookup().tolist() == expected_references(case)


@pytest.mark.parametrize("window", [2, 3])
def test_lookup_in_many_sequences_of_which_most_are_empty(window: int) -> None:
    """More than 32 and than 1024, so that the search for a sequence takes every number of rounds."""
    base = make_case(window)
    for count in (33, 1100):
        lengths = (torch.rand(count) < 0.4).int() * torch.randint(1, 4, (count,))
        sequences = [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths.tolist()]
        case = Case(sequences, base.ngrams, [[s % 2, -1] for s in range(count)], window)
        assert case.lookup().tolist() == expected_references(case)


@pytest.mark.parametrize("window", [2, 3])
def test_lookup_walks_long_chains_and_full_tables(window: int) -> None:
    """Tables of 256 keys in 512 slots, with runs of collisions."""
    vocabulary = 60 if window == 2 else 14
    every = torch.cartesian_prod(*[torch.arange(vocabulary)] * window)
    rows = [tuple(row) for row in every[torch.randperm(len(every))].tolist()]
    tables = [rows[i : i + 256] for i in range(0, 2048, 256)]
    sequences = [torch.randint(0, vocabulary, (80,)).tolist() for _ in range(4)]
    chains = [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [4, 2, -1, 0, 1, 3, 5, 6], [-1] * 8]
    case = Case(sequences, tables, chains, window)
    assert case.lookup().tolist() == expected_references(case)


def test_lookup_wraps_around_the_end_of_an_index() -> None:
    """Keys whose home is the last slot lie in the first ones."""
    every = torch.cartesian_prod(torch.arange(60), torch.arange(60)).int()
    homes = torch.tensor([mix_key(int(key)) >> 60 for key in hmi_kernels.ngram_keys(every)])
    ngrams = [tuple(row) for row in every[homes == 15][:8].tolist()]
    case = Case([list(ngram) for ngram in ngrams], [ngrams], [[0]] * len(ngrams), 2)
    assert case.indexes[0].shape[0] == 16 and bool(case.indexes[0][0, 0])
    assert case.lookup().tolist() == expected_references(case)


def test_lookup_ends_in_an_index_without_an_empty_slot() -> None:
    case = make_case(2, share=1.0)
    case.indexes = [torch.stack([torch.arange(1, 65), torch.arange(64)], dim=1), empty_index()]
    assert bool((case.lookup() == -1).all())


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES, ids=str)
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_merge(window: int, compute_type: torch.dtype, hidden_size: int) -> None:
    case = make_case(window, share=0.4)
    tables = make_tables(case, hidden_size, (torch.float16, torch.int8), compute_type)
    assert_merged(case, tables, merge(case, tables, case.lookup()))


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES, ids=str)
@pytest.mark.parametrize("row_type", ROW_TYPES, ids=str)
def test_merge_of_rows_of_each_type(
    window: int, share: float, compute_type: torch.dtype, row_type: torch.dtype
) -> None:
    case = make_case(window, share=share)
    tables = make_tables(case, 264, (row_type, row_type), compute_type)
    assert_merged(case, tables, merge(case, tables, case.lookup()))


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(
    ("hidden_size", "compute_type"),
    [
        *((8, compute_type) for compute_type in COMPUTE_TYPES),
        (256, torch.float16),
        *(
            pytest.param(hidden_size, compute_type, marks=pytest.mark.slow)
            for hidden_size in (256, 1024)
            for compute_type in COMPUTE_TYPES
            if (hidden_size, compute_type) != (256, torch.float16)
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("piece_size", [4, 8])
def test_merge_of_codes(window: int, hidden_size: int, piece_size: int, compute_type: torch.dtype) -> None:
    case = make_case(window, share=0.4)
    for row_types in ((torch.uint8, torch.uint8), (torch.float16, torch.uint8), (torch.uint8, torch.int8)):
        tables = make_tables(case, hidden_size, row_types, compute_type, piece_size=piece_size)
        assert_merged(case, tables, merge(case, tables, case.lookup()))


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [2, 0, 1], [7], [9, 70]], ids=str)
def test_merge_of_few_tokens(window: int, lengths: list[int]) -> None:
    base = make_case(window)
    sequences = [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths]
    case = Case(sequences, base.ngrams, [[0, 1]] * len(lengths), window)
    case.chain_tensor = case.chain_tensor.view(-1, 2)
    for hidden_size in (384, 768):
        tables = make_tables(case, hidden_size, (torch.float16, torch.int8), torch.float16)
        assert_merged(case, tables, merge(case, tables, case.lookup()))


@pytest.mark.parametrize("window", [2, 3])
def test_merge_of_blocks_of_several_rounds(window: int) -> None:
    """Many tokens: a block takes more than one round, and the last block does not fill its last one."""
    base = make_case(window)
    lengths = torch.randint(0, 40, (120,)).tolist()
    sequences = [torch.randint(0, VOCABULARY, (length,)).tolist() for length in [*lengths, 61]]
    case = Case(sequences, base.ngrams, [[0, 1]] * len(sequences), window)
    assert case.input_ids.shape[0] > 2 * 512
    # Rows of 2048 columns: two tokens at once in a block, so that 512 pairs make two rounds.
    tables = make_tables(case, 1048, (torch.float16, torch.int8), torch.float16)
    assert_merged(case, tables, merge(case, tables, case.lookup()))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    draw = data.draw
    window = draw(st.sampled_from([2, 3]))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    base = make_case(window, share=draw(st.floats(0, 1)))
    lengths = draw(st.lists(st.integers(0, 50), max_size=8))
    sequences = [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths]
    chains = [draw(st.permutations([0, 1, -1])) for _ in lengths]
    case = Case(sequences, base.ngrams, chains, window)
    case.chain_tensor = case.chain_tensor.view(-1, 3)
    references = case.lookup()
    assert references.view(-1, 1 if window == 2 else 3).tolist() == expected_references(case)
    hidden_size = 8 * draw(st.integers(1, 80))
    row_types = tuple(draw(st.sampled_from(ROW_TYPES)) for _ in range(2))
    piece_size = draw(st.sampled_from([4, 8]))
    compute_type = draw(st.sampled_from(COMPUTE_TYPES))
    tables = make_tables(case, hidden_size, row_types, compute_type, piece_size=piece_size)
    assert_merged(case, tables, merge(case, tables, references))


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("hidden_size", [264, 768])
def test_neighbors_and_schedules_change_no_bit(window: int, hidden_size: int) -> None:
    case = make_case(window)
    tables = make_tables(case, hidden_size, (torch.int8, torch.float16), torch.float16)
    together = merge(case, tables, case.lookup())
    for schedule in ({"order": "reverse"}, {"order": "random", "seed": 7}, {"order": "in order"}):
        with emulated(**schedule):
            assert torch.equal(merge(case, tables, case.lookup()), together)
    for s, (begin, end) in enumerate(pairwise(case.sequence_offsets)):
        alone = Case([case.sequences[s]], case.ngrams, [case.chains[s]], window)
        own = replace(tables, unigram_table_of=[tables.unigram_table_of[s]])
        assert torch.equal(merge(alone, own, alone.lookup()), together[begin:end])


def test_pieces_of_other_sizes_are_refused() -> None:
    case = make_case(2)
    tables = make_tables(case, 48, (torch.float16, torch.uint8), torch.float16, piece_size=6)
    with pytest.raises(ValueError, match=r"backend cuda .*codebooks must hold pieces of 4 or 8 .* not \[6\]"):
        merge(case, tables, case.lookup())


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tenants_nan_stays_with_it(window: int, bad: float) -> None:
    """Its sequences use tables of their own, all bad; the others' results are the same to the bit."""
    case = make_case(window)
    case = Case(case.sequences, case.ngrams, [[s % 2, -1] for s in range(len(case.sequences))], window)
    for hidden_size in (256, 768):
        tables = make_tables(case, hidden_size, (torch.float16, torch.int8), torch.float16)
        clean = merge(case, tables, case.lookup())
        for t in (0, 1):
            rows, scales, unigrams = ([*part] for part in (tables.rows, tables.scales, tables.unigrams))
            rows[0] = torch.full_like(rows[0], bad) if t == 0 else rows[0]
            scales[1] = torch.full_like(scales[1], bad) if t == 1 else scales[1]
            unigrams[t] = torch.full_like(unigrams[t], bad)
            spoiled = merge(case, replace(tables, rows=rows, scales=scales, unigrams=unigrams), case.lookup())
            for s, (begin, end) in enumerate(pairwise(case.sequence_offsets)):
                if s % 2 == t:
                    assert not bool(spoiled[begin:end].isfinite().any())
                else:
                    assert torch.equal(spoiled[begin:end], clean[begin:end])
