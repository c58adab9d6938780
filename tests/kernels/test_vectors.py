"""Grouped vectors against PEFT's IA3 layer, plain torch and float64; on the CPU and emulated CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import peft
import pytest
import torch
from emulator.harness import emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import hmi_kernels
from hmi_kernels.cuda import driver

Operation = Callable[..., None]
OPERATIONS: dict[str, Operation] = {
    "scale": hmi_kernels.grouped_scale,
    "bias": hmi_kernels.grouped_bias,
}
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float16, torch.bfloat16]}
BACKENDS = [(backend, dtype) for backend, dtypes in DTYPES.items() for dtype in dtypes]
LENGTHS = [0, 1, 3, 40, 2, 0, 17, 1]
SLOTS = [2, 1, -1, 0, 3, 1, 2, 0]


@contextlib.contextmanager
def on(backend: str) -> Iterator[None]:
    with emulated() if backend == "cuda" else hmi_kernels.use_backend(backend):
        yield


@pytest.fixture(params=BACKENDS, ids=lambda pair: f"{pair[0]}-{str(pair[1]).removeprefix('torch.')}")
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Runs the test on every backend that takes CPU tensors, with each dtype that it takes."""
    backend, dtype = request.param
    with on(backend):
        yield dtype


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Batch:
    rows: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor

    def run(self, operation: str, rows: Tensor | None = None) -> Tensor:
        rows = self.rows.clone() if rows is None else rows
        OPERATIONS[operation](rows, self.arena, self.segment_offsets, self.segment_slots, self.slot_offsets)
        return rows

    def expected(self, operation: str) -> Tensor:
        """In float64, rounded once: what every backend must give bit for bit."""
        result = self.rows.double()
        for g, slot in enumerate(self.segment_slots.tolist()):
            if slot < 0 or self.slot_offsets[slot] < 0:
                continue
            rows = slice(int(self.segment_offsets[g]), int(self.segment_offsets[g + 1]))
            vector = self.arena[int(self.slot_offsets[slot]) :][: result.shape[1]].double()
            result[rows] = result[rows] * vector if operation == "scale" else result[rows] + vector
        return result.to(self.rows.dtype)


def make_batch(
    dtype: torch.dtype, hidden_size: int = 264, lengths: list[int] = LENGTHS, slots: list[int] = SLOTS
) -> Batch:
    """Slot 3 has nothing; NaN lies between the vectors."""
    pitch = hidden_size + 8
    arena = torch.randn(3, pitch)
    arena[:, hidden_size:] = torch.nan
    return Batch(
        rows=torch.randn(sum(lengths) + 2, hidden_size).to(dtype),
        arena=arena.flatten()[:-8].to(dtype).clone(),
        segment_offsets=torch.tensor([0, *accumulate(lengths)]),
        segment_slots=int32(slots),
        slot_offsets=torch.tensor([pitch, 2 * pitch, 0, -1]),
    )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("hidden_size", [256, 264, 768, 1032, 4096])
def test_equals_float64(dtype: torch.dtype, operation: str, hidden_size: int) -> None:
    batch = make_batch(dtype, hidden_size)
    assert torch.equal(batch.run(operation), batch.expected(operation))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_size_on_the_cpu(operation: str) -> None:
    for hidden_size in (1, 3, 17, 100):
        batch = make_batch(torch.float32, hidden_size)
        assert torch.equal(batch.run(operation), batch.expected(operation))


def test_scale_equals_peft(dtype: torch.dtype) -> None:
    """Of an IA3 layer after the base layer, in float32, to a rounding of the 16-bit types."""
    base = torch.nn.Linear(32, 256, bias=False)
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)
    model = peft.get_peft_model(torch.nn.Sequential(base), config).eval()
    base_model: Any = model.base_model
    layer = base_model.model[0]
    with torch.no_grad():
        layer.ia3_l["default"].normal_()
        x = torch.randn(11, 32)
        wanted, rows = model(x), functional.linear(x, base.weight).to(dtype)
    arena = layer.ia3_l["default"].detach().flatten().to(dtype)
    hmi_kernels.grouped_scale(rows, arena, torch.tensor([0, 11]), int32([0]), torch.tensor([0]))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(rows.float(), wanted, rtol=2 * eps, atol=eps / 256)


def test_bias_equals_torch(dtype: torch.dtype) -> None:
    """BitFit: the tenant's own bias on top of the shared layer, which is a linear layer with their sum."""
    x, weight = torch.randn(9, 16), torch.randn(256, 16)
    shared, own = torch.randn(256), torch.randn(256)
    rows = functional.linear(x, weight, shared).to(dtype)
    hmi_kernels.grouped_bias(rows, own.to(dtype), torch.tensor([0, 9]), int32([0]), torch.tensor([0]))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        rows.float(), functional.linear(x, weight, shared + own), rtol=eps, atol=16 * eps
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_columns_of_wider_tensors(dtype: torch.dtype, operation: str) -> None:
    batch = make_batch(dtype, 256)
    wide = torch.randn(len(batch.rows), 304).to(dtype)
    batch.rows, before = wide[:, 16:272].clone(), wide.clone()
    assert torch.equal(batch.run(operation, wide[:, 16:272]), batch.expected(operation))
    assert torch.equal(wide[:, :16], before[:, :16]) and torch.equal(wide[:, 272:], before[:, 272:])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_to_do(dtype: torch.dtype, operation: str) -> None:
    for lengths in ([], [0], [0, 0, 0], [2]):
        batch = make_batch(dtype, lengths=lengths, slots=[0, 1, 3][: len(lengths)])
        assert torch.equal(batch.run(operation), batch.expected(operation))
    empty = make_batch(dtype, lengths=[0], slots=[0])
    empty.rows = empty.rows[:0]
    assert empty.run(operation).shape == (0, 264)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nan_stays_with_its_tenant(dtype: torch.dtype, operation: str) -> None:
    batch = make_batch(dtype)
    clean = batch.run(operation)
    batch.arena[272 : 272 + 264] = torch.nan  # slot 0
    begin, end = batch.segment_offsets[3:5].tolist()
    output = batch.run(operation)
    ill = torch.zeros(len(output), dtype=torch.bool)
    ill[begin:end], ill[batch.segment_offsets[7] :][:1] = True, True
    assert output[ill].isnan().all()
    assert torch.equal(output[~ill], clean[~ill])


@pytest.mark.parametrize(
    ("table", "position", "value"),
    [
        ("segment_offsets", 4, -1),
        ("segment_offsets", 4, 10**6),
        ("segment_slots", 3, 4),
        ("segment_slots", 3, -2),
        ("slot_offsets", 0, -2),
        ("slot_offsets", 0, 2 * 272 + 8),
        ("slot_offsets", 0, 2**60),
    ],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_out_of_bounds(
    dtype: torch.dtype, operation: str, table: str, position: int, value: int
) -> None:
    """The CPU changes nothing. CUDA leaves the segments concerned and says so at the next call."""
    batch = make_batch(dtype)
    clean = batch.run(operation)
    begin, end = batch.segment_offsets[3:5].tolist()
    values = getattr(batch, table).clone()
    values[position] = value
    setattr(batch, table, values)
    rows = batch.rows.clone()
    if dtype is torch.float32:
        with pytest.raises(ValueError, match=table):
            batch.run(operation, rows)
        assert torch.equal(rows, batch.rows)
        return
    batch.run(operation, rows)
    with pytest.raises(ValueError, match=table):
        driver.raise_faults()
    assert torch.equal(rows[begin:end], batch.rows[begin:end])
    # Before and after; the last segment has slot 0 too, and offsets that decrease may hide a neighbor.
    if table != "segment_offsets":
        assert torch.equal(rows[:begin], clean[:begin])
        assert torch.equal(rows[end : end + 19], clean[end : end + 19])


def test_misaligned_offset_on_cuda() -> None:
    batch = make_batch(torch.float16)
    batch.slot_offsets[0] = 4
    with emulated():
        batch.run("scale")
        with pytest.raises(ValueError, match="multiple of 8, at slot 0"):
            driver.raise_faults()


def test_no_schedule_changes_a_bit() -> None:
    batch = make_batch(torch.bfloat16)
    results = []
    for order, seed in (("in order", 0), ("reverse", 0), ("random", 1)):
        with emulated(order=order, seed=seed):
            results.append(batch.run("scale"))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    backend, dtype = data.draw(st.sampled_from(BACKENDS))
    lengths = data.draw(st.lists(st.integers(0, 30), max_size=40))
    slots = [data.draw(st.integers(-1, 3)) for _ in lengths]
    batch = make_batch(dtype, 8 * data.draw(st.integers(1, 80)), lengths, slots)
    operation = data.draw(st.sampled_from(list(OPERATIONS)))
    with on(backend):
        assert torch.equal(batch.run(operation), batch.expected(operation))
