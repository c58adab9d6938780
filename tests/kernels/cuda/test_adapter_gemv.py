"""The adapter kernels for segments of a few tokens, emulated, against float64 with bounds from the dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import pytest
import torch
from emulator.harness import emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import hmi_kernels
from hmi_kernels.cuda import driver

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}
DTYPES = [torch.float16, torch.bfloat16]
FLOAT32_UNIT = 2.0**-24
"""Half a unit in the last place: what one rounding to float32 adds, relative to its result."""
ACTIVATION_SLOPE = 1.13
"""Of the steepest one, gelu."""


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    with emulated():
        yield


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Batch:
    """One call. Blocks lie in the arena in random order, with gaps of NaN between them."""

    lengths: list[int]
    slots: list[int]
    ranks: list[list[int]]
    """By projection and slot."""
    input_size: int = 256
    output_sizes: list[int] = field(default_factory=lambda: [256])
    dtype: torch.dtype = torch.float16
    is_bottleneck: bool = True
    has_layer_norm: bool = False
    rows_after: int = 1
    """Tokens of no segment."""
    arena: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(sum(self.lengths) + self.input_size)
        num_tokens, num_slots = sum(self.lengths) + self.rows_after, len(self.ranks[0])
        self.hidden_states = torch.randn(num_tokens, self.input_size).to(self.dtype)
        self.output = torch.randn(num_tokens, sum(self.output_sizes)).to(self.dtype)
        self.segment_offsets = torch.tensor([0, *accumulate(self.lengths)])
        self.segment_slots = int32(self.slots)
        self.slot_ranks = torch.tensor(self.ranks, dtype=torch.int32)
        self.slot_scales = 0.5 + torch.rand(len(self.ranks), num_slots)
        self.slot_activations = torch.arange(num_slots, dtype=torch.int32) % len(ACTIVATIONS)
        self.norm = [1 + torch.randn(self.input_size).to(self.dtype) / 8 for _ in range(2)]
        self._fill_arena()

    def _fill_arena(self) -> None:
        blocks = [(p, slot) for p, ranks in enumerate(self.ranks) for slot in range(len(ranks))]
        self.slot_offsets = torch.zeros(len(self.ranks), len(self.ranks[0]), dtype=torch.int64)
        gap = torch.full((8,), torch.nan)
        parts, end = [gap], len(gap)
        for index in torch.randperm(len(blocks)).tolist():
            self.slot_offsets[blocks[index]] = end
            matrices = self.random_matrices(*blocks[index])
            parts += [*(matrix.flatten() for matrix in matrices), gap]
            end = sum(map(len, parts))
        self.arena = torch.cat(parts).to(self.dtype)

    def shapes(self, projection: int, slot: int) -> list[tuple[int, ...]]:
        rank, size = self.ranks[projection][slot], self.output_sizes[projection]
        if rank == 0:
            return []
        matrices: list[tuple[int, ...]] = [(self.input_size, rank), (rank, size)]
        return [matrices[0], (rank,), matrices[1], (size,)] if self.is_bottleneck else matrices

    def random_matrices(self, projection: int, slot: int) -> list[Tensor]:
        return [torch.randn(shape) / shape[0] ** 0.5 for shape in self.shapes(projection, slot)]

    def matrices(self, projection: int, slot: int) -> list[Tensor]:
        """In float64: down, down_bias, up, up_bias."""
        start, found = int(self.slot_offsets[projection, slot]), []
        for shape in self.shapes(projection, slot):
            size = torch.Size(shape).numel()
            found.append(self.arena[start : start + size].double().view(shape))
            start += size
        return found if self.is_bottleneck else [found[0], torch.zeros(1), found[1], torch.zeros(1)]

    def run(self, output: Tensor | None = None) -> Tensor:
        output = self.output.clone() if output is None else output
        common = (output, self.hidden_states, self.arena, self.segment_offsets, self.segment_slots)
        if self.is_bottleneck:
            norm = dict(zip(("layer_norm_weight", "layer_norm_bias"), self.norm, strict=True))
            tables = (self.slot_offsets[0], self.slot_ranks[0], self.slot_activations, self.slot_scales[0])
            hmi_kernels.grouped_bottleneck(*common, *tables, **(norm if self.has_layer_norm else {}))
        else:
            tables = (self.slot_offsets, self.slot_ranks, self.slot_scales)
            hmi_kernels.grouped_lora(*common, *tables, output_sizes=self.output_sizes)
        return output

    def plan(self) -> object:
        sizes = self.output_sizes
        shape = (len(self.output), len(self.slots), self.input_size, sum(sizes), len(sizes))
        return driver.module().plan_adapter(*shape, int(self.slot_ranks.max()), self.has_layer_norm)


def expected(batch: Batch) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far from it the kernel may be."""
    results, bounds = batch.output.double(), torch.zeros(batch.output.shape, dtype=torch.float64)
    columns = [0, *accumulate(batch.output_sizes)]
    for g, (begin, end) in enumerate(pairwise(batch.segment_offsets.tolist())):
        if begin == end:
            continue
        rows = slice(begin, end)
        for p, (first, last) in enumerate(pairwise(columns)):
            if batch.slots[g] >= 0 and batch.ranks[p][batch.slots[g]] > 0:
                results[rows, first:last], bounds[rows, first:last] = adapted(
                    batch, g, p, results[rows, first:last]
                )
        if batch.has_layer_norm:
            results[rows], bounds[rows] = normalized(batch, results[rows], bounds[rows])
    return results, bounds


def rounded(batch: Batch, values: Tensor, bounds: Tensor) -> Tensor:
    """The bounds after one more rounding to the 16-bit type."""
    format_ = torch.finfo(batch.dtype)
    return bounds + format_.eps / 2 * (values.abs() + bounds) + format_.smallest_normal * format_.eps


def adapted(batch: Batch, segment: int, projection: int, before: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 sum of n products errs by at most n + 1 roundings of the sum of their absolute values."""
    slot = batch.slots[segment]
    rows = slice(*batch.segment_offsets[segment : segment + 2].tolist())
    x = batch.hidden_states[rows].double()
    down, down_bias, up, up_bias = batch.matrices(projection, slot)
    sums = x @ down + down_bias
    sums_bound = (len(down) + 2) * FLOAT32_UNIT * (x.abs() @ down.abs() + down_bias.abs())
    if batch.is_bottleneck:
        activation = list(ACTIVATIONS.values())[int(batch.slot_activations[slot])]
        inner = activation(sums)
        # The float32 functions are good to a few units in the last place of a number of sums' size.
        inner_bound = ACTIVATION_SLOPE * sums_bound + 8 * FLOAT32_UNIT * sums.abs()
    else:
        inner, inner_bound = sums, sums_bound
    inner_bound = rounded(batch, inner, inner_bound)
    added = inner @ up + up_bias
    added_bound = inner_bound @ up.abs()
    added_bound += (len(up) + 2) * FLOAT32_UNIT * ((inner.abs() + inner_bound) @ up.abs() + up_bias.abs())
    scale = float(batch.slot_scales[projection, slot])
    result = before + scale * added
    bound = scale * added_bound + 3 * FLOAT32_UNIT * (before.abs() + scale * added.abs())
    return result, rounded(batch, result, bound)


def normalized(batch: Batch, rows: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """To first order in the rows' errors, and a tenth more for the rest."""
    weight, bias = (values.double() for values in batch.norm)
    size = rows.shape[1]
    deviation = (rows.var(1, unbiased=False, keepdim=True) + 1e-12).sqrt()
    normal = (rows - rows.mean(1, keepdim=True)) / deviation
    result = normal * weight + bias
    errors = bounds + size * FLOAT32_UNIT * rows.abs().mean(1, keepdim=True)
    spread = errors.square().mean(1, keepdim=True).sqrt()
    bound = (errors + errors.mean(1, keepdim=True) + normal.abs() * spread) / deviation * weight.abs()
    bound = 1.1 * bound + 4 * FLOAT32_UNIT * (result.abs() + bias.abs())
    return result, rounded(batch, result, bound)


def check(batch: Batch, *, output: Tensor | None = None) -> None:
    actual = batch.run(output)
    driver.raise_faults()
    values, bounds = expected(batch)
    wrong = (actual.double() - values).abs() > bounds
    assert not actual.isnan().any() and not wrong.any(), f"wrong at {wrong.nonzero()[:5].tolist()}"
    after = batch.segment_offsets[-1]
    assert torch.equal(actual[after:], batch.output[after:])


# Empty ones, single tokens, a group and a part of one, longer than any group; without an adapter; a slot twice.
RAGGED = {"lengths": [0, 1, 3, 1, 9, 0, 2, 1, 5], "slots": [2, 1, -1, 0, 2, 1, 3, 0, 1]}
RANKS = [8, 24, 16, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_layer_norm", [False, True])
@pytest.mark.parametrize(("size", "ranks"), [(256, RANKS), (264, [40, 8, 32, 0]), (768, [8, 16, 8, 0])])
def test_bottleneck_in_one_launch(
    dtype: torch.dtype, has_layer_norm: bool, size: int, ranks: list[int]
) -> None:
    batch = Batch(
        **RAGGED,
        ranks=[ranks],
        input_size=size,
        output_sizes=[size],
        dtype=dtype,
        has_layer_norm=has_layer_norm,
    )
    assert (batch.plan().kernel, batch.plan().splits) == ("gemv", 1)
    check(batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_layer_norm", [False, True])
@pytest.mark.parametrize(("size", "ranks"), [(256, [64, 256, 8, 0]), (1032, [24, 32, 8, 0])])
def test_bottleneck_in_splits(dtype: torch.dtype, has_layer_norm: bool, size: int, ranks: list[int]) -> None:
    batch = Batch(
        **RAGGED,
        ranks=[ranks],
        input_size=size,
        output_sizes=[size],
        dtype=dtype,
        has_layer_norm=has_layer_norm,
    )
    assert (batch.plan().kernel, batch.plan().launches) == ("gemv", 2)
    check(batch)


QKV = {"ranks": [[8, 16, 0, 8], [16, 8, 24, 0], [8, 8, 16, 48]], "is_bottleneck": False}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("input_size", "output_sizes"), [(264, [256, 64, 104]), (1024, [1024, 8, 512])])
def test_lora_of_three_projections(dtype: torch.dtype, input_size: int, output_sizes: list[int]) -> None:
    check(Batch(**RAGGED, **QKV, input_size=input_size, output_sizes=output_sizes, dtype=dtype))


@pytest.mark.parametrize(
    ("input_size", "output_size", "rank"),
    [(8, 8, 8), (16384, 8, 8), (8, 16384, 8), (4096, 4096, 8), (2056, 2064, 136), (256, 3072, 88)],
)
def test_lora_of_every_size(input_size: int, output_size: int, rank: int) -> None:
    batch = Batch(
        lengths=[1, 2],
        slots=[0, 1],
        ranks=[[rank, 8]],
        input_size=input_size,
        output_sizes=[output_size],
        is_bottleneck=False,
    )
    check(batch)


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("rank", [16, 96])
def test_groups_of_tokens(length: int, rank: int) -> None:
    """By average length the plan gives a group 1, 2 or 4 tokens; segments are shorter and longer than that."""
    batch = Batch(
        lengths=[length, length + 1, length - 1, length],
        slots=[0, 1, 1, 0],
        ranks=[[rank, 8]],
        rows_after=0,
    )
    assert batch.plan().group_tokens == length
    check(batch)


@pytest.mark.parametrize("rank", range(8, 257, 8))
def test_every_rank(rank: int) -> None:
    check(Batch(lengths=[1], slots=[0], ranks=[[rank]]))


@pytest.mark.parametrize("number", range(len(ACTIVATIONS)))
@pytest.mark.parametrize("rank", [16, 64])
def test_activations(number: int, rank: int) -> None:
    batch = Batch(lengths=[2], slots=[0], ranks=[[rank]])
    batch.hidden_states[0] *= 5  # also where they are flat
    batch.slot_activations[0] = number
    check(batch)


def test_nothing_to_do() -> None:
    check(Batch(lengths=[0, 0], slots=[0, 0], ranks=[[8]]))
    check(Batch(lengths=[], slots=[], ranks=[[8]]))
    check(Batch(lengths=[0], slots=[0], ranks=[[8]], rows_after=0))
    check(Batch(lengths=[2, 1], slots=[-1, 0], ranks=[[0]]))
    check(Batch(lengths=[2, 1], slots=[-1, 0], ranks=[[0]], has_layer_norm=True))


@pytest.mark.parametrize("rank", [16, 64])
def test_columns_of_wider_tensors(rank: int) -> None:
    batch = Batch(**RAGGED, ranks=[[rank, 8, 8, 0]])
    wide = torch.randn(len(batch.output), 256 + 48).to(batch.dtype)
    inputs = torch.full((len(batch.output), 256 + 32), torch.nan).to(batch.dtype)
    inputs[:, 8:264] = batch.hidden_states
    batch.hidden_states, batch.output = inputs[:, 8:264], wide[:, 16:272].clone()
    before = wide.clone()
    check(batch, output=wide[:, 16:272])
    assert torch.equal(wide[:, :16], before[:, :16]) and torch.equal(wide[:, 272:], before[:, 272:])


HAZARDS = {
    "one launch": Batch(**RAGGED, ranks=[RANKS]),
    "one launch, layer norm": Batch(**RAGGED, ranks=[RANKS], has_layer_norm=True),
    "splits": Batch(**RAGGED, ranks=[[64, 8, 32, 0]]),
    "splits, layer norm": Batch(**RAGGED, ranks=[[64, 8, 32, 0]], has_layer_norm=True),
    "projections": Batch(**RAGGED, **QKV, output_sizes=[256, 64, 104]),
}


def hazard(name: str) -> Batch:
    return dataclasses.replace(HAZARDS[name])


@pytest.mark.parametrize("name", HAZARDS)
def test_nan_stays_with_its_tenant(name: str) -> None:
    batch = hazard(name)
    clean = batch.run()
    offsets = batch.segment_offsets.tolist()
    ill = torch.zeros(len(clean), dtype=torch.bool)
    for g, slot in enumerate(batch.slots):
        ill[offsets[g] : offsets[g + 1]] = slot == 0
    for p in range(len(batch.ranks)):
        start = int(batch.slot_offsets[p, 0])
        size = sum(torch.Size(shape).numel() for shape in batch.shapes(p, 0))
        batch.arena[start : start + size] = torch.nan
    batch.hidden_states[offsets[4] + 1] = torch.nan  # one token within a group of another tenant
    ill[offsets[4] + 1] = True
    output = batch.run()
    assert output[ill].isnan().any(1).all()
    assert torch.equal(output[~ill], clean[~ill])


@pytest.mark.parametrize("name", HAZARDS)
def test_no_schedule_and_no_neighbor_changes_a_bit(name: str) -> None:
    batch = hazard(name)
    together = batch.run()
    for order, seed in (("in order", 0), ("reverse", 0), ("random", 1)):
        with emulated(order=order, seed=seed):
            assert torch.equal(batch.run(), together)
    # Segment 4 among others of the same shape: other lengths, tenants and values around it.
    begin, end = batch.segment_offsets[4:6].tolist()
    other = hazard(name)
    for values in (other.output, other.hidden_states):
        values[:begin] = torch.randn(begin, values.shape[1])
        values[end:] = torch.randn(len(values) - end, values.shape[1])
    lengths = [begin, 0, 0, 0, *batch.lengths[4:]]
    other.segment_offsets = torch.tensor([0, *accumulate(lengths)])
    other.segment_slots = int32([1, 1, 1, 1, batch.slots[4], -1, 0, 2, 0])
    other.output[begin:end], other.hidden_states[begin:end] = (
        batch.output[begin:end],
        batch.hidden_states[begin:end],
    )
    assert torch.equal(other.run()[begin:end], together[begin:end])


@pytest.mark.parametrize("name", ["one launch", "one launch, layer norm", "splits", "splits, layer norm"])
@pytest.mark.parametrize(
    ("table", "position", "value", "told"),
    [
        ("segment_offsets", 5, -1, "segment_offsets.* at segment"),
        ("segment_offsets", 5, 2**40, "segment_offsets.* at segment"),
        ("segment_slots", 4, 4, "segment_slots.* at segment 4"),
        ("segment_slots", 4, -2, "segment_slots.* at segment 4"),
        ("slot_ranks", 2, 12, "slot_ranks.* at slot 2"),
        ("slot_ranks", 2, -8, "slot_ranks.* at slot 2"),
        ("slot_ranks", 2, 264, "slot_ranks.* at slot 2"),
        ("slot_offsets", 2, -8, "slot_offsets.* at slot 2"),
        ("slot_offsets", 2, 9, "slot_offsets.* at slot 2"),
        ("slot_offsets", 2, 2**50, "slot_offsets.* at slot 2"),
        ("slot_activations", 2, 5, "slot_activations.* at slot 2"),
        ("slot_activations", 2, -1, "slot_activations.* at slot 2"),
    ],
)
def test_values_out_of_bounds(name: str, table: str, position: int, value: int, told: str) -> None:
    """The segments that they concern stay as they are, the others are computed, and the next call says so."""
    batch = hazard(name)
    clean, rows = batch.run(), batch.segment_offsets[4:6].tolist()
    values = getattr(batch, table).clone()
    values.view(-1)[position] = value
    setattr(batch, table, values)
    output = batch.run()
    with pytest.raises(ValueError, match=told):
        driver.raise_faults()
    bad = slice(*rows)
    assert torch.equal(output[bad], batch.output[bad])
    good = torch.ones(len(output), dtype=torch.bool)
    for g, slot in enumerate(batch.slots):
        if slot == 2 or (table == "segment_offsets" and g == 5):
            good[batch.segment_offsets[g] if g != 5 else rows[1] :][: batch.lengths[g]] = False
    assert torch.equal(output[good], clean[good])


def test_ends_of_arena_and_of_ranks() -> None:
    """A block that ends with the arena is read, one that would end behind it is not; nor a rank above max_rank."""
    batch = Batch(lengths=[1], slots=[0], ranks=[[16]])
    batch.arena = batch.arena[: int(batch.slot_offsets[0, 0]) + 16 * 513 + 256].clone()
    check(batch)
    batch.arena = batch.arena[:-8].clone()
    assert torch.equal(batch.run(), batch.output)
    with pytest.raises(ValueError, match="slot_offsets"):
        driver.raise_faults()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    is_bottleneck = data.draw(st.booleans())
    input_size = 8 * data.draw(st.integers(32 if is_bottleneck else 1, 100))
    num_projections = 1 if is_bottleneck else data.draw(st.integers(1, 4))
    output_sizes = [8 * data.draw(st.integers(1, 80)) for _ in range(num_projections)]
    num_slots = data.draw(st.integers(1, 3))
    ranks = [[8 * data.draw(st.integers(0, 12)) for _ in range(num_slots)] for _ in range(num_projections)]
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    batch = Batch(
        lengths=lengths,
        slots=[data.draw(st.integers(-1, num_slots - 1)) for _ in lengths],
        ranks=ranks,
        input_size=input_size,
        output_sizes=[input_size] if is_bottleneck else output_sizes,
        dtype=data.draw(st.sampled_from(DTYPES)),
        is_bottleneck=is_bottleneck,
        has_layer_norm=is_bottleneck and data.draw(st.booleans()),
    )
    with emulated(seed=data.draw(st.integers(0, 9))):
        check(batch)


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
    plan = driver.module().plan_adapter(*shape, False)
    if plan.kernel == "tiles":
        return
    assert plan.shared_bytes <= 81 * 1024  # two blocks on a multiprocessor of sm_80
    assert 1 <= plan.splits <= max(1, input_size // 64)
    rows = len(output_sizes) * num_tokens * max_rank
    assert plan.workspace_elements == (rows * plan.splits if plan.splits > 1 else 0)
