"""What the grouped adapters can do besides: fused layer norm, several projections in a call, 16 bits."""

from __future__ import annotations

import pytest
import torch
from kernels.test_adapters import LENGTHS, make_batch
from torch import Tensor
from torch.nn import functional

import hmi_kernels


def bottleneck_with_norm(batch: object, output: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    fields = vars(batch)
    names = ("hidden_states", "arena", "segment_offsets", "segment_slots", "slot_offsets", "slot_ranks")
    arguments = [fields[name] for name in (*names, "slot_activations", "slot_scales")]
    hmi_kernels.grouped_bottleneck(
        output, *arguments, layer_norm_weight=weight, layer_norm_bias=bias, layer_norm_eps=1e-5
    )
    return output


def test_layer_norm_follows_for_every_segment(implementation: str) -> None:
    batch = make_batch("bottleneck", 32, 32)
    batch.segment_offsets[0] = 0
    rows_before, rows_after = 3, 2  # of no segment
    batch.hidden_states = torch.randn(sum(LENGTHS) + rows_before + rows_after, 32)
    batch.segment_offsets += rows_before
    output, weight, bias = torch.randn(len(batch.hidden_states), 32), torch.randn(32), torch.randn(32)
    added = batch.expected(output)
    inside = slice(rows_before, rows_before + sum(LENGTHS))
    expected = output.clone()
    normalized = functional.layer_norm(added[inside].double(), (32,), weight.double(), bias.double(), 1e-5)
    expected[inside] = normalized.float()
    result = bottleneck_with_norm(batch, output.clone(), weight, bias)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(result[:rows_before], output[:rows_before])
    assert torch.equal(result[-rows_after:], output[-rows_after:])


def test_layer_norm_needs_both_of_its_vectors() -> None:
    batch = make_batch("bottleneck", 32, 32)
    output = torch.zeros(sum(LENGTHS), 32)
    with pytest.raises(ValueError, match="together"):
        bottleneck_with_norm(batch, output, torch.ones(32), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer_norm_bias"):
        bottleneck_with_norm(batch, output, torch.ones(32), torch.ones(31))
    with pytest.raises(TypeError, match="layer_norm_weight"):
        bottleneck_with_norm(batch, output, torch.ones(32).half(), torch.ones(32))
    assert not output.any()


def test_projections_in_one_call(implementation: str) -> None:
    """Query, key and value with ranks, blocks and scales of their own, against float64."""
    sizes = [16, 8, 24]
    batches = [make_batch("lora", 32, size) for size in sizes]
    for p, batch in enumerate(batches):
        batch.hidden_states = batches[0].hidden_states
        batch.slot_ranks = batch.slot_ranks.roll(p)
        blocks = batch.slot_ranks.long() * (32 + sizes[p])
        batch.slot_offsets = blocks.cumsum(0) - blocks
        batch.arena = torch.randn(int(blocks.sum())) / 6
        batch.slot_scales = batch.slot_scales * (p + 1)
    starts = torch.tensor([0, *(len(batch.arena) for batch in batches[:-1])]).cumsum(0)
    output = torch.randn(sum(LENGTHS), sum(sizes))
    parts = zip(batches, output.split(sizes, dim=1), strict=True)
    expected = torch.cat([batch.expected(part) for batch, part in parts], dim=1)
    shared = (batches[0].segment_offsets, batches[0].segment_slots)
    tables = (
        torch.stack([batch.slot_offsets + start for batch, start in zip(batches, starts, strict=True)]),
        torch.stack([batch.slot_ranks for batch in batches]),
        torch.stack([batch.slot_scales for batch in batches]),
    )
    arena = torch.cat([batch.arena for batch in batches])
    hmi_kernels.grouped_lora(
        output, batches[0].hidden_states, arena, *shared, *tables, output_sizes=sizes, max_rank=64
    )
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_bad_projection_leaves_the_good_ones_alone(backend: str) -> None:
    batch = make_batch("lora", 32, 16)
    output = torch.zeros(sum(LENGTHS), 32)
    tables = [
        torch.stack([table, table]) for table in (batch.slot_offsets, batch.slot_ranks, batch.slot_scales)
    ]
    tables[0][1, 2] = 10**9
    shared = (batch.hidden_states, batch.arena, batch.segment_offsets, batch.segment_slots)
    with hmi_kernels.use_backend(backend), pytest.raises(ValueError, match="slot_offsets"):
        hmi_kernels.grouped_lora(output, *shared, *tables, output_sizes=[16, 16])
    assert not output.any()


@pytest.mark.parametrize("sizes", [[16, 17], [], [32, 0], [8] * 5, [-16, 48]])
def test_projections_must_fill_the_output(sizes: list[int]) -> None:
    batch = make_batch("lora", 32, 16)
    output = torch.zeros(sum(LENGTHS), 32)
    tables = [
        torch.stack([table] * max(1, len(sizes)))
        for table in (batch.slot_offsets, batch.slot_ranks, batch.slot_scales)
    ]
    shared = (batch.hidden_states, batch.arena, batch.segment_offsets, batch.segment_slots)
    with pytest.raises(ValueError, match=r"output_sizes|slot_offsets"):
        hmi_kernels.grouped_lora(output, *shared, *tables, output_sizes=sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_the_reference_takes_16_bits_and_rounds_once(kind: str, dtype: torch.dtype) -> None:
    batch = make_batch(kind, 32, 32)
    batch.arena, batch.hidden_states = batch.arena.to(dtype), batch.hidden_states.to(dtype)
    output = torch.randn(sum(LENGTHS), 32).to(dtype)
    expected = batch.expected(output)
    result = batch.run(output)
    assert result.dtype == dtype
    # Half a unit in the last place of the result, and what float32 sums may differ by.
    torch.testing.assert_close(result.float(), expected, rtol=torch.finfo(dtype).eps * 0.51, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"input_size": 260}, r"input_size.*multiple of 8"),
        ({"input_size": 128, "output_size": 128}, r"input_size.*256"),
        ({"output_size": 4104}, r"output_size.*4096"),
        ({"rank": 12}, r"rank.*multiple of 8.*pad"),
        ({"rank": 0}, "rank"),
        ({"rank": 264}, r"rank.*256"),
    ],
)
def test_odd_shapes_are_refused_at_registration(shape: dict[str, int], message: str) -> None:
    good = {"input_size": 768, "output_size": 768, "rank": 16}
    hmi_kernels.check_adapter_shape(**good, is_bottleneck=True)
    with pytest.raises(ValueError, match=message):
        hmi_kernels.check_adapter_shape(**(good | shape), is_bottleneck=True)
