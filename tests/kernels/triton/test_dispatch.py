"""How the Triton kernels are reached: as ops of torch, under torch.compile, and not at all without triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from kernels.cuda.adapter_cases import make_case as make_adapter_case
from kernels.plot_cases import make_case as make_plot_case
from kernels.plot_cases import make_tables, merge
from kernels.test_vectors import make_batch
from torch import Tensor

import hmi_kernels
from hmi_kernels import library, plot
from hmi_kernels.cuda import driver
from hmi_kernels.host_indexes import SlotTable, check_on_host
from hmi_kernels.triton import plot_merge as triton_merge
from hmi_kernels.triton import plot_rows


def test_under_torch_compile() -> None:
    case = make_adapter_case((2, 3), hidden_size=40, output_sizes=(24, 16), ranks=[(8,), (16,)], slots=(0, 0))
    plot = make_plot_case(2)
    tables = make_tables(plot, 40, (torch.float16, torch.int8), torch.float16)
    batch = make_batch(torch.float16, 40)

    def step(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        case.hidden_states = hidden_states
        references = plot.lookup()
        rows = batch.run("bias") + 1
        return case.run() * 2, references, merge(plot, tables, references) * 2, rows

    inputs = case.hidden_states.contiguous()
    eager = step(inputs)
    compiled = torch.compile(step, backend="aot_eager")(inputs)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert torch.equal(ours, theirs)


def test_opcheck() -> None:
    plot = make_plot_case(3)
    arguments = (plot.input_ids, plot.sequence_offsets, plot.indexes, plot.chain_tensor)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.hmi.plot_lookup.default, arguments, {"window": 3}, test_utils=checks)
    batch = make_batch(torch.bfloat16, 40)
    vectors = (batch.rows, batch.arena, batch.segment_offsets, batch.segment_slots, batch.slot_offsets)
    torch.library.opcheck(torch.ops.hmi.grouped_scale.default, vectors, test_utils=checks)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("segment_offsets", [0, 3, 2]),
        ("segment_offsets", [0, 3, 7]),
        ("segment_slots", [0, 2]),
        ("slot_offsets", [0, 30]),
        ("slot_ranks", [-1, 7]),
        ("slot_activations", [5, 0]),
    ],
)
def test_values_in_host_memory_are_checked(name: str, values: list[int]) -> None:
    """For tensors of any device; odd ranks and offsets are as good as others."""
    tensors = {
        "segment_offsets": torch.tensor([0, 3, 6]),
        "segment_slots": torch.tensor([0, 1], dtype=torch.int32),
        "slot_offsets": torch.tensor([0, 7]),
        "slot_ranks": torch.tensor([3, 5], dtype=torch.int32),
        "slot_activations": torch.tensor([4, 0], dtype=torch.int32),
    }

    def check(max_rank: int | None = None) -> None:
        table = SlotTable(*list(tensors.values())[2:], arena_size=40, per_rank=5, fixed=2)
        segments = (tensors["segment_offsets"], tensors["segment_slots"])
        check_on_host(torch.device("meta"), *segments, 6, table, max_rank=max_rank)

    check()
    with pytest.raises(ValueError, match="slot_ranks"):
        check(max_rank=4)
    tensors[name] = torch.tensor(values, dtype=tensors[name].dtype)
    with pytest.raises(ValueError, match=name):
        check()


@pytest.mark.parametrize("place", ["row_tables", "unigram_tables", "row_scales", "codebooks"])
def test_pageable_tables_are_left_to_the_reference(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way a call on a GPU takes, no kernel there is given an address of the host's own memory."""
    case = make_plot_case(2)
    tables = make_tables(case, 256, (torch.int8, torch.uint8), torch.float16)
    references, unigram_tables = case.lookup(), torch.tensor(tables.unigram_table_of, dtype=torch.int32)
    packed = (case.input_ids, case.sequence_offsets, references)
    norm = (tables.positions, tables.weight, tables.bias)
    arguments = (*packed, tables.rows, tables.unigrams, unigram_tables, *norm)
    decoding = {"row_scales": tables.scales, "codebooks": tables.codebooks}
    options = {"layer_norm_eps": 1e-5, "window": 2, **decoding}
    pageable = {"row_tables": tables.rows, "unigram_tables": tables.unigrams, **decoding}[place]
    order = ["cuda", "triton", "reference"]
    monkeypatch.setattr(library, "candidates", lambda device_type, implemented: order)
    # As on a GPU: neither emulated nor interpreted, and the other tables page-locked.
    monkeypatch.setattr(driver, "is_emulated", lambda: False)
    monkeypatch.setattr(plot_rows, "is_triton_interpreted", lambda: False)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: all(tensor is not table for table in pageable))
    monkeypatch.setattr(triton_merge, "plot_merge", None)

    found = plot._plot_merge._run("cuda", arguments, options)
    assert torch.equal(found, hmi_kernels.reference.plot_merge(*arguments, **options))
    del order[2]
    with pytest.raises(
        ValueError, match=rf"cuda cannot .*{place}\[\d\] lies in pageable.*triton cannot .*{place}"
    ):
        plot._plot_merge._run("cuda", arguments, options)


def test_all_else_works_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hmi_kernels\n"
        "print(hmi_kernels.backends()['triton'].reason)\n"
        "hmi_kernels.plot_index_build(torch.tensor([1]))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "triton is not installed\n"
    assert hmi_kernels.backends()["triton"].available
