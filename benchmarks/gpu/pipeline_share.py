"""How much of fetching, searching and sending an engine on the GPU hides behind compute, end to end.

Every request asks for another tenant, in turn of all, and there is memory for those of a few batches: nearly
all are cold in the device's arena. With one batch in flight everything takes its turn, so what a deeper
pipeline saves of that time, over what the steps before compute took there, is what it hides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.gpu.platform import Platform
from benchmarks.result import Quantity
from hmi_engine.demo.timing import interleave, median
from hmi_engine.engine import Engine
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.request import Request
from hmi_engine.store import Store

__all__ = ["measure_pipeline"]

DEPTHS = (1, 2, 4)
STEPS_BEFORE = ("fetch", "search", "send")


@dataclass(frozen=True)
class PipelinePlan:
    """How much is asked; ``tenants_in_memory`` of ``tenants`` find room in the device's arena."""

    tenants: int
    requests: int
    batch_tokens: int
    tenants_in_memory: int
    repetitions: int


def measure_pipeline(
    store: Store, requests: list[Request], platform: Platform, plan: PipelinePlan
) -> tuple[Quantity, ...]:
    """The hidden share at each depth; in dry runs the same engines answer on the CPU, and nothing is told.

    Raises AssertionError where depths answer differently.
    """
    with _engines(store, platform, plan) as engines:
        _check_equal(engines, requests)
        return () if platform.is_dry else _shares(engines, requests, plan)


def _shares(
    engines: Mapping[str, Engine], requests: list[Request], plan: PipelinePlan
) -> tuple[Quantity, ...]:
    before = _seconds_before(engines["1"])
    seconds = interleave(
        {depth: lambda _, engine=engine: engine.run(requests) for depth, engine in engines.items()},
        plan.repetitions,
        warm_up=0,
    )
    steps = (_seconds_before(engines["1"]) - before) / plan.repetitions
    alone = median(seconds["1"])
    deeper = {depth: median(seconds[depth]) for depth in engines if depth != "1"}
    return (
        Quantity(name="fetching, searching and sending, one batch in flight", value=1e3 * steps, unit="ms"),
        Quantity(name="all of it, one batch in flight", value=1e3 * alone, unit="ms"),
        *(
            Quantity(
                name=f"fetching, searching and sending hidden, {depth} batches in flight",
                value=(alone - taken) / steps,
                unit="share",
            )
            for depth, taken in deeper.items()
        ),
        *(
            Quantity(
                name=f"throughput over one, {depth} batches in flight", value=alone / taken, unit="times"
            )
            for depth, taken in deeper.items()
        ),
    )


def _seconds_before(engine: Engine) -> float:
    """What the steps before compute took so far."""
    stages = engine.stats().stages or {}
    return float(sum(stages[name]["busy_seconds"] for name in STEPS_BEFORE if name in stages))


@contextmanager
def _engines(store: Store, platform: Platform, plan: PipelinePlan) -> Iterator[dict[str, Engine]]:
    """An engine for each depth, by its name; each with memory of its own."""
    largest = max(AdapterArena.allocated_bytes(info.bytes // 4) for info in store.tenants.values())
    # On a GPU parameters have 16 bits, and half of the budget is for the tables, which shall fit.
    budget = plan.tenants_in_memory * largest
    device = "cpu" if platform.is_dry else str(platform.device)
    with ExitStack() as stack:
        yield {
            str(depth): stack.enter_context(
                Engine(
                    store,
                    device=device,
                    device_memory=budget,
                    host_memory="1GiB",
                    max_batch_tokens=plan.batch_tokens,
                    pipeline_depth=depth,
                    record_traffic=False,
                )
            )
            for depth in DEPTHS
        }


def _check_equal(engines: Mapping[str, Engine], requests: list[Request]) -> None:
    answers = {depth: engine.run(requests) for depth, engine in engines.items()}
    for depth, responses in answers.items():
        for response, expected in zip(responses, answers["1"], strict=True):
            if response.error is not None:
                raise response.error
            if any(abs(response.scores[label] - score) > 1e-2 for label, score in expected.scores.items()):
                raise AssertionError(f"{depth} batches in flight answer something else")
