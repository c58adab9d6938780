"""The adapter kernels for segments of a few tokens, emulated, against float64 with bounds from the dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from emulator.harness import emulated
from emulator.mutation import assert_every_site_matters
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cuda.adapter_cases import ACTIVATIONS, DTYPES, AdapterCase, assert_close, make_case

from hmi_kernels.cuda import driver


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    with emulated():
        yield


def gemv_case(lengths: Sequence[int], slots: Sequence[int], ranks: Any, **options: Any) -> AdapterCase:
    """A case whose plan knows the largest rank; a bottleneck if ``ranks`` has one entry a slot."""
    is_bottleneck = not ranks or isinstance(ranks[0], int)
    if is_bottleneck:
        names = list(ACTIVATIONS)
        options.setdefault("activations", [names[slot % len(names)] for slot in range(len(ranks))])
    return make_case(lengths, slots=slots, ranks=[ranks] if is_bottleneck else ranks, **options)


def plan_of(case: AdapterCase) -> Any:
    plan = case.plan()
    assert plan.kernel == "gemv"
    return plan


def check(case: AdapterCase) -> None:
    result = case.run()
    driver.raise_faults()
    assert_close(result, case)


# Empty segments, single tokens, a group and a part of one, longer ones; none, nothing; a slot twice.
LENGTHS = [0, 1, 3, 1, 9, 0, 2, 1, 5]
SLOTS = [2, 1, -1, 0, 2, 1, 3, 0, 1]
QKV_RANKS = [[8, 16, 0, 8], [16, 8, 24, 0], [8, 8, 16, 48]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_layer_norm", [False, True])
@pytest.mark.parametrize(
    ("size", "ranks", "launches"),
    [
        (256, [8, 24, 16, 0], 1),
        (264, [40, 8, 32, 0], 1),
        (768, [8, 16, 8, 0], 1),
        (256, [64, 256, 8, 0], 2),
        (1032, [24, 32, 8, 0], 2),
    ],
)
def test_bottleneck(
    dtype: torch.dtype, has_layer_norm: bool, size: int, ranks: list[int], launches: int
) -> None:
    options = {"hidden_size": size, "dtype": dtype, "has_layer_norm": has_layer_norm}
    case = gemv_case(LENGTHS, SLOTS, ranks, **options, num_tokens=25)
    assert plan_of(case).launches == launches
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("input_size", "output_sizes", "launches"),
    [(264, [256, 64, 104], 1), (1024, [1024, 8, 512], 2), (8, [8, 16, 24], 1)],
)
def test_lora_of_three_projections(
    dtype: torch.dtype, input_size: int, output_sizes: list[int], launches: int
) -> None:
    sizes = {"hidden_size": input_size, "output_sizes": output_sizes}
    case = gemv_case(LENGTHS, SLOTS, QKV_RANKS, **sizes, dtype=dtype, num_tokens=25)
    assert plan_of(case).launches == launches
    check(case)


@pytest.mark.parametrize(
    ("input_size", "output_size", "rank"),
    [(8, 8, 8), (16384, 8, 8), (8, 16384, 8), (4096, 4096, 8), (2056, 2064, 136), (256, 3072, 88)],
)
def test_lora_of_every_size(input_size: int, output_size: int, rank: int) -> None:
    check(gemv_case([1, 2], [0, 1], [[rank, 8]], hidden_size=input_size, output_sizes=[output_size]))


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("rank", [16, 96])
def test_groups_of_tokens(length: int, rank: int) -> None:
    """By average length the plan gives a group 1, 2 or 4 tokens; segments are shorter and longer."""
    case = gemv_case([length, length + 1, length - 1, length], [0, 1, 1, 0], [rank, 8])
    assert plan_of(case).group_tokens == length
    check(case)


@pytest.mark.parametrize("rank", range(8, 257, 8))
@pytest.mark.parametrize("num_segments", [1, 40])
def test_every_rank(rank: int, num_segments: int) -> None:
    """In splits and in one launch: of 40 segments one has an adapter."""
    check(gemv_case([1] * num_segments, [0] + [-1] * (num_segments - 1), [rank]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rank", [16, 64])
def test_activations(activation: str, rank: int) -> None:
    case = gemv_case([2], [0], [rank], activations=[activation])
    case.hidden_states[0] *= 5  # also where they are flat
    check(case)


def test_unknown_largest_rank() -> None:
    """The plan then reckons with 256."""
    case = gemv_case(LENGTHS, SLOTS, [8, 24, 16, 0])
    case.max_rank = None
    check(case)


def test_nothing_to_do() -> None:
    check(gemv_case([0, 0], [0, 0], [8], num_tokens=3))
    check(gemv_case([], [], [8], num_tokens=3))
    check(gemv_case([0], [0], [8]))
    check(gemv_case([2, 1], [-1, 0], [0]))
    check(gemv_case([2, 1], [-1, 0], [0], has_layer_norm=True))


def hazard(name: str) -> AdapterCase:
    ranks: Any = {"one": [8, 24, 16, 0], "splits": [64, 8, 32, 0], "projections": QKV_RANKS}[
        name.split(",", maxsplit=1)[0]
    ]
    if ranks is QKV_RANKS:
        return gemv_case(LENGTHS, SLOTS, ranks, output_sizes=[256, 64, 104])
    case = gemv_case(LENGTHS, SLOTS, ranks, has_layer_norm="layer norm" in name)
    assert plan_of(case).launches == (2 if "splits" in name else 1)
    return case


BOTTLENECKS = ["one", "one, layer norm", "splits", "splits, layer norm"]
HAZARDS = [*BOTTLENECKS, "projections"]


@pytest.mark.parametrize("name", HAZARDS)
def test_nan_stays_with_its_tenant(name: str) -> None:
    case = hazard(name)
    clean = case.run()
    ill = torch.zeros(len(clean), dtype=torch.bool)
    for rows, slot in case.segments():
        ill[rows] = slot == 0
    for p, size in enumerate(case.output_sizes):
        begin, rank = int(case.slot_offsets[p, 0]), int(case.slot_ranks[p, 0])
        case.arena[begin : begin + rank * (case.hidden_states.shape[1] + size)] = torch.nan
    lone = int(case.segment_offsets[4]) + 1  # one token in a group of another tenant
    case.hidden_states[lone], ill[lone] = torch.nan, True
    output = case.run()
    assert output[ill].isnan().any(1).all()
    assert torch.equal(output[~ill], clean[~ill])


@pytest.mark.parametrize("name", HAZARDS)
def test_no_schedule_and_no_neighbor_changes_a_bit(name: str) -> None:
    case = hazard(name)
    together = case.run()
    for order, seed in (("in order", 0), ("reverse", 0), ("random", 1)):
        with emulated(order=order, seed=seed):
            assert torch.equal(case.run(), together)
    # Segment 4 among others, in a call of the same shape: the tokens before it are one segment.
    rows = slice(*case.segment_offsets[4:6].tolist())
    other = hazard(name)
    for values in (other.output, other.hidden_states):
        values[: rows.start] = 3
        values[rows.stop :] = -2
    other.segment_offsets = torch.tensor([0, *accumulate([rows.start, 0, 0, 0, *LENGTHS[4:]])])
    other.segment_slots = torch.tensor([1, 1, 1, 1, SLOTS[4], -1, 0, 2, 0], dtype=torch.int32)
    assert torch.equal(other.run()[rows], together[rows])


@pytest.mark.parametrize("name", BOTTLENECKS)
@pytest.mark.parametrize(
    ("table", "position", "value"),
    [
        ("segment_offsets", 5, -1),
        ("segment_offsets", 5, 2**40),
        ("segment_slots", 4, 4),
        ("segment_slots", 4, -2),
        ("slot_ranks", 2, 12),
        ("slot_ranks", 2, -8),
        ("slot_ranks", 2, 264),
        ("slot_offsets", 2, -8),
        ("slot_offsets", 2, 9),
        ("slot_offsets", 2, 2**50),
        ("slot_activations", 2, 5),
        ("slot_activations", 2, -1),
    ],
)
def test_values_out_of_bounds(name: str, table: str, position: int, value: int) -> None:
    """The segments that they concern stay as they are, the others are computed, and the next call tells."""
    case = hazard(name)
    clean = case.run()
    good = torch.ones(len(clean), dtype=torch.bool)
    for g, (rows, slot) in enumerate(case.segments()):
        good[rows] = (g not in (4, 5)) if table == "segment_offsets" else slot != 2
    getattr(case, table).view(-1)[position] = value
    output = case.run()
    with pytest.raises(
        ValueError, match=f"{table} are out of bounds.* at s[a-z]+ {position}|offsets.* segment 4"
    ):
        driver.raise_faults()
    bad = ~good
    bad[int(case.segment_offsets[6]) :] &= table != "segment_offsets"  # there segment 5 became another one
    assert torch.equal(output[bad], case.output[bad])
    assert torch.equal(output[good], clean[good])


def test_ends_of_arena_and_of_ranks() -> None:
    """A block may end with the arena but not behind it; a rank may not exceed what the plan is made for."""
    case = gemv_case([1], [0], [16])
    case.arena = case.arena[: 16 * 513 + 256].clone()
    check(case)
    case.arena = case.arena[:-8].clone()
    assert torch.equal(case.run(), case.output)
    with pytest.raises(ValueError, match="slot_offsets"):
        driver.raise_faults()
    case = gemv_case([1], [0], [16])
    case.max_rank = 8
    assert torch.equal(case.run(), case.output)
    with pytest.raises(ValueError, match="slot_ranks"):
        driver.raise_faults()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    is_bottleneck = data.draw(st.booleans())
    num_projections = 1 if is_bottleneck else data.draw(st.integers(1, 4))
    num_slots = data.draw(st.integers(1, 3))
    ranks = [[8 * data.draw(st.integers(0, 12)) for _ in range(num_slots)] for _ in range(num_projections)]
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    options: dict[str, Any] = {"dtype": data.draw(st.sampled_from(DTYPES))}
    if is_bottleneck:
        options["has_layer_norm"] = data.draw(st.booleans())
    else:
        options["output_sizes"] = [8 * data.draw(st.integers(1, 80)) for _ in range(num_projections)]
    case = gemv_case(
        lengths,
        [data.draw(st.integers(-1, num_slots - 1)) for _ in lengths],
        ranks[0] if is_bottleneck else ranks,
        hidden_size=8 * data.draw(st.integers(32 if is_bottleneck else 1, 100)),
        **options,
    )
    with emulated(seed=data.draw(st.integers(0, 9))):
        check(case)


@given(
    num_tokens=st.integers(1, 5000),
    num_segments=st.integers(1, 5000),
    input_size=st.integers(1, 2048).map(lambda n: 8 * n),
    output_sizes=st.lists(st.integers(1, 2048).map(lambda n: 8 * n), min_size=1, max_size=4),
    max_rank=st.integers(0, 256),
)
def test_plans_fit_every_device(
    num_tokens: int, num_segments: int, input_size: int, output_sizes: list[int], max_rank: int
) -> None:
    shape = (num_tokens, num_segments, input_size, sum(output_sizes), len(output_sizes), max_rank)
    plan = driver.module().plan_adapter(*shape, False, 99 * 1024)
    if plan.kernel != "gemv":
        return
    assert plan.shared_bytes <= 81 * 1024  # two blocks on a multiprocessor of sm_80
    assert 1 <= plan.splits <= max(1, input_size // 64)
    assert 1 <= plan.column_chunks <= max(1, max(output_sizes) // 64)
    rows = len(output_sizes) * num_tokens * max_rank
    assert plan.workspace_elements == (rows * plan.splits if plan.launches == 2 else 0)


def test_every_barrier_is_needed() -> None:
    """Groups follow each other in shared memory; layer norm; splits, with columns in parts and not."""
    wide = gemv_case([3] + [0] * 39, [0] * 40, [[8]], hidden_size=256, output_sizes=[16384])
    assert plan_of(wide).launches == 2
    cases = [*map(hazard, BOTTLENECKS), wide]
    assert_every_site_matters(*((lambda case=case: check(case)) for case in cases))
