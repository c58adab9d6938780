"""The adapter kernel on tensor cores, emulated, against float64 with bounds from the dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from emulator.harness import emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cuda.adapter_cases import ACTIVATIONS, DTYPES, AdapterCase, assert_close, make_case

from hmi_kernels.cuda import driver


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    with emulated():
        yield


def check(case: AdapterCase) -> None:
    assert case.plan().kernel in ("slices", "tiles")
    result = case.run()
    driver.raise_faults()
    assert_close(result, case)


# Empty segments; less than a tile, exactly one, more; no adapter, one that is nothing here; a slot twice.
LENGTHS = [0, 1, 16, 33, 70, 0, 5, 17, 3]
SLOTS = [2, 1, -1, 0, 2, 1, 3, 0, 1]
ALL_ACTIVATIONS = list(ACTIVATIONS)
OF_SM80, OF_SM86 = 163 * 1024, 99 * 1024
"""Shared memory that one block may have."""
STATIC_BYTES = 256
TOKENS_OF_TILE = {16: 150, 32: 2000, 64: 3500}
"""Calls with so many tokens have tiles of so many rows, unless a layer norm leaves no room for them."""


def bottleneck(ranks: Sequence[int], **options: Any) -> AdapterCase:
    """Slots have one activation after the other."""
    options.setdefault("activations", [ALL_ACTIVATIONS[slot % 5] for slot in range(len(ranks))])
    lengths, slots = options.pop("lengths", LENGTHS), options.pop("slots", SLOTS)
    return make_case(lengths, slots=slots, ranks=[ranks], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank_class", [128, 256])
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_every_tile(dtype: torch.dtype, rank_class: int, rows: int) -> None:
    """Every compiled shape, with ranks that fill it, half of a tensor tile, and none."""
    ranks = [rank_class, 8, rank_class - 8, 0]
    case = bottleneck(ranks, num_tokens=TOKENS_OF_TILE[rows], dtype=dtype)
    plan = case.plan()
    assert (plan.kernel, plan.tile_rows, plan.rank_class, plan.launches) == ("tiles", rows, rank_class, 1)
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank_class", [128, 256])
@pytest.mark.parametrize("rows", [16, 32])
def test_every_tile_with_layer_norm(dtype: torch.dtype, rank_class: int, rows: int) -> None:
    ranks = [rank_class, 8, rank_class - 8, 0]
    case = bottleneck(ranks, num_tokens=TOKENS_OF_TILE[rows], dtype=dtype, has_layer_norm=True)
    plan = case.plan()
    assert (plan.kernel, plan.tile_rows, plan.rank_class) == ("tiles", rows, rank_class)
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank_class", [16, 32, 64])
@pytest.mark.parametrize("has_layer_norm", [False, True])
def test_every_slice(dtype: torch.dtype, rank_class: int, has_layer_norm: bool) -> None:
    """Few ranks: each warp for itself."""
    ranks = [rank_class, 8, rank_class - 8, 0]
    case = bottleneck(ranks, num_tokens=150, dtype=dtype, has_layer_norm=has_layer_norm)
    plan = case.plan()
    assert (plan.kernel, plan.tile_rows, plan.rank_class, plan.launches) == ("slices", 16, rank_class, 1)
    check(case)


@pytest.mark.parametrize(
    ("hidden_size", "rank", "kernel", "num_stages"),
    [
        (1024, 64, "slices", 2),
        (1032, 16, "slices", 3),
        (4096, 16, "slices", 2),
        (3072, 32, "slices", 2),
        (4096, 32, "tiles", 3),
        (4096, 64, "tiles", 2),
    ],
)
def test_layer_norm_of_slices(hidden_size: int, rank: int, kernel: str, num_stages: int) -> None:
    """Beside wider rows rings are shorter; the widest leave no room for slices."""
    case = bottleneck(
        [rank, 0], hidden_size=hidden_size, lengths=[5, 18, 3], slots=[0, 0, 1], has_layer_norm=True
    )
    assert (case.plan().kernel, case.plan().num_stages) == (kernel, num_stages)
    check(case)


@pytest.mark.parametrize("has_layer_norm", [False, True])
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("hidden_size", [264, 384, 768, 1024, 1032])
def test_hidden_sizes(hidden_size: int, rows: int, has_layer_norm: bool) -> None:
    """Whole chunks, half a tensor tile in the last one; more than 1,024 columns of layer norm."""
    options: dict[str, Any] = {"num_tokens": TOKENS_OF_TILE[rows], "has_layer_norm": has_layer_norm}
    check(
        bottleneck(
            [24, 8, 64, 0],
            hidden_size=hidden_size,
            lengths=[3, 20, 1, 0, 10],
            slots=[0, 2, 1, 0, -1],
            **options,
        )
    )


@pytest.mark.parametrize(
    ("hidden_size", "rank"), [(2560, 256), (4096, 16), (3072, 128), (4096, 256), (4088, 248)]
)
def test_layer_norm_of_wide_rows(hidden_size: int, rank: int) -> None:
    """The widest that each row of the plan's table takes; of the last two the stages are narrow."""
    check(bottleneck([rank], hidden_size=hidden_size, lengths=[5], slots=[0], has_layer_norm=True))


@pytest.mark.parametrize(
    ("hidden_size", "tokens", "has_layer_norm", "num_stages"),
    [
        (768, 64, True, 3),
        (768, 256, True, 3),
        (768, 1024, True, 2),
        (384, 256, True, 2),
        (768, 1024, False, 3),
    ],
)
def test_rings_are_as_long_as_costs_no_round(
    hidden_size: int, tokens: int, has_layer_norm: bool, num_stages: int
) -> None:
    """For 32 segments on 132 multiprocessors; an H200 was fastest so."""
    plan = driver.module().plan_adapter(
        32 * tokens, 32, hidden_size, hidden_size, 1, 16, has_layer_norm, OF_SM80
    )
    assert (plan.kernel, plan.num_stages) == ("slices", num_stages)


QKV_RANKS = [[8, 16, 0, 8], [16, 8, 24, 0], [8, 8, 16, 48]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize(
    ("input_size", "output_sizes"), [(264, [256, 64, 104]), (768, [768, 8, 256]), (8, [8, 16, 24])]
)
def test_lora_of_three_projections(
    dtype: torch.dtype, rows: int, input_size: int, output_sizes: list[int]
) -> None:
    options: dict[str, Any] = {
        "output_sizes": output_sizes,
        "num_tokens": TOKENS_OF_TILE[rows],
        "dtype": dtype,
    }
    case = make_case(LENGTHS, slots=SLOTS, ranks=QKV_RANKS, hidden_size=input_size, **options)
    assert (case.plan().tile_rows, case.plan().launches) == (rows, 1)
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("input_size", "output_sizes"), [(264, [256, 64, 104]), (768, [768, 8, 256]), (8, [8, 16, 24])]
)
def test_lora_of_three_narrow_projections(
    dtype: torch.dtype, input_size: int, output_sizes: list[int]
) -> None:
    ranks = [[8, 16, 0, 8], [16, 8, 16, 0], [8, 8, 16, 16]]
    case = make_case(
        LENGTHS, slots=SLOTS, ranks=ranks, hidden_size=input_size, output_sizes=output_sizes, dtype=dtype
    )
    assert (case.plan().kernel, case.plan().rank_class) == ("slices", 64)
    check(case)


@pytest.mark.parametrize("num_projections", [1, 2, 3, 4])
@pytest.mark.parametrize("rank", [64, 72, 88, 136, 256])
def test_projections_that_fit_together_and_that_do_not(num_projections: int, rank: int) -> None:
    """Beyond 256 inner columns each projection has a launch of its own."""
    ranks = [[rank if p == slot else 8 * (p + slot) for slot in range(4)] for p in range(num_projections)]
    sizes = [256, 64, 104, 8][:num_projections]
    case = make_case(LENGTHS, slots=SLOTS, ranks=ranks, output_sizes=sizes)
    columns = num_projections * -(-rank // 16) * 16
    assert case.plan().launches == (1 if columns <= 256 else num_projections)
    check(case)


@pytest.mark.parametrize(
    ("input_size", "output_size", "rank"),
    [(8, 8, 8), (16384, 8, 8), (8, 16384, 8), (4096, 4096, 8), (2056, 2064, 136), (256, 3072, 88)],
)
def test_lora_of_every_size(input_size: int, output_size: int, rank: int) -> None:
    check(
        make_case([2, 5], ranks=[[rank, 8]], num_tokens=9, hidden_size=input_size, output_sizes=[output_size])
    )


@pytest.mark.parametrize("rank", range(8, 257, 8))
def test_every_rank(rank: int) -> None:
    check(bottleneck([rank, 256], lengths=[6], slots=[0]))
    check(bottleneck([rank], lengths=[6], slots=[0], has_layer_norm=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rank", [16, 64])
def test_activations(activation: str, rank: int) -> None:
    case = bottleneck([rank], lengths=[6], slots=[0], activations=[activation])
    case.hidden_states[0] *= 5  # also where they are flat
    check(case)


def test_unknown_largest_rank() -> None:
    """The plan then reckons with 256."""
    case = bottleneck([8, 24, 16, 0])
    case.max_rank = None
    check(case)


@pytest.mark.parametrize("has_layer_norm", [False, True])
def test_nothing_to_do(has_layer_norm: bool) -> None:
    """No segment with tokens, none at all, no adapter; a layer norm is of segments' tokens only."""
    for lengths, slots, ranks in (
        ([0, 0], [0, 0], [8]),
        ([], [], [8]),
        ([9, 8], [-1, 0], [0]),
        ([6], [0], [8]),
    ):
        check(bottleneck(ranks, lengths=lengths, slots=slots, num_tokens=20, has_layer_norm=has_layer_norm))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    is_bottleneck = data.draw(st.booleans())
    num_projections = 1 if is_bottleneck else data.draw(st.integers(1, 4))
    num_slots = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    ranks = [[8 * data.draw(st.integers(0, 12)) for _ in range(num_slots)] for _ in range(num_projections)]
    options: dict[str, Any] = {"dtype": data.draw(st.sampled_from(DTYPES))}
    if is_bottleneck:
        options["has_layer_norm"] = data.draw(st.booleans())
        options["activations"] = [data.draw(st.sampled_from(ALL_ACTIVATIONS)) for _ in range(num_slots)]
    else:
        options["output_sizes"] = [8 * data.draw(st.integers(1, 50)) for _ in range(num_projections)]
    case = make_case(
        lengths,
        slots=[data.draw(st.integers(-1, num_slots - 1)) for _ in lengths],
        ranks=ranks,
        hidden_size=8 * data.draw(st.integers(32 if is_bottleneck else 1, 70)),
        num_tokens=data.draw(st.sampled_from([5 * len(lengths), *TOKENS_OF_TILE.values()])),
        **options,
    )
    with emulated(seed=data.draw(st.integers(0, 9))):
        check(case)


@given(
    num_tokens=st.integers(1, 5000),
    num_segments=st.integers(1, 500),
    hidden_size=st.integers(32, 512).map(lambda n: 8 * n),
    num_projections=st.integers(1, 4),
    max_rank=st.integers(0, 32).map(lambda n: 8 * n),
    has_layer_norm=st.booleans(),
    max_shared_bytes=st.sampled_from([OF_SM80, OF_SM86]),
)
def test_plans_fit_every_device(
    num_tokens: int,
    num_segments: int,
    hidden_size: int,
    num_projections: int,
    max_rank: int,
    has_layer_norm: bool,
    max_shared_bytes: int,
) -> None:
    """There is a tile for every shape, with its inner columns, within the shared memory of sm_80 at least."""
    if has_layer_norm:
        num_projections = 1
    shape = (num_tokens, num_segments, hidden_size, hidden_size * num_projections, num_projections, max_rank)
    plan = driver.module().plan_adapter(*shape, has_layer_norm, max_shared_bytes)
    if plan.kernel == "gemv" or (plan.tile_rows == 0 and max_shared_bytes < OF_SM80):
        return
    assert plan.shared_bytes <= max_shared_bytes - STATIC_BYTES
    assert 2 <= plan.num_stages <= 4
    together = num_projections if plan.launches == 1 else 1
    assert -(-max_rank // 16) * 16 * together <= plan.rank_class
    assert plan.tile_rows in (16, 32, 64)
    assert plan.workspace_elements == 0


@pytest.mark.parametrize(
    ("hidden_size", "num_projections", "max_rank", "has_layer_norm"),
    [(768, 3, 16, False), (768, 1, 64, False), (768, 1, 48, True), (1024, 1, 64, True), (768, 1, 256, True)],
)
def test_usual_adapters_fit_devices_with_less_shared_memory(
    hidden_size: int, num_projections: int, max_rank: int, has_layer_norm: bool
) -> None:
    shape = (2048, 32, hidden_size, hidden_size * num_projections, num_projections, max_rank, has_layer_norm)
    plan = driver.module().plan_adapter(*shape, OF_SM86)
    assert plan.tile_rows > 0
    assert plan.shared_bytes <= OF_SM86 - STATIC_BYTES


def test_what_fits_less_shared_memory_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bottleneck([48, 64, 40, 0], hidden_size=1024, has_layer_norm=True)
    monkeypatch.setattr(driver, "max_shared_bytes", lambda device: OF_SM80)
    planned_for_sm80 = case.plan().shared_bytes
    monkeypatch.setattr(driver, "max_shared_bytes", lambda device: OF_SM86)
    assert case.plan().shared_bytes <= OF_SM86 < planned_for_sm80
    check(case)


def test_adapters_that_no_block_can_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ``auto`` goes on to Triton."""
    monkeypatch.setattr(driver, "max_shared_bytes", lambda device: 32 * 1024)
    with pytest.raises(ValueError, match="rank 256 on 1024 columns do not fit the 32,768 bytes"):
        bottleneck([48, 256, 40, 0], hidden_size=1024, has_layer_norm=True).run()
