"""Every op is captured into a CUDA graph and replayed on other inputs than it was captured with."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.checks.program import CheckFailedError, faults_raised, run_check

if TYPE_CHECKING:
    from benchmarks.gpu.op_case import OpCase
    from benchmarks.gpu.platform import Platform

DTYPES = (torch.float16, torch.bfloat16)
SEEDS = (1, 2, 3)


def check(platform: Platform) -> str:
    """Captures every case on both backends; in dry runs the calls are only repeated."""
    from benchmarks.gpu.op_cases import op_cases

    cases = op_cases(platform.device, DTYPES)
    backends = ("cuda",) if platform.is_dry else ("cuda", "triton")
    for backend in backends:
        with platform.backend(backend), faults_raised(platform):
            for case in cases:
                replay = _called_again(case) if platform.is_dry else _captured(case)
                _compare(case, replay, f"{case.name}, backend {backend}")
    what = "repeated (no GPU: nothing captured)" if platform.is_dry else "captured and replayed"
    return f"{len(cases)} calls on {' and '.join(backends)} {what}, {len(SEEDS)} times each on other inputs"


class _Replay:
    """A call that writes into memory of its own each time."""

    def __init__(self, result: torch.Tensor, graph: torch.cuda.CUDAGraph | None, case: OpCase) -> None:
        self._result, self._graph, self._case = result, graph, case

    def run(self) -> torch.Tensor:
        """Does the call again and returns its result."""
        if self._graph is None:
            return self._case.run()
        self._result.zero_()  # what a replay leaves out must not be there from before
        self._graph.replay()
        return self._result


def _called_again(case: OpCase) -> _Replay:
    return _Replay(case.run(), None, case)


def _captured(case: OpCase) -> _Replay:
    """A graph of the call, on inputs that are then changed. The call runs before, for Triton to compile."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            case.run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = case.run()
    return _Replay(result, graph, case)


def _compare(case: OpCase, replay: _Replay, name: str) -> None:
    for seed in SEEDS:
        case.refill(seed)
        eager = case.run().clone()
        if not torch.equal(replay.run(), eager):
            raise CheckFailedError(f"{name}: a replay on inputs of seed {seed} differs from the call")


if __name__ == "__main__":
    sys.exit(run_check(check))
