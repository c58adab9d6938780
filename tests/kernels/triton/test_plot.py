"""Triton's look-up and merge against the formulas in float64, within bounds that follow from the dtypes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.plot_cases import (
    VOCABULARY,
    Case,
    Tables,
    expected_bigram_state,
    expected_merge,
    expected_references,
    expected_trigram_state,
    make_case,
    make_tables,
    merge,
)
from torch import Tensor

import hmi_kernels

COMPUTE_TYPES = (torch.float16, torch.bfloat16, torch.float32)
ROW_TYPES = (*COMPUTE_TYPES, torch.int8, torch.uint8)
UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""


def shortened(case: Case) -> Case:
    """Its last two sequences of at most twelve tokens: numpy's interpretation takes its time."""
    return Case([sequence[:12] for sequence in case.sequences], case.ngrams, case.chains, case.window)


def assert_merged(case: Case, tables: Tables, actual: Tensor) -> None:
    """Raises AssertionError unless the output is as near to float64 as its dtype and float32 sums allow.

    The sum of at most four rows (each times a scale), a unigram and a position, none larger than the
    largest element there is, errs by 8 roundings of six times that element, d. The normal form z of a sum
    that errs by d errs by (2 + |z|) d / s to first order, s being the deviation (mean and deviation change
    with it). Sums of n elements in any order add n roundings of their size to mean and variance, and the
    ten operations after that ten of z; then comes the rounding to the dtype.
    """
    expected = expected_merge(case, tables)
    assert actual.shape == expected.shape
    assert actual.dtype == tables.positions.dtype
    if not expected.numel():
        return
    state = expected_bigram_state if case.window == 2 else expected_trigram_state
    places = [(s, t) for s, sequence in enumerate(case.sequences) for t in range(len(sequence))]
    sums = torch.stack([state(case, tables, s, t) + tables.positions[t].double() for s, t in places])
    deviation = (sums.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()
    normal = (sums - sums.mean(dim=1, keepdim=True)) / deviation
    rows = [tables.row(t << 40 | r) for t, table in enumerate(tables.rows) for r in range(len(table))]
    largest = max(float(part.abs().max()) for part in (*rows, *tables.unigrams, tables.positions))
    num_roundings = 8 + sums.shape[1]
    spread = num_roundings * UNIT * 6 * largest * (2 + normal.abs()) / deviation + 10 * UNIT * normal.abs()
    error = 1.1 * spread * tables.weight.double().abs() + 2 * UNIT * tables.bias.double().abs()
    half_eps = torch.finfo(actual.dtype).eps / 2
    bound = error + half_eps * (expected.abs() + error) + 2.0**-25
    wrong = ~((actual.double() - expected).abs() <= bound)
    assert not wrong.any(), f"{int(wrong.sum())} wrong, the first at {wrong.nonzero()[0].tolist()}"


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lookup(window: int, share: float) -> None:
    case = make_case(window, share=share)
    assert case.lookup().tolist() == expected_references(case)


def test_lookup_agrees_with_cpu_on_many_keys() -> None:
    """Long probe chains, large ids, and blocks of tokens that many sequences share."""
    ids = torch.randint(0, 2**21 - 1, (40,), dtype=torch.int32)
    tokens = ids[torch.randint(0, 40, (300,))]
    bigrams = torch.stack([tokens[:-1], tokens[1:]], dim=1)
    keys = hmi_kernels.ngram_keys(bigrams).unique()
    indexes = [hmi_kernels.plot_index_build(keys[i::3].contiguous()) for i in range(3)]
    lengths = torch.randint(0, 6, (60,))
    lengths[-1] += 300 - lengths.sum()
    arguments = (
        tokens,
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        indexes,
        torch.randint(-1, 3, (60, 4), dtype=torch.int32),
    )
    for window in (2, 3):
        result = hmi_kernels.plot_lookup(*arguments, window=window)
        with hmi_kernels.use_backend("cpu"):
            assert torch.equal(result, hmi_kernels.plot_lookup(*arguments, window=window))
    assert (result[:, 1:] >= 0).any()


def test_lookup_ends_in_a_full_index() -> None:
    """Damaged: it has no empty slot to stop at."""
    case = Case([[1, 2, 3]], [[(4, 5), (5, 6)]], [[0]], 2)
    for index in case.indexes:
        index[:, 0] = 1
    assert (case.lookup() == -1).all()


@pytest.mark.parametrize("window", [2, 3])
def test_lookup_of_ids_that_cannot_be(window: int) -> None:
    """No n-gram with such an id is found, and every other is."""
    case = shortened(make_case(window, share=1.0))
    clean = case.lookup()
    sequence_begin = int(case.sequence_offsets[5])
    for bad in (-1, -2, 2**21 - 1, -(2**31), 2**31 - 1):
        damaged = case.input_ids.clone()
        damaged[sequence_begin + 5] = bad
        result = hmi_kernels.plot_lookup(
            damaged, case.sequence_offsets, case.indexes, case.chain_tensor, window=window
        )
        near = slice(sequence_begin + 4, sequence_begin + 7)
        far = torch.ones(len(clean), dtype=torch.bool)
        far[near] = False
        assert torch.equal(result[far], clean[far])
        assert (result[sequence_begin + 5] == -1).all()
        assert (result[near, 0] == -1).sum() == (2 if window == 2 else 3)


def test_lookup_of_chains_and_offsets_that_cannot_be() -> None:
    case = make_case(2, share=1.0)
    clean = case.lookup()
    chains = case.chain_tensor.clone()
    chains[5] = torch.tensor([2, -7])
    begin, end = case.sequence_offsets[5:7].tolist()
    arguments = (case.input_ids, case.sequence_offsets, case.indexes)
    result = hmi_kernels.plot_lookup(*arguments, chains, window=2)
    assert (result[begin:end] == -1).all()
    assert torch.equal(result[:begin], clean[:begin])
    for bad in (-(2**40), 2**40):
        offsets = case.sequence_offsets.clone()
        offsets[6] = bad  # the end of sequence 5 and the start of sequence 6
        result = hmi_kernels.plot_lookup(case.input_ids, offsets, case.indexes, case.chain_tensor, window=2)
        assert torch.equal(result[:begin], clean[:begin])
        assert (result[end:] == -1).all()


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_merge(window: int, share: float, compute_type: torch.dtype) -> None:
    case = shortened(make_case(window, share=share))
    for hidden_size, types in [(264, (torch.float16, torch.int8)), (37, (torch.bfloat16, torch.float32))]:
        tables = make_tables(case, hidden_size, types, compute_type)
        assert_merged(case, tables, merge(case, tables, case.lookup()))


def test_merge_of_the_least_and_of_wide_rows() -> None:
    case = Case([[1, 2, 3], [], [4]], make_case(3).ngrams, [[0, 1]] * 3, 3)
    for hidden_size in (1, 1024, 4096):
        tables = make_tables(case, hidden_size, (torch.float16, torch.float16), torch.float16)
        assert_merged(case, tables, merge(case, tables, case.lookup()))


@pytest.mark.parametrize("window", [2, 3])
def test_neighbors_change_no_bit(window: int) -> None:
    case = shortened(make_case(window))
    tables = make_tables(case, 40, (torch.float16, torch.int8), torch.bfloat16)
    together = merge(case, tables, case.lookup())
    assert torch.equal(merge(case, tables, case.lookup()), together)
    for s, (begin, end) in enumerate(pairwise(case.sequence_offsets)):
        alone = Case([case.sequences[s]], case.ngrams, [case.chains[s]], window)
        own = replace(tables, unigram_table_of=[tables.unigram_table_of[s]])
        assert torch.equal(merge(alone, own, alone.lookup()), together[begin:end])


def test_nan_stays_with_its_token() -> None:
    case = shortened(make_case(2, share=1.0))
    tables = make_tables(case, 40, (torch.float16, torch.float16), torch.float16)
    references = case.lookup()
    clean = merge(case, tables, references)
    reference = int(references[-2, 0])
    tables.rows[reference >> 40][reference & (2**40 - 1)] = torch.nan
    ill = (references == reference).squeeze(1)
    ill[1:] |= ill[:-1].clone()
    result = merge(case, tables, references)
    assert result[ill].isnan().all()
    assert torch.equal(result[~ill], clean[~ill])


def test_rows_that_are_not_needed_are_not_read() -> None:
    """Of unigrams, where every window has its row."""
    case = shortened(make_case(3, share=1.0))
    case = Case(case.sequences, case.ngrams, [[0, 1]] * len(case.sequences), 3)
    tables = make_tables(case, 40, (torch.float16, torch.float16), torch.float16)
    references = case.lookup()
    assert (references[:, 0] >= 0).all()
    clean = merge(case, tables, references)
    for table in tables.unigrams:
        table.fill_(torch.nan)
    assert torch.equal(merge(case, tables, references), clean)


@pytest.mark.parametrize("reference", [-2, 5 << 40, (1 << 40) - 1, -(2**63), 2**62])
@pytest.mark.parametrize("window", [2, 3])
def test_references_to_nowhere_give_zeros(window: int, reference: int) -> None:
    case = shortened(make_case(window))
    tables = make_tables(case, 24, (torch.float16, torch.float32), torch.float16)
    references = case.lookup()
    clean = merge(case, tables, references)
    t = int(case.sequence_offsets[5]) + 5
    references[t, 0] = reference
    result = merge(case, tables, references)
    touched = slice(t, t + 2) if window == 2 else slice(t - 1, t + 2)
    assert not result[touched].any()
    assert torch.equal(result[: touched.start], clean[: touched.start])
    assert torch.equal(result[touched.stop :], clean[touched.stop :])


def test_ids_tables_and_lengths_that_cannot_be_give_zeros() -> None:
    case = shortened(make_case(2, share=0.0))
    tables = make_tables(case, 24, (torch.float16, torch.float16), torch.float16)
    nothing = torch.full_like(case.lookup(), -1)
    clean = merge(case, tables, nothing)
    begin, end = case.sequence_offsets[5:7].tolist()

    def assert_zero(result: Tensor, where: slice) -> None:
        good = torch.ones(len(clean), dtype=torch.bool)
        good[where] = False
        assert not result[where].any()
        assert torch.equal(result[good], clean[good])

    case.input_ids[begin] = VOCABULARY
    case.input_ids[begin + 1] = -1
    assert_zero(merge(case, tables, nothing), slice(begin, begin + 2))
    case = shortened(make_case(2, share=0.0))
    case.input_ids = case.input_ids * 0
    clean = merge(case, tables, nothing)
    for bad in (2, -1):
        chosen = [bad if s == 5 else table for s, table in enumerate(tables.unigram_table_of)]
        assert_zero(merge(case, replace(tables, unigram_table_of=chosen), nothing), slice(begin, end))
    short = merge(case, replace(tables, positions=tables.positions[:11].clone()), nothing)
    for last in (end - 1, len(clean) - 1):  # the twelfth tokens of the two sequences of twelve
        assert not short[last].any()
        assert torch.equal(short[last - 11 : last], clean[last - 11 : last])
    case.sequence_offsets[6] = 2**40
    assert not merge(case, tables, nothing)[begin:].any()


@pytest.mark.parametrize("window", [2, 3])
def test_a_batch_without_tokens_or_tables(window: int) -> None:
    case = Case([[], []], [[(0, 1, 2)[:window]]] * 2, [[0], [0]], window)
    case.input_ids = torch.empty(0, dtype=torch.int32)
    tables = make_tables(case, 8, (torch.float16, torch.float16), torch.float16)
    assert case.lookup().shape == (0, 1 if window == 2 else 3)
    assert merge(case, tables, case.lookup()).shape == (0, 8)
    tableless = Case([[1, 2]], [], [[-1]], window)
    assert (tableless.lookup() == -1).all()
    tables = replace(tables, rows=[], scales=[], unigram_table_of=[0])
    assert_merged(tableless, tables, merge(tableless, tables, tableless.lookup()))


@settings(max_examples=20, deadline=None, database=None)
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    window = data.draw(st.sampled_from([2, 3]))
    tokens = st.integers(0, VOCABULARY - 1)
    sequences = data.draw(st.lists(st.lists(tokens, max_size=6), min_size=1, max_size=5))
    ngram = st.tuples(*[tokens] * window)
    if window == 3:
        edge = st.integers(-1, VOCABULARY - 1)
        ngram = st.tuples(edge, tokens, edge)
    ngrams = data.draw(
        st.lists(st.lists(ngram, min_size=1, max_size=30, unique=True), min_size=1, max_size=3)
    )
    depth = data.draw(st.integers(1, 3))
    chain = st.lists(st.integers(-1, len(ngrams) - 1), min_size=depth, max_size=depth)
    case = Case(sequences, ngrams, [data.draw(chain) for _ in sequences], window)
    assert case.lookup().tolist() == expected_references(case)
    types = tuple(data.draw(st.sampled_from(ROW_TYPES)) for _ in ngrams)
    piece_size = data.draw(st.sampled_from([4, 8]))
    hidden_size = data.draw(st.integers(2, 70))
    if torch.uint8 in types:
        hidden_size = piece_size * (1 + hidden_size // piece_size)
    tables = make_tables(
        case, hidden_size, types, data.draw(st.sampled_from(COMPUTE_TYPES)), piece_size=piece_size
    )
    assert_merged(case, tables, merge(case, tables, case.lookup()))
