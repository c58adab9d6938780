"""Triton adapters against float64, within bounds that follow from the dtypes, and tenants kept apart."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cuda.adapter_cases import ACTIVATIONS, AdapterCase, assert_close, make_case

import hmi_kernels
from hmi_kernels.triton import adapters

# Overflow and products of infinity, which numpy reports and a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Empty segments, one token, tiles that are full, one row over, and partly filled; slot -1.
LENGTHS = (3, 0, 16, 1, 33, 0, 2, 5)
SLOTS = (0, 1, 2, -1, 3, 0, 4, 1)
RANKS = (16, 7, 24, 0, 33)
"""Of whole 8s, of odd ones, none."""


def bottleneck(hidden_size: int, dtype: torch.dtype, **options: object) -> AdapterCase:
    return make_case(
        LENGTHS,
        hidden_size=hidden_size,
        ranks=[RANKS],
        slots=SLOTS,
        activations=list(ACTIVATIONS),
        dtype=dtype,
        **options,  # type: ignore[arg-type]
    )


def lora(input_size: int, output_sizes: tuple[int, ...], dtype: torch.dtype) -> AdapterCase:
    ranks = [(RANKS[p:] + RANKS[:p]) for p in range(len(output_sizes))]
    return make_case(
        LENGTHS, hidden_size=input_size, output_sizes=output_sizes, ranks=ranks, slots=SLOTS, dtype=dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_layer_norm", [False, True])
@pytest.mark.parametrize("hidden_size", [256, 264, 37])
def test_bottleneck(dtype: torch.dtype, has_layer_norm: bool, hidden_size: int) -> None:
    case = bottleneck(hidden_size, dtype, has_layer_norm=has_layer_norm, num_tokens=sum(LENGTHS) + 5)
    assert_close(case.run(), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("input_size", "output_sizes"), [(256, (384,)), (40, (24, 8, 16)), (19, (5, 70, 9, 1)), (1, (1,))]
)
def test_lora(dtype: torch.dtype, input_size: int, output_sizes: tuple[int, ...]) -> None:
    case = lora(input_size, output_sizes, dtype)
    assert_close(case.run(), case)


@pytest.mark.parametrize("rank", [8, 256])
def test_least_and_largest_rank(rank: int) -> None:
    case = make_case((2, 17), ranks=[(rank, 8)], activations=("gelu", "silu"), has_layer_norm=True)
    assert_close(case.run(), case)
    case.max_rank = 256
    assert_close(case.run(), case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows(dtype: torch.dtype) -> None:
    case = make_case(
        (1, 20, 0, 65), hidden_size=4096, ranks=[(64, 8, 256)], activations=["gelu"] * 3, dtype=dtype
    )
    assert_close(case.run(), case)


@pytest.mark.parametrize("number", range(len(ACTIVATIONS)))
def test_activations_over_their_whole_range(number: int) -> None:
    """Through an adapter whose products are the identity, in float32."""
    size = 16
    zeros, identity = torch.zeros(size), torch.eye(size).flatten()
    x = torch.cat([torch.linspace(-12, 12, 1000), torch.randn(500) * 1e-3, torch.linspace(-100, 100, 488)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 0.25, -0.25, 1e30, -1e30, 1e-30, -1e-30, 0.2499, 9.0, 1, 2])])
    x = x.view(-1, size)
    name = hmi_kernels.ACTIVATIONS[number]
    output = torch.zeros_like(x)
    slots = [torch.tensor([value], dtype=torch.int32) for value in (0, size, number)]
    hmi_kernels.grouped_bottleneck(
        output,
        x,
        torch.cat([identity, zeros, identity, zeros]),
        torch.tensor([0, len(x)]),
        slots[0],
        torch.tensor([0]),
        slots[1],
        slots[2],
        torch.ones(1),
    )
    # GELU of numbers below zero is a difference of nearly equal ones; the others stay relatively precise.
    precision = 1e-6 if "gelu" in name else 1e-12
    expected = ACTIVATIONS[name](x.double()).float()
    torch.testing.assert_close(output, expected, rtol=2e-6, atol=precision)


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_neighbors_and_repetition_change_no_bit(kind: str) -> None:
    case = (
        bottleneck(48, torch.float16, has_layer_norm=True)
        if kind == "bottleneck"
        else lora(48, (24, 16), torch.float16)
    )
    together = case.run()
    assert torch.equal(case.run(), together)
    for (rows, _), slot in zip(case.segments(), case.segment_slots, strict=True):
        for t in range(rows.start, rows.stop, 3):
            alone = dataclasses.replace(
                case,
                output=case.output[t : t + 1],
                hidden_states=case.hidden_states[t : t + 1],
                segment_offsets=torch.tensor([0, 1]),
                segment_slots=slot.view(1),
            )
            assert torch.equal(alone.run(), together[t : t + 1])


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_stays_with_its_tenant(kind: str, poison: float) -> None:
    dtype = torch.float16
    case = bottleneck(40, dtype, has_layer_norm=True) if kind == "bottleneck" else lora(40, (24, 16), dtype)
    clean = case.run()
    segments = case.segments()
    ill = torch.zeros(len(clean), dtype=torch.bool)
    ill[segments[2][0]] = True  # all of slot 2, which no other segment has
    for offset, rank in zip(case.slot_offsets[:, 2].tolist(), case.slot_ranks[:, 2].tolist(), strict=True):
        case.arena[offset : offset + 2 * rank] = poison
    token = segments[4][0].start  # and one token of another segment
    case.hidden_states[token] = poison
    ill[token] = True
    result = case.run()
    assert torch.equal(result[~ill], clean[~ill])
    if math.isnan(poison) and kind == "bottleneck":
        assert result[segments[2][0]].isnan().all()


def test_infinity_is_no_nan() -> None:
    """In a row whose rank leaves most of a tile's columns empty: their zeros must not multiply it."""
    case = make_case((2,), hidden_size=8, output_sizes=(8,), ranks=[(1,)])
    case.arena[:16] = 1.0
    case.slot_scales.fill_(1.0)
    case.hidden_states[0] = 1.0
    case.hidden_states[0, 3] = math.inf
    assert (case.run()[0] == math.inf).all()


BEFORE_END = -77
"""Stands for a few elements before the end of the arena."""
BAD = {
    "slot": ("segment_slots", 5, 2),
    "slot below": ("segment_slots", -2, 2),
    "rank": ("slot_ranks", 257, (0, 2)),
    "rank below": ("slot_ranks", -8, (0, 2)),
    "block": ("slot_offsets", 10**9, (0, 2)),
    "block wraps": ("slot_offsets", 2**63 - 1, (0, 2)),
    "block below": ("slot_offsets", -8, (0, 2)),
    "block ends outside": ("slot_offsets", BEFORE_END, (0, 2)),
    "activation": ("slot_activations", 5, 2),
    "activation below": ("slot_activations", -1, 2),
    "offset": ("segment_offsets", 10**12, 3),
    "offset below": ("segment_offsets", -(10**12), 3),
}
"""The name of a tensor, a value that cannot be, and its place: in the slot of segment 2, or at its end."""


@pytest.mark.parametrize("name", BAD)
def test_values_that_cannot_be_change_nothing(name: str) -> None:
    """Of their segment; and whoever else reads them (a segment's end is the start of the next)."""
    case = bottleneck(32, torch.float16, has_layer_norm=True)
    case.max_rank = 33
    clean = case.run()
    field, value, place = BAD[name]
    value = len(case.arena) - 8 if value == BEFORE_END else value
    getattr(case, field)[place] = value
    result = case.run()
    segments = make_case(LENGTHS, ranks=[RANKS], slots=SLOTS).segments()
    bad = [2, 3] if field == "segment_offsets" else [2]
    for g, (rows, _) in enumerate(segments):
        expected = case.output if g in bad else clean
        assert torch.equal(result[rows], expected[rows]), g


def test_a_rank_beyond_the_promised_one_changes_nothing() -> None:
    case = make_case((2, 3), ranks=[(32, 8)])
    case.max_rank = 16
    result = case.run()
    assert torch.equal(result[:2], case.output[:2])
    assert not torch.equal(result[2:], case.output[2:])


def test_no_tokens_no_segments_no_slots() -> None:
    for lengths in ((), (0,), (0, 0)):
        case = make_case(lengths, activations=("relu",) * 3, has_layer_norm=True)
        assert case.run().shape == (0, 256)
    nothing = make_case((2, 1), ranks=[(8,)], slots=(-1, -1), activations=("relu",), has_layer_norm=True)
    for name in ("slot_offsets", "slot_ranks", "slot_scales"):
        setattr(nothing, name, getattr(nothing, name)[:, :0])
    nothing.slot_activations = torch.empty(0, dtype=torch.int32)
    assert_close(nothing.run(), nothing)
    rankless = make_case((2, 1), ranks=[(0, 0)], activations=("relu",) * 2, has_layer_norm=True)
    assert_close(rankless.run(), rankless)


def test_refuses_what_it_cannot_hold() -> None:
    case = make_case((1,), ranks=[(264,)])
    with pytest.raises(ValueError, match="max_rank must be at most 256, not 264"):
        case.run()
    wide = make_case((1,), hidden_size=adapters.MAX_HIDDEN_SIZE + 8, ranks=[(8,)], activations=("relu",))
    wide.layer_norm = (wide.output[0], wide.output[0])
    with pytest.raises(ValueError, match="layer norm needs at most 16384 columns"):
        wide.run()


@settings(max_examples=25, deadline=None, database=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    slots = data.draw(st.lists(st.integers(-1, num_slots - 1), min_size=len(lengths), max_size=len(lengths)))
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    is_bottleneck = data.draw(st.booleans())
    if is_bottleneck:
        sizes = sizes[:1]
    ranks = [data.draw(st.lists(st.integers(0, 40), min_size=num_slots, max_size=num_slots)) for _ in sizes]
    names = st.sampled_from(list(ACTIVATIONS))
    case = make_case(
        lengths,
        hidden_size=sizes[0] if is_bottleneck else data.draw(st.integers(1, 80)),
        output_sizes=sizes,
        ranks=ranks,
        slots=slots,
        activations=data.draw(st.lists(names, min_size=num_slots, max_size=num_slots))
        if is_bottleneck
        else None,
        has_layer_norm=is_bottleneck and data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(DTYPES)),
        num_tokens=data.draw(st.integers(0, 80)),
        seed=data.draw(st.integers(0, 2**31)),
    )
    assert_close(case.run(), case)
