"""The adapters' backward pass: gradcheck in float64, and torch's own gradients of the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels.product_cases import int32
from torch import Tensor

import hmi_kernels
from hmi_kernels import reference

drawn = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass
class DeltaBatch:
    """A batch for grouped_bottleneck_delta (``slot_activations``) or grouped_lora_delta."""

    hidden_states: Tensor
    arena: Tensor
    segment_offsets: Tensor
    segment_slots: Tensor
    slot_offsets: Tensor
    slot_ranks: Tensor
    slot_scales: Tensor
    output_sizes: tuple[int, ...]
    slot_activations: Tensor | None = None

    def delta(self, hidden_states: Tensor, arena: Tensor, functions: object = hmi_kernels) -> Tensor:
        shared = (hidden_states, arena, self.segment_offsets, self.segment_slots)
        max_rank = int(self.slot_ranks.max())
        if self.slot_activations is None:
            function: Callable[..., Tensor] = functions.grouped_lora_delta  # type: ignore[attr-defined]
            tables = (self.slot_offsets, self.slot_ranks, self.slot_scales)
            return function(*shared, *tables, output_sizes=self.output_sizes, max_rank=max_rank)
        function = functions.grouped_bottleneck_delta  # type: ignore[attr-defined]
        slots = (self.slot_offsets[0], self.slot_ranks[0], self.slot_activations, self.slot_scales[0])
        return function(*shared, *slots, max_rank=max_rank)

    def gradients(self, functions: object = hmi_kernels) -> tuple[Tensor, ...]:
        """Delta, and the gradients of its product with fixed numbers."""
        hidden_states, arena = (t.clone().requires_grad_() for t in (self.hidden_states, self.arena))
        delta = self.delta(hidden_states, arena, functions)
        weights = torch.linspace(-1, 1, delta.numel(), dtype=torch.float64).view(delta.shape).to(delta.dtype)
        # Torch's own graph of the reference has nothing in it where no token has an adapter.
        total = (delta * weights).sum() + 0 * (hidden_states.sum() + arena.sum())
        return delta.detach(), *torch.autograd.grad(total, (hidden_states, arena))


def make_deltas(
    lengths: Sequence[int],
    slots: Sequence[int],
    ranks: Sequence[Sequence[int]],
    *,
    size: int,
    output_sizes: tuple[int, ...] = (),
    activations: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    before: int = 0,
) -> DeltaBatch:
    """``ranks`` by projection and slot; ``activations`` by slot, for a bottleneck."""
    offsets, end = torch.zeros(len(ranks), len(ranks[0]), dtype=torch.int64), 8
    outputs = output_sizes or (size,)
    is_bottleneck = activations is not None
    for p, row in enumerate(ranks):
        for slot, rank in enumerate(row):
            offsets[p, slot] = end
            block = rank * (size + outputs[p]) + (rank + outputs[p]) * is_bottleneck
            end += -(-block // 8) * 8 + 8
    return DeltaBatch(
        hidden_states=torch.randn(before + sum(lengths) + 2, size).to(dtype),
        arena=(torch.randn(end) / size**0.5).to(dtype),
        segment_offsets=torch.tensor([0, *lengths]).cumsum(0) + before,
        segment_slots=int32(list(slots)),
        slot_offsets=offsets,
        slot_ranks=torch.tensor(ranks, dtype=torch.int32),
        slot_scales=torch.linspace(-1, 2, offsets.numel()).view(offsets.shape),
        output_sizes=outputs,
        slot_activations=int32(list(activations)) if is_bottleneck else None,
    )


@st.composite
def delta_batches(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float32,
    multiple: int = 1,
    sizes: tuple[int, int] = (1, 70),
) -> DeltaBatch:
    """Ranks 1 to 64 and 0, empty segments, repeated slots, tokens without an adapter; both kinds."""
    num_slots = draw(st.integers(1, 4))
    is_bottleneck = draw(st.booleans())
    num_projections = 1 if is_bottleneck else draw(st.integers(1, 3))
    one_rank = st.integers(0, 64 // multiple).map(lambda rank: rank * multiple)
    row = st.lists(one_rank, min_size=num_slots, max_size=num_slots)
    ranks = draw(st.lists(row, min_size=num_projections, max_size=num_projections))
    slots = draw(st.lists(st.integers(-1, num_slots - 1), min_size=1, max_size=5))
    width = st.integers(-(-sizes[0] // multiple), sizes[1] // multiple).map(lambda size: size * multiple)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return make_deltas(
        draw(st.lists(st.integers(0, 40), min_size=len(slots), max_size=len(slots))),
        slots,
        ranks,
        size=draw(width),
        output_sizes=() if is_bottleneck else tuple(draw(width) for _ in range(num_projections)),
        activations=draw(st.lists(st.integers(0, 4), min_size=num_slots, max_size=num_slots))
        if is_bottleneck
        else None,
        dtype=dtype,
        before=draw(st.integers(0, 2)),
    )


SMALL = {
    "bottleneck": {"size": 5, "activations": [1, 4, 2, 3], "ranks": [[2, 3, 0, 1]]},
    "SiLU": {"size": 3, "activations": [2, 2, 2, 2], "ranks": [[2, 3, 0, 1]]},
    "relu": {"size": 3, "activations": [0, 0, 0, 0], "ranks": [[2, 3, 0, 1]]},
    "LoRA": {"size": 4, "output_sizes": (3,), "ranks": [[2, 3, 0, 1]]},
    "two projections": {"size": 4, "output_sizes": (3, 5), "ranks": [[2, 0, 0, 1], [1, 3, 0, 0]]},
}


@pytest.mark.parametrize("name", SMALL)
def test_gradcheck_in_float64(name: str) -> None:
    batch = make_deltas([2, 0, 3, 1, 2], [1, 0, 0, -1, 3], dtype=torch.float64, before=1, **SMALL[name])  # type: ignore[arg-type]
    inputs = batch.hidden_states.requires_grad_(), batch.arena.requires_grad_()
    with hmi_kernels.use_backend("reference"):
        torch.autograd.gradcheck(batch.delta, inputs)
        if name != "relu":  # which has no second derivative to speak of
            torch.autograd.gradgradcheck(batch.delta, inputs, fast_mode=True)


@drawn
@given(batch=delta_batches())
def test_equals_gradients_of_the_reference(implementation: str, batch: DeltaBatch) -> None:
    """Those that torch itself derives from the reference, which knows nothing of the formulas."""
    for found, expected in zip(batch.gradients(), batch.gradients(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bottleneck", "LoRA"])
def test_nan_stays_with_its_tenant(implementation: str, kind: str) -> None:
    """Even that of slot 0, whose numbers stand in for those of tokens without an adapter."""
    batch = make_deltas([4, 3, 6, 2], [0, -1, 1, 2], **SMALL[kind])  # type: ignore[arg-type]
    clean = batch.gradients()
    end = int(batch.slot_offsets[0, 1])
    batch.arena[:end] = torch.nan
    delta, hidden, arena = batch.gradients()
    assert hidden[:4].isnan().all()
    for found, expected in ((delta, clean[0]), (hidden, clean[1])):
        assert torch.equal(found[4:], expected[4:])
    assert torch.equal(arena[end:], clean[2][end:])


@pytest.mark.parametrize("kind", ["bottleneck", "LoRA"])
def test_without_rows_segments_or_ranks(implementation: str, kind: str) -> None:
    for batch in (
        make_deltas([0], [0], **SMALL[kind]),  # type: ignore[arg-type]
        make_deltas([], [], **SMALL[kind]),  # type: ignore[arg-type]
        make_deltas([3], [2], **SMALL[kind]),  # type: ignore[arg-type]
    ):
        delta, hidden, arena = batch.gradients()
        assert not delta.any() and not hidden.any() and not arena.any()


@pytest.mark.parametrize("kind", ["bottleneck", "LoRA"])
@pytest.mark.parametrize("offset", [-64, 10**6])
def test_tables_may_say_anything_of_slots_that_nobody_uses(
    implementation: str, kind: str, offset: int
) -> None:
    options = {"size": 16, "activations": [0, 1]} if kind == "bottleneck" else {"size": 16}
    batch = make_deltas([3, 2], [0, 0], [[8, 8]], **options)
    expected = batch.gradients()
    batch.slot_offsets[0, 1] = offset
    for result, gradient in zip(batch.gradients(), expected, strict=True):
        torch.testing.assert_close(result, gradient, rtol=0, atol=0)


def test_what_needs_no_gradient_gets_none() -> None:
    batch = make_deltas([4, 3], [0, 1], **SMALL["bottleneck"])  # type: ignore[arg-type]
    frozen = batch.delta(batch.hidden_states, batch.arena)
    assert not frozen.requires_grad
    arena = batch.arena.clone().requires_grad_()
    batch.delta(batch.hidden_states, arena).sum().backward()
    assert arena.grad is not None and arena.grad.any()


def test_bad_sizes() -> None:
    batch = make_deltas([4, 3], [0, 1], **SMALL["LoRA"])  # type: ignore[arg-type]
    batch.output_sizes = ()
    with pytest.raises(ValueError, match="output_sizes"):
        batch.delta(batch.hidden_states, batch.arena)
