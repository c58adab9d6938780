"""One deliberate mistake of each class, compiled into the kernels: a test like the others must notice it.

Synchronizations are also skipped one by one where each kernel is tested (``assert_every_site_matters``).
"""

from __future__ import annotations

import pytest
from emulator.mutants import Mutation, assert_missed

ADAPTERS = """
from emulator.harness import emulated
from kernels.cuda.adapter_cases import assert_close, make_case
for lengths in ([70, 0, 3, 17], [1, 2, 1, 1]):
    case = make_case(lengths, ranks=[[16, 24, 8, 40]], slots=[2, 1, 0, 3], activations=["gelu"] * 4)
    for schedule in ({"order": "reverse"}, {"seed": 1}, {"seed": 2}):
        with emulated(**schedule):
            assert_close(case.run(), case)
"""
VECTORS = """
import torch
import hmi_kernels
from emulator.harness import emulated
rows, arena = torch.randn(20, 256).half(), torch.randn(512).half()
offsets, slots = torch.tensor([0, 7, 20]), torch.tensor([1, 0], dtype=torch.int32)
expected = rows.float()
expected[:7] *= arena[256:].float()
expected[7:] *= arena[:256].float()
with emulated():
    hmi_kernels.grouped_scale(rows, arena, offsets, slots, torch.tensor([0, 256]))
assert torch.equal(rows, expected.half()), "wrong"
"""
LOOKUP = """
import torch
import hmi_kernels
from emulator.harness import emulated
ids, offsets = torch.arange(300, dtype=torch.int32) % 7, torch.tensor([0, 130, 300])
pairs = [[a, b, -1] for a in range(7) for b in range(7)]
keys = hmi_kernels.ngram_keys(torch.tensor(pairs, dtype=torch.int32))
index, chains = hmi_kernels.plot_index_build(keys), torch.zeros(2, 1, dtype=torch.int32)
expected = hmi_kernels.reference.plot_lookup(ids, offsets, [index], chains, window=2)
with emulated():
    found = hmi_kernels.plot_lookup(ids, offsets, [index], chains, window=2)
assert torch.equal(found, expected), "wrong"
"""
MERGE = """
from emulator.harness import emulated
from kernels.plot_cases import assert_merged, make_case, make_tables, merge
import torch
for window in (2, 3):
    case = make_case(window)
    tables = make_tables(case, 64, (torch.float16, torch.float16), torch.float16)
    with emulated():
        assert_merged(case, tables, merge(case, tables, case.lookup()))
"""
COPIES = """
import torch
from emulator.device_streams import assert_right_under_all_schedules
from hmi_kernels import PinnedPool, copy_batch_async

def program(device):
    copy, compute = device.stream(), device.stream()
    with PinnedPool(1 << 20) as pool:
        pinned = pool.empty([64], torch.float32).fill_(7.0)
        slot, seen = device.empty([64]), []
        copy_batch_async([slot], [pinned], stream=copy, method="loop").wait(compute)
        device.submit(compute, lambda: seen.append(slot.clone()))
        device.synchronize(compute)
        assert (seen[0] == 7).all(), "the copy had not been made"
        device.synchronize(copy)
        del pinned

assert_right_under_all_schedules(program)
"""

BUGS = {
    "missing barrier": (
        ADAPTERS,
        Mutation(
            "csrc/cuda/grouped_adapter_pipeline.cuh",
            "    cp_async_wait<2>();\n  }\n  __syncthreads();",
            "    cp_async_wait<2>();\n  }",
        ),
    ),
    "copies not waited for": (
        ADAPTERS,
        Mutation(
            "csrc/cuda/grouped_adapter_pipeline.cuh",
            "num_stages == 3) {\n    cp_async_wait<1>();",
            "num_stages == 3) {\n    cp_async_wait<2>();",
        ),
    ),
    "off by one: rows of a segment's last tile": (
        VECTORS,
        Mutation(
            "csrc/cuda/segments.cuh",
            "end - row < tile_rows ? end - row :",
            "end - row < tile_rows ? end - row - 1 :",
        ),
    ),
    "off by one: last token of a group": (
        ADAPTERS,
        Mutation(
            "csrc/cuda/grouped_adapter_gemv.cu",
            "segment.end - first < kTokens ? segment.end - first :",
            "segment.end - first <= kTokens ? segment.end - first - 1 :",
        ),
    ),
    "wrong slot of an adapter": (
        ADAPTERS,
        Mutation(
            "csrc/cuda/adapter_slot.cuh",
            "projection * arguments.num_slots + segment.slot;",
            "projection * arguments.num_slots + segment.number;",
        ),
    ),
    "wrong slot of a vector": (
        VECTORS,
        Mutation(
            "csrc/cuda/grouped_vector.cu",
            "const int64_t slot = arguments.segment_slots[segment];",
            "const int64_t slot = segment;",
        ),
    ),
    "off by one: the right neighbor of a warp's last lane": (
        LOOKUP,
        Mutation(
            "csrc/cuda/plot_lookup.cu",
            "if (has_right && lane == kWarpSize - 1) right",
            "if (has_right && lane == kWarpSize) right",
        ),
    ),
    "the token after a placeholder for the one before it": (
        MERGE,
        Mutation(
            "csrc/cuda/plot_merge_rows.cuh",
            "(unigrams, id, kBesideLeftMask)",
            "(unigrams, id, kBesideRightMask)",
        ),
    ),
    "an unknown neighbor of a trigram left out": (
        MERGE,
        Mutation("csrc/cuda/plot_merge_rows.cuh", "unigram_row(unigrams, id, 0);", "SummandRow{};"),
    ),
    "wrong stream order: the event stands before the copies": (
        COPIES,
        Mutation(
            "csrc/bindings/cuda_copies.cpp",
            "  cuda::copy_batch(pieces, method, stream);\n  auto event = std::make_unique<cuda::Event>();\n"
            "  event->record(stream, device);",
            "  auto event = std::make_unique<cuda::Event>();\n  event->record(stream, device);\n"
            "  cuda::copy_batch(pieces, method, stream);",
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_is_noticed(name: str) -> None:
    code, mutation = BUGS[name]
    assert_missed(mutation, code)
