"""PLOT on the CUDA kernels: values out of bounds on the device, needless barriers, bytes, rows in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulator.harness import emulated
from emulator.mutation import assert_every_site_matters
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.plot_cases import (
    VOCABULARY,
    Case,
    Tables,
    expected_merge,
    expected_references,
    make_case,
    make_tables,
    merge,
)
from torch import Tensor

import hmi_kernels
from hmi_kernels.cuda import driver
from hmi_kernels.cuda import plot as cuda_plot
from hmi_kernels.plot import LookupArguments, MergeArguments

INT64_EDGES = [-(2**63), -(2**40), -1, 2**40, 2**62, 2**63 - 1]


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    with emulated():
        yield


def check_lookup(case: Case) -> None:
    assert case.lookup().tolist() == expected_references(case)
    driver.raise_faults()


def check_merge(case: Case, tables: Tables) -> None:
    actual = merge(case, tables, torch.tensor(expected_references(case)))
    torch.testing.assert_close(actual.double(), expected_merge(case, tables), rtol=1e-3, atol=1e-3)
    driver.raise_faults()


@pytest.mark.parametrize("window", [2, 3])
def test_lookup_reports_ids_out_of_bounds(window: int) -> None:
    case = make_case(window, share=1.0)
    expected = case.lookup()
    for bad in (-1, -(2**31), 2**21 - 1, 2**31 - 1):
        spoiled = make_case(window)
        spoiled.input_ids, spoiled.indexes = case.input_ids.clone(), case.indexes
        spoiled.sequence_offsets, spoiled.chain_tensor = case.sequence_offsets, case.chain_tensor
        spoiled.input_ids[20] = bad
        actual = spoiled.lookup()
        with pytest.raises(ValueError, match="input_ids are out of bounds at token 20"):
            driver.raise_faults()
        assert bool((actual[20] == -1).all())
        far = torch.tensor([t for t in range(len(actual)) if abs(t - 20) > 1])
        assert torch.equal(actual[far], expected[far])


def test_lookup_reports_chains_out_of_bounds() -> None:
    case = make_case(2, share=0.0)
    case.chain_tensor[5, 1] = 2
    case.lookup()
    with pytest.raises(ValueError, match="chains name an index that is not there at sequence 5"):
        case.lookup()
    case.chain_tensor[5, 1] = -2
    case.chains[5] = [0]
    assert torch.equal(case.lookup(), torch.tensor(expected_references(case)))
    with pytest.raises(ValueError, match="chains"):
        driver.raise_faults()


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(
    ("place", "value"),
    [(0, 1), (0, -5), (-1, 140), (-1, 142), (-1, 10**12), (3, 100), (3, -1), (5, 2**62), (5, -(2**63))],
)
def test_offsets_out_of_bounds_are_reported(window: int, place: int, value: int) -> None:
    case = make_case(window)
    references = case.lookup()
    tables = make_tables(case, 256, (torch.float16, torch.int8), torch.float16)
    case.sequence_offsets[place] = value
    for call in (case.lookup, lambda: merge(case, tables, references)):
        call()
        with pytest.raises(ValueError, match="sequence_offsets are out of bounds or decrease"):
            driver.raise_faults()


def test_tokens_of_no_sequence_are_reported() -> None:
    case = make_case(2)
    tables = make_tables(case, 256, (torch.float16, torch.int8), torch.float16)
    tables.unigram_table_of = []
    references = case.lookup()
    case.sequence_offsets = torch.zeros(1, dtype=torch.int64)
    case.chain_tensor = torch.empty(0, 2, dtype=torch.int32)
    for call, nothing in ((case.lookup, -1), (lambda: merge(case, tables, references), 0)):
        assert bool((call() == nothing).all())
        with pytest.raises(ValueError, match="sequence_offsets"):
            driver.raise_faults()


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("hidden_size", [264, 768])
def test_merge_gives_tokens_without_their_rows_zeros(window: int, hidden_size: int) -> None:
    case = make_case(window, share=0.4)
    tables = make_tables(case, hidden_size, (torch.float16, torch.int8), torch.float16)
    references = case.lookup()
    expected = merge(case, tables, references)
    lengths = [len(ngrams) for ngrams in case.ngrams]
    for bad in (-2, -(2**63), 2 << 40, 2**62, lengths[0], (1 << 40) + lengths[1], (1 << 40) - 1):
        spoiled = references.clone()
        spoiled[60, 0] = bad
        actual = merge(case, tables, spoiled)
        with pytest.raises(ValueError, match="references name a row that is not there at token"):
            driver.raise_faults()
        assert not bool(actual[60].any())
        far = torch.tensor([t for t in range(len(actual)) if abs(t - 60) > 1])
        assert torch.equal(actual[far], expected[far])


def test_merge_reports_ids_tables_and_positions_out_of_bounds() -> None:
    case = make_case(2, share=0.0)
    nothing = case.lookup()
    tables = make_tables(case, 256, (torch.float16, torch.float16), torch.float16)
    expected = merge(case, tables, nothing)

    def assert_zero(actual: Tensor, zero: slice, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            driver.raise_faults()
        is_other = torch.ones(len(actual), dtype=torch.bool)
        is_other[zero] = False
        assert not bool(actual[zero].any())
        assert torch.equal(actual[is_other], expected[is_other])

    short = replace(tables, positions=tables.positions[:89])
    assert_zero(merge(case, short, nothing), slice(100, 101), "sequence 5 has more tokens than there are")
    for bad in (-1, 2, -(2**31), 2**31 - 1):
        wrong = replace(tables, unigram_table_of=[*tables.unigram_table_of[:6], bad])
        message = "sequence_unigram_tables are out of bounds at sequence 6"
        assert_zero(merge(case, wrong, nothing), slice(101, 141), message)
    for bad in (-1, VOCABULARY, 2**31 - 1, -(2**31)):
        case.input_ids[50] = bad
        assert_zero(merge(case, tables, nothing), slice(50, 51), "input_ids are out of bounds at token 50")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_garbage_on_the_device_is_never_followed(data: st.DataObject) -> None:
    """Run in the variant ``sanitize`` too: there an access out of bounds ends the process."""
    draw = data.draw
    window = draw(st.sampled_from([2, 3]))
    case = make_case(window)
    tables = make_tables(case, 256, (torch.float16, torch.int8), torch.float16)
    references = case.lookup()
    of_table = torch.tensor(tables.unigram_table_of, dtype=torch.int32)
    int64 = st.one_of(st.sampled_from(INT64_EDGES), st.integers(-300, 300))
    int32 = st.one_of(st.sampled_from([-(2**31), 2**31 - 1]), st.integers(-10, 10))
    for tensor, values in (
        (case.sequence_offsets, int64),
        (references, int64),
        (case.input_ids, int32),
        (case.chain_tensor, int32),
        (of_table, int32),
        (case.indexes[0], int64),
    ):
        flat = tensor.view(-1)
        for _ in range(draw(st.integers(0, 3))):
            flat[draw(st.integers(0, len(flat) - 1))] = draw(values)
    tables.unigram_table_of = of_table.tolist()
    for call in (case.lookup, lambda: merge(case, tables, references)):
        call()
        try:
            driver.raise_faults()
        except ValueError as error:
            assert "in an earlier call" in str(error)


def test_every_synchronization_of_lookup_matters() -> None:
    bigrams, trigrams = make_case(2), make_case(3)
    assert_every_site_matters(lambda: check_lookup(bigrams), lambda: check_lookup(trigrams), ignored=is_foreign)


def test_every_synchronization_of_merge_matters() -> None:
    case = make_case(2)
    runs: list[Callable[[], None]] = []
    for hidden_size in (256, 768):
        tables = make_tables(case, hidden_size, (torch.float16, torch.int8), torch.float16)
        runs.append(lambda tables=tables: check_merge(case, tables))  # type: ignore[misc]
    assert_every_site_matters(*runs, ignored=is_foreign)


def is_foreign(site: Any) -> bool:
    return "plot" not in site.file
