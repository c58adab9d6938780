"""How much of fetching, searching and sending an engine on the GPU hides behind compute, end to end.

Every request asks for another tenant, in turn of all, and there is memory for those of a few batches: nearly
all are cold in the device's arena. With one batch in flight everything takes its turn, so what a deeper
pipeline saves of that time, over what the steps before compute took there, is what it hides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.platform import Platform
from benchmarks.result import Quantity
from benchmarks.tenant_fleet import fleet_tenants, tenant_name
from hmi_engine.demo.base_model import packaged_model
from hmi_engine.demo.timing import interleave, median
from hmi_engine.engine import Engine
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.request import Request
from hmi_engine.store import Store

__all__ = ["measure_pipeline"]

DEPTHS = (1, 2, 4)
STEPS_BEFORE = ("fetch", "search", "send")
DOMAIN = "numbers"
VOCABULARY = 2000


@dataclass(frozen=True)
class _Plan:
    tenants: int
    requests: int
    words: int
    batch_tokens: int
    tenants_in_memory: int
    plot_layers: int
    repetitions: int


FULL = _Plan(1024, 1024, 40, 4096, 400, 3, 7)
QUICK = _Plan(256, 256, 40, 2048, 200, 3, 3)
DRY = _Plan(12, 12, 5, 30, 8, 0, 1)


def measure_pipeline(platform: Platform, *, is_quick: bool) -> tuple[Quantity, ...]:
    """The hidden share at each depth; in dry runs the same engines answer on the CPU, and nothing is told.

    Raises AssertionError where depths answer differently.
    """
    plan = DRY if platform.is_dry else QUICK if is_quick else FULL
    with (
        tempfile.TemporaryDirectory(prefix="hmi-gpu-pipeline-") as folder,
        _store(Path(folder) / "store", plan) as store,
        _engines(store, platform, plan) as engines,
    ):
        requests = _requests(plan)
        _check_equal(engines, requests)
        return () if platform.is_dry else _shares(engines, requests, plan)


def _shares(engines: Mapping[str, Engine], requests: list[Request], plan: _Plan) -> tuple[Quantity, ...]:
    before = _seconds_before(engines["1"])
    seconds = interleave(
        {depth: lambda _, engine=engine: engine.run(requests) for depth, engine in engines.items()},
        plan.repetitions,
        warm_up=0,
    )
    steps = (_seconds_before(engines["1"]) - before) / plan.repetitions
    alone = median(seconds["1"])
    return tuple(
        Quantity(
            name=f"fetching, searching and sending hidden, {depth} batches in flight",
            value=(alone - median(seconds[depth])) / steps,
            unit="share",
        )
        for depth in engines
        if depth != "1"
    )


def _seconds_before(engine: Engine) -> float:
    """What the steps before compute took so far."""
    stages = engine.stats().stages or {}
    return float(sum(stages[name]["busy_seconds"] for name in STEPS_BEFORE if name in stages))


@contextmanager
def _store(path: Path, plan: _Plan) -> Iterator[Store]:
    with Store.create(path, general=str(packaged_model()), plot_layers=plan.plot_layers) as store:
        domain = "general"
        if plan.plot_layers:
            store.add_domain(DOMAIN, _texts(4 * plan.requests, plan, seed=1))
            domain = DOMAIN
        store.add_tenants(fleet_tenants(store.general, domain, range(plan.tenants)))
        yield store


@contextmanager
def _engines(store: Store, platform: Platform, plan: _Plan) -> Iterator[dict[str, Engine]]:
    """An engine for each depth, by its name; each with memory of its own."""
    largest = max(AdapterArena.allocated_bytes(info.bytes // 4) for info in store.tenants.values())
    arena = plan.tenants_in_memory * largest
    # On a GPU half of the budget is for the tables, which shall fit.
    budget = arena if platform.is_dry else 2 * max(arena, 256 << 20)
    device = "cpu" if platform.is_dry else str(platform.device)
    with ExitStack() as stack:
        yield {
            str(depth): stack.enter_context(
                Engine(
                    store,
                    device=device,
                    device_memory=budget,
                    host_memory="4GiB",
                    max_batch_tokens=plan.batch_tokens,
                    pipeline_depth=depth,
                    record_traffic=False,
                )
            )
            for depth in DEPTHS
        }


def _requests(plan: _Plan) -> list[Request]:
    texts = _texts(plan.requests, plan, seed=2)
    return [Request(tenant_name(number % plan.tenants), text=text) for number, text in enumerate(texts)]


def _texts(count: int, plan: _Plan, seed: int) -> list[str]:
    """Numbers below 2,000 as words, drawn by Zipf's law."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, VOCABULARY + 1)
    draws = torch.multinomial(weights, count * plan.words, replacement=True, generator=generator)
    return [" ".join(map(str, draw.tolist())) for draw in draws.view(count, plan.words)]


def _check_equal(engines: Mapping[str, Engine], requests: list[Request]) -> None:
    answers = {depth: engine.run(requests) for depth, engine in engines.items()}
    for depth, responses in answers.items():
        for response, expected in zip(responses, answers["1"], strict=True):
            if response.error is not None:
                raise response.error
            if any(abs(response.scores[label] - score) > 1e-3 for label, score in expected.scores.items()):
                raise AssertionError(f"{depth} batches in flight answer something else")
