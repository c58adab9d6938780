"""The adapter kernel on tensor cores: isolation, repeatability, values out of bounds, synchronization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulator.harness import emulated, run_sanitized
from emulator.mutation import assert_every_site_matters
from kernels.cuda.adapter_cases import ACTIVATIONS, DTYPES, AdapterCase, assert_close, make_case

from hmi_kernels.cuda import driver

LENGTHS = [0, 1, 16, 33, 70, 0, 5, 17, 3]
SLOTS = [2, 1, -1, 0, 2, 1, 3, 0, 1]
NAMES = list(ACTIVATIONS)[:4]
# Tokens of the call (they choose the tile's rows), ranks of four slots, and what else distinguishes the case.
HAZARDS: dict[str, tuple[int, Any, bool]] = {
    "16 rows, depth in four": (150, [8, 24, 16, 0], False),
    "16 rows, ranks in four": (150, [128, 8, 104, 0], False),
    "32 rows, depth in two": (2000, [8, 24, 16, 0], False),
    "32 rows, ranks in two": (2000, [64, 8, 48, 0], False),
    "64 rows": (3500, [64, 8, 40, 0], False),
    "64 rows, ranks in two": (3500, [72, 8, 128, 0], False),
    "layer norm, 16 rows": (150, [64, 8, 40, 0], True),
    "layer norm, 32 rows": (2000, [8, 24, 16, 0], True),
    "three projections": (150, [[8, 16, 0, 8], [16, 8, 24, 0], [8, 8, 16, 48]], False),
    "three projections, three launches": (150, [[8, 256, 8, 0], [16, 8, 24, 8], [8, 8, 16, 48]], False),
}
BOTTLENECKS = [name for name in HAZARDS if "projections" not in name]


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    with emulated():
        yield


def hazard(name: str, dtype: torch.dtype = torch.float16) -> AdapterCase:
    num_tokens, ranks, has_layer_norm = HAZARDS[name]
    if name not in BOTTLENECKS:
        sizes = [256, 64, 104]
        return make_case(LENGTHS, slots=SLOTS, ranks=ranks, output_sizes=sizes, dtype=dtype)
    return make_case(
        LENGTHS,
        slots=SLOTS,
        ranks=[ranks],
        activations=NAMES,
        has_layer_norm=has_layer_norm,
        num_tokens=num_tokens,
        dtype=dtype,
    )


def check(case: AdapterCase) -> None:
    assert case.plan().kernel in ("slices", "tiles")
    result = case.run()
    driver.raise_faults()
    assert_close(result, case)


def in_segments(case: AdapterCase) -> torch.Tensor:
    """bool [tokens]: what lies before and after all segments is not to be touched."""
    rows = torch.zeros(len(case.output), dtype=torch.bool)
    rows[int(case.segment_offsets[0]) : int(case.segment_offsets[-1])] = True
    return rows


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HAZARDS)
def test_nan_stays_with_its_tenant(name: str, dtype: torch.dtype, value: float) -> None:
    case = hazard(name, dtype)
    clean = case.run()
    ill = torch.zeros(len(clean), dtype=torch.bool)
    for rows, slot in case.segments():
        ill[rows] = slot == 0
    for p, size in enumerate(case.output_sizes):
        begin, rank = int(case.slot_offsets[p, 0]), int(case.slot_ranks[p, 0])
        case.arena[begin : begin + rank * (case.hidden_states.shape[1] + size)] = value
    lone = int(case.segment_offsets[4]) + 1  # one token in a tile of another tenant
    case.hidden_states[lone], ill[lone] = value, True
    outside = ~in_segments(case)
    case.hidden_states[outside] = torch.nan
    output = case.run()
    assert (~output[ill].isfinite()).any(1).all()
    assert torch.equal(output[~ill], clean[~ill])


@pytest.mark.parametrize("name", HAZARDS)
def test_infinite_outputs_stay_in_their_columns(name: str) -> None:
    """What is added to an infinity stays beside it, but for a layer norm, which is of whole rows."""
    case = hazard(name)
    clean = case.run()
    row, column = int(case.segment_offsets[4]) + 40, 13
    case.output[row, column] = torch.inf
    output = case.run()
    changed = output != clean
    assert changed[row, column]
    changed[row, slice(None) if case.layer_norm else column] = False
    assert not changed.any()


@pytest.mark.parametrize("name", HAZARDS)
def test_no_schedule_changes_a_bit(name: str) -> None:
    case = hazard(name)
    expected = case.run()
    for settings in ({"order": "in order"}, {"order": "reverse"}, {"seed": 1}, {"copy_time": "early"}):
        with emulated(**settings):
            assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("name", HAZARDS)
def test_no_neighbor_changes_a_bit(name: str) -> None:
    """A segment's results among others, shifted within its tile: a token has the same bits."""
    case = hazard(name)
    together = case.run()
    begin, end = case.segment_offsets[4:6].tolist()
    other = hazard(name)
    other.output[begin + 3 : end], other.hidden_states[begin + 3 : end] = 1, -2
    shift = 7
    for values, original in ((other.output, case.output), (other.hidden_states, case.hidden_states)):
        values[: begin + shift] = 3
        values[begin + shift : end] = original[begin : end - shift]
    other.segment_offsets[1:5] = torch.tensor([0, 0, 5, begin + shift]).clamp(
        min=int(other.segment_offsets[0])
    )
    other.segment_slots[:4] = torch.tensor([1, 0, -1, 0])
    assert torch.equal(other.run()[begin + shift : end], together[begin : end - shift])


@pytest.mark.parametrize("name", BOTTLENECKS)
@pytest.mark.parametrize(
    ("table", "position", "value"),
    [
        ("segment_offsets", 5, -1),
        ("segment_offsets", 5, 2**40),
        ("segment_offsets", 0, -1),
        ("segment_offsets", 9, 2**40),
        ("segment_slots", 4, 4),
        ("segment_slots", 4, -2),
        ("slot_ranks", 2, 12),
        ("slot_ranks", 2, -8),
        ("slot_ranks", 2, 264),
        ("slot_offsets", 2, -8),
        ("slot_offsets", 2, 9),
        ("slot_offsets", 2, 2**50),
        ("slot_offsets", 2, 2**63 - 8),
        ("slot_activations", 2, 5),
        ("slot_activations", 2, -1),
    ],
)
def test_values_out_of_bounds(name: str, table: str, position: int, value: int) -> None:
    """The segments that they concern stay as they are, the others are computed, and the next call tells."""
    case = hazard(name)
    clean = case.run()
    bad = torch.zeros(len(clean), dtype=torch.bool)
    for g, (rows, slot) in enumerate(case.segments()):
        bad[rows] = g in (position - 1, position) if table == "segment_offsets" else slot == 2
    getattr(case, table).view(-1)[position] = value
    output = case.run()
    with pytest.raises(
        ValueError,
        match=f"{table} are out of bounds.* at s[a-z]+ {position}|offsets.* segment {position - 1}",
    ):
        driver.raise_faults()
    assert torch.equal(output[bad], case.output[bad])
    assert torch.equal(output[~bad], clean[~bad])


@pytest.mark.parametrize("projection", [0, 1, 2])
def test_fault_of_one_projection(projection: int) -> None:
    """The others' columns are computed."""
    case = hazard("three projections")
    clean = case.run()
    slot = 1
    case.slot_ranks[projection, slot] = 12
    output = case.run()
    with pytest.raises(ValueError, match=r"slot_ranks are out of bounds.* at slot 1"):
        driver.raise_faults()
    begin = sum(case.output_sizes[:projection])
    columns = slice(begin, begin + case.output_sizes[projection])
    for rows, of_segment in case.segments():
        if of_segment == slot:
            clean[rows, columns] = case.output[rows, columns]
    assert torch.equal(output, clean)


def test_ends_of_arena_and_of_ranks() -> None:
    """A block may end with the arena but not behind it; a rank may not exceed what the plan is made for."""
    options: dict[str, Any] = {"ranks": [[16]], "activations": ["gelu"]}
    case = make_case([6], **options)
    case.arena = case.arena[: 16 * 513 + 256].clone()
    check(case)
    case.arena = case.arena[:-8].clone()
    assert torch.equal(case.run(), case.output)
    with pytest.raises(ValueError, match="slot_offsets"):
        driver.raise_faults()
    case = make_case([6], **options)
    case.max_rank = 8
    assert torch.equal(case.run(), case.output)
    with pytest.raises(ValueError, match="slot_ranks"):
        driver.raise_faults()


@pytest.mark.slow
def test_every_barrier_is_needed() -> None:
    """Rings of two, three and four stages; depth split over warps and not; layer norm with and without."""
    cases = [hazard(name) for name in HAZARDS]
    assert_every_site_matters(*((lambda case=case: check(case)) for case in cases))


@pytest.mark.slow
def test_no_address_is_out_of_bounds() -> None:
    """Under AddressSanitizer, with nothing behind any tensor; a process of its own."""
    done = run_sanitized("""
from emulator.harness import emulated
from kernels.cuda.test_adapter_tiles_hazards import HAZARDS, check, hazard
for name in HAZARDS:
    case = hazard(name)
    end = int(case.arena.isnan().logical_not().nonzero().max()) + 1
    case.arena = case.arena[:end].clone()
    with emulated("sanitize"):
        check(case)
""")
    assert done.returncode == 0, done.stderr
