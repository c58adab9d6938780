"""Grouped adapters and vectors beside what torch and vLLM would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.gpu.adapter_problem import AdapterProblem, AdapterShape
from benchmarks.gpu.agreement import largest_error
from benchmarks.gpu.contest import Contender, Contest, Entry
from benchmarks.gpu.shapes import has_slow_peers
from benchmarks.gpu.timing import DeviceTimer, measure_seconds
from benchmarks.peers.batched_adapters import GroupedProducts, LoopedBottleneck, LoopedLora, PaddedProducts

__all__ = ["adapter_contest"]

OURS = {
    "lora": "one launch for all segments, or two where the depth is split",
    "bottleneck": "one launch, activation, biases, residual and layer norm included",
    "vectors": "one launch for all segments",
}
TRITON = "our own Triton kernels, autotuned"
MAX_LOOPED_SEGMENTS = 300
"""More launches than twice that are more than a graph of one call should hold."""


class _System(Protocol):
    def run(self, output: Tensor, hidden_states: Tensor) -> None: ...


def adapter_contest(shape: AdapterShape, device: torch.device, timer: DeviceTimer | None) -> Contest:
    """All ways to do grouped adapters of this shape."""
    problem = AdapterProblem(shape, device)

    def ours() -> Entry:
        return _entry(problem, problem.run_ours)

    name = "grouped_scale" if shape.kind == "vectors" else f"grouped_{shape.kind}"
    contenders = [Contender(f"hmi cuda {name}", OURS[shape.kind], ours, is_ours=True)]
    if has_slow_peers(shape):
        contenders.append(Contender(f"hmi triton {name}", TRITON, ours, backend="triton", is_ours=True))
    contenders += _vector_peers(problem) if shape.kind == "vectors" else _adapter_peers(problem, timer)
    return Contest(
        family=shape.kind,
        name=shape.name,
        settings={
            "hidden_size": shape.hidden_size,
            "ranks": list(shape.ranks) if shape.kind != "vectors" else None,
            "segments": len(shape.lengths),
            "tokens": sum(shape.lengths),
            "dtype": str(shape.dtype),
        },
        cost=shape.cost,
        bound=largest_error(shape.dtype),
        expected=lambda: problem.expected,
        contenders=contenders,
    )


def _entry(problem: AdapterProblem, run: Callable[[Tensor], object]) -> Entry:
    output = problem.output.clone()

    def result() -> Tensor:
        output.copy_(problem.output)
        run(output)
        return output

    return Entry(lambda: run(output), result)


def _adapter_peers(problem: AdapterProblem, timer: DeviceTimer | None) -> list[Contender]:
    is_lora = problem.shape.kind == "lora"
    looped: type[LoopedLora | LoopedBottleneck] = LoopedLora if is_lora else LoopedBottleneck

    def entering(make: Callable[[], _System]) -> Callable[[], Entry]:
        def enter() -> Entry:
            system = make()
            return _entry(problem, lambda output: system.run(output, problem.hidden_states))

        return enter

    is_short = len(problem.shape.lengths) <= MAX_LOOPED_SEGMENTS
    contenders = [
        Contender(
            looped.name,
            looped.description,
            entering(lambda: looped(problem.weights)),
            can_be_captured=is_short,
        ),
        Contender(
            PaddedProducts.name, PaddedProducts.description, entering(lambda: PaddedProducts(problem.weights))
        ),
        Contender(
            GroupedProducts.name,
            GroupedProducts.description,
            entering(lambda: GroupedProducts(problem.weights)),
        ),
    ]
    if is_lora and has_slow_peers(problem.shape):
        contenders.append(_vllm_style(problem, timer, entering))
    return contenders


def _vllm_style(
    problem: AdapterProblem,
    timer: DeviceTimer | None,
    entering: Callable[[Callable[[], _System]], Callable[[], Entry]],
) -> Contender:
    from benchmarks.peers.vllm_style_lora import VllmStyleLora  # imports triton, which may be missing

    def make() -> VllmStyleLora:
        blocks = list(zip(problem.weights.down, problem.weights.up, strict=True))
        return VllmStyleLora(blocks, problem.bounds, seconds=None if timer is None else measure_seconds)

    return Contender(VllmStyleLora.name, VllmStyleLora.description, entering(make))


def _vector_peers(problem: AdapterProblem) -> list[Contender]:
    """The vectors of all tokens gathered, then one multiplication."""

    def enter() -> Entry:
        size, device = problem.shape.hidden_size, problem.output.device
        vectors = torch.stack(
            [problem.arena[start : start + size] for start in problem.slot_offsets.tolist()]
        )
        lengths = torch.tensor(problem.shape.lengths, device=device)
        segment_of_token = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        return _entry(problem, lambda output: output.mul_(vectors[segment_of_token]))

    return [Contender("torch, gathered", "vectors gathered for each token, one product", enter)]
