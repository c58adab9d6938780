"""Grouped adapters against torch.nn and PEFT's own LoRA layer, and the invariants that keep tenants apart."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import hmi_kernels
from hmi_kernels.native import native

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}
# Empty, one token, off-tile, skewed; without an adapter; twice the same slot; ranks that fill no vector.
LENGTHS = [0, 1, 3, 64, 7, 130, 2, 15]
SLOTS = [2, 1, -1, 0, 5, 3, 1, 4]
RANKS = [16, 64, 1, 7, 0, 33]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Batch:
    hidden_states: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_ranks: Tensor
    slot_scales: Tensor
    output_size: int
    slot_activations: Tensor | None = None

    def run(self, output: Tensor) -> Tensor:
        shared = (output, self.hidden_states, self.arena, self.segment_offsets, self.segment_slots)
        slots = (self.slot_offsets, self.slot_ranks)
        if self.slot_activations is None:
            hmi_kernels.grouped_lora(*shared, *slots, self.slot_scales)
        else:
            hmi_kernels.grouped_bottleneck(*shared, *slots, self.slot_activations, self.slot_scales)
        return output

    def expected(self, output: Tensor) -> Tensor:
        """In float64, one segment after the other."""
        result = output.double()
        for g, slot in enumerate(self.segment_slots.tolist()):
            if slot < 0 or self.slot_ranks[slot] == 0:
                continue
            tokens = slice(int(self.segment_offsets[g]), int(self.segment_offsets[g + 1]))
            result[tokens] += self.slot_scales[slot].double() * self.adapter(
                slot, self.hidden_states[tokens].double()
            )
        return result.float()

    def adapter(self, slot: int, x: Tensor) -> Tensor:
        rank, in_size, out_size = int(self.slot_ranks[slot]), x.shape[1], self.output_size
        block = self.arena[int(self.slot_offsets[slot]) :].double()
        if self.slot_activations is None:
            a, b, _ = block.split([in_size * rank, rank * out_size, len(block) - rank * (in_size + out_size)])
            return x @ a.view(in_size, rank) @ b.view(rank, out_size)
        sizes = [in_size * rank, rank, rank * out_size, out_size]
        down, down_bias, up, up_bias, _ = block.split([*sizes, len(block) - sum(sizes)])
        activation = list(ACTIVATIONS.values())[int(self.slot_activations[slot])]
        return activation(x @ down.view(in_size, rank) + down_bias) @ up.view(rank, out_size) + up_bias


def make_batch(kind: str, in_size: int, out_size: int, *, lengths: list[int] = LENGTHS) -> Batch:
    blocks = [rank * (in_size + out_size) + (rank + out_size) * (kind == "bottleneck") for rank in RANKS]
    order = torch.randperm(len(blocks)).tolist()  # blocks lie in the arena in another order than their slots
    offsets, end = [0] * len(blocks), 5
    for slot in order:
        offsets[slot] = end
        end += blocks[slot] + 3
    return Batch(
        hidden_states=torch.randn(sum(lengths), in_size),
        arena=torch.randn(end) / in_size**0.5,
        segment_offsets=torch.tensor([0, *lengths]).cumsum(0),
        segment_slots=int32(SLOTS[: len(lengths)]),
        slot_offsets=torch.tensor(offsets),
        slot_ranks=int32(RANKS),
        slot_scales=torch.tensor([1.0, -0.5, 2.0, 0.25, 1.0, 3.0]),
        output_size=out_size,
        slot_activations=int32([0, 1, 2, 3, 4, 1]) if kind == "bottleneck" else None,
    )


@pytest.mark.parametrize(
    ("kind", "in_size", "out_size"),
    [("bottleneck", 64, 64), ("bottleneck", 37, 37), ("lora", 64, 128), ("lora", 31, 45), ("lora", 5, 3)],
)
def test_equals_float64(implementation: str, kind: str, in_size: int, out_size: int) -> None:
    batch = make_batch(kind, in_size, out_size)
    output = torch.randn(sum(LENGTHS), out_size)
    expected = batch.expected(output)
    torch.testing.assert_close(batch.run(output), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_over_their_whole_range(simd_level: str, name: str) -> None:
    """Through an adapter whose products are the identity."""
    size = 19
    arena = torch.cat(
        [torch.eye(size).flatten(), torch.zeros(size), torch.eye(size).flatten(), torch.zeros(size)]
    )
    x = torch.cat([torch.linspace(-12, 12, 4000), torch.randn(1000) * 1e-3, torch.linspace(-100, 100, 985)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-30, -1e-30])])
    x = functional.pad(x, (0, -len(x) % size)).view(-1, size)
    number = list(ACTIVATIONS).index(name)
    assert hmi_kernels.ACTIVATIONS[number] == name
    arguments = (
        arena,
        torch.tensor([0, len(x)]),
        int32([0]),
        torch.tensor([0]),
        int32([size]),
        int32([number]),
    )
    output = torch.zeros_like(x)
    hmi_kernels.grouped_bottleneck(output, x, *arguments, torch.ones(1))
    torch.testing.assert_close(output, ACTIVATIONS[name](x.double()).float(), rtol=2e-6, atol=2e-6)
    hmi_kernels.grouped_bottleneck(output, torch.full_like(x, float("nan")), *arguments, torch.ones(1))
    assert output.isnan().all()


def test_equals_peft(implementation: str) -> None:
    torch.manual_seed(3)
    base = torch.nn.Linear(24, 40, bias=False)
    config = peft.LoraConfig(r=8, lora_alpha=20, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(torch.nn.Sequential(base), config).eval()
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    arena = torch.cat([a.T.flatten(), b.T.flatten()]).detach()
    x = torch.randn(11, 24)
    output = functional.linear(x, layer.base_layer.weight).detach()
    hmi_kernels.grouped_lora(
        output,
        x,
        arena,
        torch.tensor([0, 11]),
        int32([0]),
        torch.tensor([0]),
        int32([8]),
        torch.tensor([20 / 8]),
    )
    with torch.no_grad():
        torch.testing.assert_close(output, model(x), rtol=1e-5, atol=1e-5)


def test_columns_of_wider_tensors(implementation: str) -> None:
    batch = make_batch("lora", 20, 16)
    wide_input, wide_output = torch.randn(sum(LENGTHS), 33), torch.randn(sum(LENGTHS), 48)
    batch.hidden_states = wide_input[:, 7:27]
    before = wide_output.clone()
    expected = batch.expected(wide_output[:, 16:32])
    batch.run(wide_output[:, 16:32])
    torch.testing.assert_close(wide_output[:, 16:32], expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(wide_output[:, :16], before[:, :16])
    assert torch.equal(wide_output[:, 32:], before[:, 32:])


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_neighbors_and_threads_change_no_bit(simd_level: str, threads_mode: str, kind: str) -> None:
    batch = make_batch(kind, 48, 48, lengths=[length * 3 for length in LENGTHS])
    output = torch.randn(len(batch.hidden_states), 48)
    together = batch.run(output.clone())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(batch.run(output.clone()), together)
    torch.set_num_threads(before)
    offsets = batch.segment_offsets.tolist()
    for g, (begin, end) in enumerate(pairwise(offsets)):
        for t in range(begin, end, 5):
            alone = Batch(**vars(batch))
            alone.hidden_states = batch.hidden_states[t : t + 1]
            alone.segment_offsets, alone.segment_slots = torch.tensor([0, 1]), batch.segment_slots[g : g + 1]
            assert torch.equal(alone.run(output[t : t + 1].clone()), together[t : t + 1])


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_nan_stays_with_its_tenant(implementation: str, kind: str) -> None:
    batch = make_batch(kind, 32, 32)
    clean = batch.run(torch.zeros(sum(LENGTHS), 32))
    slot = 3
    batch.arena[int(batch.slot_offsets[slot]) : int(batch.slot_offsets[slot]) + 7 * 64] = float("nan")
    offsets = batch.segment_offsets.tolist()
    batch.hidden_states[offsets[3]] = float("nan")  # one token of another segment
    output = batch.run(torch.zeros(sum(LENGTHS), 32))
    ill = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    ill[offsets[5] : offsets[6]] = True
    ill[offsets[3]] = True
    assert output[ill].isnan().all()
    assert torch.equal(output[~ill], clean[~ill])


def test_reference_can_be_differentiated() -> None:
    batch = make_batch("bottleneck", 8, 8)
    batch.arena.requires_grad_()
    with hmi_kernels.use_backend("reference"):
        output = torch.zeros(sum(LENGTHS), 8)
        hmi_kernels.reference.grouped_bottleneck(
            output, batch.hidden_states, batch.arena, batch.segment_offsets, batch.segment_slots,
            batch.slot_offsets, batch.slot_ranks, batch.slot_activations, batch.slot_scales,
        )  # fmt: skip
    output.sum().backward()
    unused = 5 - 1  # slot 4 has rank 0, and no gradient reaches the gaps between blocks
    assert batch.arena.grad is not None and batch.arena.grad.count_nonzero() > 0
    assert batch.slot_ranks[unused] == 0 and batch.arena.grad[:5].count_nonzero() == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("segment_slots", int32([6] * 8), ValueError),
        ("segment_slots", int32([-2] * 8), ValueError),
        ("segment_slots", torch.tensor(SLOTS), TypeError),
        ("segment_offsets", torch.tensor([0, 9, 8, 9, 9, 9, 9, 9, 9]), ValueError),
        ("segment_offsets", torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 999]), ValueError),
        ("segment_offsets", torch.tensor([-1, 0, 0, 0, 0, 0, 0, 0, 9]), ValueError),
        ("segment_offsets", torch.tensor([0, 1]), ValueError),
        ("slot_offsets", torch.tensor([0, 1, 2, 3, 4, 10**9]), ValueError),
        ("slot_offsets", torch.tensor([-1, 1, 2, 3, 4, 5]), ValueError),
        ("slot_ranks", int32([16, 2**31 - 1, 1, 7, 0, 33]), ValueError),
        ("slot_ranks", int32([16, -1, 1, 7, 0, 33]), ValueError),
        ("slot_activations", int32([0, 5, 0, 0, 0, 0]), ValueError),
        ("slot_activations", int32([0, -1, 0, 0, 0, 0]), ValueError),
        ("slot_scales", torch.ones(5), ValueError),
        ("arena", torch.zeros(8, dtype=torch.float16), TypeError),
        ("hidden_states", torch.zeros(sum(LENGTHS), 33), ValueError),
        ("hidden_states", torch.zeros(3, 32), ValueError),
        ("hidden_states", torch.zeros(32, sum(LENGTHS)).T, ValueError),
    ],
)
def test_refuses_before_anything_is_changed(
    backend: str, field: str, value: Tensor, error: type[Exception]
) -> None:
    batch = make_batch("bottleneck", 32, 32)
    setattr(batch, field, value)
    output = torch.zeros(sum(LENGTHS), 32)
    with hmi_kernels.use_backend(backend), pytest.raises(error, match=field):
        batch.run(output)
    assert not output.any()


def test_refuses_to_read_what_it_writes() -> None:
    batch = make_batch("lora", 16, 16)
    with pytest.raises(ValueError, match="share memory"):
        batch.run(batch.hidden_states)
    wide = torch.zeros(sum(LENGTHS), 32)
    batch.hidden_states = wide[:, :16]
    with pytest.raises(ValueError, match="share memory"):
        batch.run(wide[:, 16:])


def test_no_segments_and_no_tokens(implementation: str) -> None:
    batch = make_batch("lora", 16, 16, lengths=[])
    assert batch.run(torch.zeros(0, 16)).shape == (0, 16)


def test_levels_agree_closely() -> None:
    batch = make_batch("bottleneck", 96, 96)
    results = []
    for level in native.available_simd_levels():
        native.set_simd_level(level)
        results.append(batch.run(torch.zeros(sum(LENGTHS), 96)))
    native.set_simd_level("auto")
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)
