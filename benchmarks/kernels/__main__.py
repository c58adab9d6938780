"""Does grouping many tenants' adapters cost speed, against one torch.matmul of the same total size?"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue

import hmi_kernels
from benchmarks.arguments import Arguments, read_arguments
from benchmarks.peers.torch_matmul import DenseAdapter, LoopedAdapters
from benchmarks.result import BenchmarkResult, Case, Ratio, System
from hmi_engine.demo.timing import interleave

__all__ = ["main"]

QUESTION = "Does grouping many tenants' adapters cost speed, against one torch.matmul of the same total size?"
NUM_SEGMENTS = 32
HIDDEN_SIZE = 384
RANKS: tuple[tuple[int, ...], ...] = ((8,), (16,), (64,), (8, 16, 32, 64))
TOKENS = (1, 8, 64)
SECONDS_PER_SAMPLE = 0.02
TOLERANCE = 1e-3
NOTES = (
    "Work is the multiplications and additions of the two products, 4 T H R, the same for all systems; ours "
    "also applies activation, biases and scale, the dense product does not.",
    "With mixed ranks the dense product has the mean rank, so its size is the same.",
    "Every sample repeats the call for about 20 ms; operands stay in cache as far as they fit.",
)


@dataclass(frozen=True)
class _Problem:
    """Segments of ``tokens`` tokens each, of adapters with ``ranks`` in turn."""

    kind: str
    ranks: tuple[int, ...]
    tokens: int

    @property
    def segment_ranks(self) -> list[int]:
        return [self.ranks[segment % len(self.ranks)] for segment in range(NUM_SEGMENTS)]

    @property
    def flop(self) -> float:
        return 4.0 * self.tokens * HIDDEN_SIZE * sum(self.segment_ranks)

    @property
    def name(self) -> str:
        ranks = "mixed " + "/".join(map(str, self.ranks)) if len(self.ranks) > 1 else str(self.ranks[0])
        return f"{self.kind}, rank {ranks}, {self.tokens} tokens per segment"


Run = Callable[[torch.Tensor, torch.Tensor], None]


def _grouped(problem: _Problem, blocks: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Run:
    """Our op on an arena of all blocks, each aligned to 16 elements as the engine's arena does."""
    pieces, offsets, position = [], [], 0
    for down, up in blocks:
        biases = [torch.zeros(down.shape[1]), torch.zeros(up.shape[1])]
        parts = [down, biases[0], up, biases[1]] if problem.kind == "bottleneck" else [down, up]
        block = torch.cat([part.flatten() for part in parts])
        offsets.append(position)
        pieces.append(torch.nn.functional.pad(block, (0, -len(block) % 16)))
        position += len(pieces[-1])
    layout = (
        torch.cat(pieces),
        torch.arange(NUM_SEGMENTS + 1) * problem.tokens,
        torch.arange(NUM_SEGMENTS, dtype=torch.int32),
        torch.tensor(offsets),
        torch.tensor(problem.segment_ranks, dtype=torch.int32),
    )
    scales = torch.ones(NUM_SEGMENTS)
    if problem.kind == "lora":
        return lambda output, hidden: hmi_kernels.grouped_lora(output, hidden, *layout, scales)
    gelu = torch.full((NUM_SEGMENTS,), hmi_kernels.ACTIVATIONS.index("gelu"), dtype=torch.int32)
    return lambda output, hidden: hmi_kernels.grouped_bottleneck(output, hidden, *layout, gelu, scales)


def _measure(problem: _Problem, repetitions: int) -> Case:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    blocks = [(random(HIDDEN_SIZE, rank), random(rank, HIDDEN_SIZE)) for rank in problem.segment_ranks]
    mean_rank = sum(problem.segment_ranks) // NUM_SEGMENTS
    dense = DenseAdapter(random(HIDDEN_SIZE, mean_rank), random(mean_rank, HIDDEN_SIZE))
    looped = LoopedAdapters(blocks, range(0, NUM_SEGMENTS * problem.tokens + 1, problem.tokens))
    runs: dict[str, tuple[str, Run]] = {
        f"grouped_{problem.kind}": ("one call for all segments", _grouped(problem, blocks)),
        dense.name: (dense.description, dense.run),
        looped.name: (looped.description, looped.run),
    }
    hidden = random(NUM_SEGMENTS * problem.tokens, HIDDEN_SIZE)
    if problem.kind == "lora":
        _check_equal(runs[f"grouped_{problem.kind}"][1], looped.run, hidden)
    output = torch.zeros_like(hidden)
    calls = {name: _calls_per_sample(run, output, hidden) for name, (_, run) in runs.items()}
    seconds = interleave(
        {name: _repeated(run, calls[name], output, hidden) for name, (_, run) in runs.items()}, repetitions
    )
    systems = tuple(
        System.of(name, description, seconds[name], [problem.flop * calls[name]] * repetitions, "flop")
        for name, (description, _) in runs.items()
    )
    settings: dict[str, JsonValue] = {
        "kind": problem.kind,
        "ranks": list(problem.ranks),
        "tokens_per_segment": problem.tokens,
        "segments": NUM_SEGMENTS,
        "hidden_size": HIDDEN_SIZE,
    }
    ours, *others = systems
    return Case(
        name=problem.name,
        settings=settings,
        systems=systems,
        ratios=tuple(Ratio.of(ours, other) for other in others),
    )


def _check_equal(ours: Run, theirs: Run, hidden: torch.Tensor) -> None:
    results = [torch.zeros_like(hidden) for _ in range(2)]
    for run, result in zip((ours, theirs), results, strict=True):
        run(result, hidden)
    torch.testing.assert_close(results[0], results[1], atol=TOLERANCE, rtol=TOLERANCE)


def _calls_per_sample(run: Run, output: torch.Tensor, hidden: torch.Tensor) -> int:
    run(output, hidden)
    started = time.perf_counter()
    for _ in range(10):
        run(output, hidden)
    return max(1, int(10 * SECONDS_PER_SAMPLE / (time.perf_counter() - started)))


def _repeated(run: Run, calls: int, output: torch.Tensor, hidden: torch.Tensor) -> Callable[[int], None]:
    def repeat(_: int) -> None:
        output.zero_()
        for _ in range(calls):
            run(output, hidden)

    return repeat


@torch.inference_mode()
def measure(arguments: Arguments) -> BenchmarkResult:
    """Runs every case."""
    repetitions = 3 if arguments.quick else 25
    ranks = RANKS[1:2] if arguments.quick else RANKS
    cases = []
    for kind, rank, tokens in itertools.product(("bottleneck", "lora"), ranks, TOKENS):
        cases.append(_measure(_Problem(kind, rank, tokens), repetitions))
        print(f"{cases[-1].name}: {cases[-1].ratios[0].times.value:.2f} x {cases[-1].ratios[0].baseline}")
    return BenchmarkResult.of(
        arguments,
        "kernels",
        QUESTION,
        settings={"repetitions": repetitions, "seconds_per_sample": SECONDS_PER_SAMPLE},
        notes=NOTES,
        cases=cases,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments("kernels", QUESTION, argv)
    measure(arguments).write(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
