"""PLOT on the CUDA kernels: refusals, values out of bounds on the device, barriers, rows in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulator.device_choice import require_emulator
from emulator.harness import Site, emulated, run_sanitized
from emulator.mutation import assert_every_site_matters
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.plot_cases import (
    VOCABULARY,
    Case,
    Tables,
    assert_merged,
    expected_references,
    make_case,
    make_tables,
    merge,
)
from torch import Tensor

import hmi_kernels
from hmi_kernels.cuda import driver
from hmi_kernels.cuda import plot as cuda_plot
from hmi_kernels.errors import CudaError
from hmi_kernels.plot import MergeArguments

INT64_EDGES = [-(2**63), -(2**40), -1, 2**40, 2**62, 2**63 - 1]


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    with emulated():
        yield


def check_lookup(case: Case) -> None:
    assert case.lookup().tolist() == expected_references(case)
    driver.raise_faults()


def check_merge(case: Case, tables: Tables) -> None:
    assert_merged(case, tables, merge(case, tables, torch.tensor(expected_references(case))))
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
    runs = (lambda: check_lookup(bigrams), lambda: check_lookup(trigrams))
    assert_every_site_matters(*runs, ignored=is_foreign)


def test_every_synchronization_of_merge_matters() -> None:
    case = make_case(2)
    runs: list[Callable[[], None]] = []
    for hidden_size in (256, 768):
        tables = make_tables(case, hidden_size, (torch.float16, torch.int8), torch.float16)
        runs.append(lambda tables=tables: check_merge(case, tables))  # type: ignore[misc]
    assert_every_site_matters(*runs, ignored=is_foreign)


def is_foreign(site: Site) -> bool:
    return "plot" not in site.file


@pytest.mark.slow
def test_garbage_on_the_device_touches_no_memory_that_is_not_ours() -> None:
    code = """
from emulator.harness import Site, emulated, run_sanitized
from kernels.cuda import test_plot_hazards
with emulated("sanitize"):
    test_plot_hazards.test_garbage_on_the_device_is_never_followed()
print("through")
"""
    result = run_sanitized(code, timeout=600)
    assert result.returncode == 0 and "through" in result.stdout, result.stderr[-4000:]


def merge_arguments(**changes: Any) -> MergeArguments:
    case = make_case(2)
    tables = make_tables(case, 256, (torch.int8, torch.float16), torch.float16)
    arguments = MergeArguments(
        case.input_ids,
        case.sequence_offsets,
        case.lookup(),
        tables.rows,
        tables.unigrams,
        torch.tensor(tables.unigram_table_of, dtype=torch.int32),
        tables.positions,
        tables.weight,
        tables.bias,
        layer_norm_eps=1e-5,
        window=2,
        row_scales=tables.scales,
    )
    return arguments._replace(**changes)


def test_merge_refuses_what_its_kernels_cannot_take() -> None:
    wide = {name: torch.zeros(4104).half() for name in ("layer_norm_weight", "layer_norm_bias")}
    tables: dict[str, Any] = {"row_tables": [], "row_scales": [], "unigram_tables": []}
    many = [torch.zeros(1, 2, 256).half()] * 49
    shifted = torch.zeros(257).half()[1:]
    for reason, arguments in (
        (
            "hidden_size must be a multiple of 8 up to 4096, not 4104",
            merge_arguments(position_embeddings=torch.zeros(1, 4104).half(), **wide, **tables),
        ),
        ("row_tables must be at most 48, not 49", merge_arguments(row_tables=many, row_scales=[])),
        (
            "unigram_tables must be at most 48, not 49",
            merge_arguments(unigram_tables=[torch.zeros(1, 3, 256).half()] * 49),
        ),
        (
            "layer_norm_bias must start at a multiple of 16 bytes",
            merge_arguments(layer_norm_bias=shifted),
        ),
    ):
        with pytest.raises(ValueError, match=f"backend cuda cannot run hmi::plot_merge: {reason}"):
            hmi_kernels.plot_merge(
                *arguments[:9],
                layer_norm_eps=1e-5,
                window=2,
                row_scales=arguments.row_scales,
            )


def test_lookup_refuses_what_its_kernel_cannot_take() -> None:
    case = make_case(2)
    index = torch.zeros(5, dtype=torch.int64)[1:].view(2, 2)
    for reason, indexes in (
        ("indexes must be at most 128, not 129", case.indexes * 64 + case.indexes[:1]),
        (r"indexes\[0\] must start at a multiple of 16 bytes", [index]),
    ):
        with pytest.raises(ValueError, match=f"backend cuda cannot run hmi::plot_lookup: {reason}"):
            hmi_kernels.plot_lookup(
                case.input_ids, case.sequence_offsets, indexes, case.chain_tensor, window=2
            )


class ModuleBesideAGpu:
    """Stands for ``_C.cuda``: page-locked memory lies 1000 bytes further on for the device."""

    def __init__(self, functions: Any) -> None:
        self._functions = functions
        self.tables: list[list[tuple[int, ...]]] = []

    def device_pointer(self, host: int) -> int:
        return host + 1000

    def plot_merge(self, *arguments: Any) -> None:
        self.tables += [arguments[5], arguments[6]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)


def test_page_locked_rows_are_read_where_the_device_sees_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_emulator("a device beside a double of a GPU")
    arguments = merge_arguments()
    module = ModuleBesideAGpu(driver.module())
    monkeypatch.setattr(driver, "module", lambda: module)
    monkeypatch.setattr(driver, "is_emulated", lambda: False)
    assert cuda_plot.MERGE.refuses(arguments) == (
        "row_tables[0] lies in pageable host memory: pin it (Tensor.pin_memory) or move it to the device"
    )
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: True)
    assert cuda_plot.MERGE.refuses(arguments) == ""
    cuda_plot.MERGE.run(arguments)
    (quantized, plain), unigrams = module.tables
    first, second = arguments.row_tables
    scales = arguments.row_scales[0].data_ptr() + 1000
    assert quantized == (first.data_ptr() + 1000, len(first), 3, scales, 0)
    assert plain == (second.data_ptr() + 1000, len(second), 1, 0, 0)
    assert [table[0] for table in unigrams] == [table.data_ptr() + 1000 for table in arguments.unigram_tables]


def test_page_locked_memory_has_an_address_on_the_device() -> None:
    require_emulator("a runtime that maps no pageable memory")
    host, device = driver.module().allocate_fault_word()
    assert driver.module().device_pointer(host) == device
    pageable = torch.zeros(16)
    with pytest.raises(CudaError, match="cudaHostGetDevicePointer failed: cudaErrorInvalidValue"):
        driver.module().device_pointer(pageable.data_ptr())


def test_rows_that_no_layout_serves_are_an_error_of_the_launch() -> None:
    """Behind the checks in Python stands the launcher's own."""
    require_emulator("launches on tensors of the CPU")
    too_wide = merge_arguments(position_embeddings=torch.zeros(1, 4104).half())
    with pytest.raises(CudaError, match="launch of plot_merge failed: cudaErrorInvalidValue"):
        cuda_plot.MERGE.run(too_wide)
