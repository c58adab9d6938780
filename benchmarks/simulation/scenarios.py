"""What machines with GPUs would do with many tenants: simulated, not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from benchmarks.load_outcomes import Fate, Outcomes
from benchmarks.load_traffic import zipf_popularity
from benchmarks.simulation.cluster import Cluster, Simulated, Simulation
from benchmarks.simulation.engine import SimulatedEngine, Workload
from benchmarks.simulation.gpu import gpu_machine, tenant_sizes
from benchmarks.simulation.machine import Costs
from benchmarks.simulation.routing import AffinityRouter
from hmi_engine.schedule.limits import QueueLimits

__all__ = ["LOAD", "Forecast", "Scenario", "forecast"]

LOAD = 0.7
"""Of the throughput, at which latencies are predicted."""

_Numbers = npt.NDArray[np.int64]
_BATCHES_OPEN = 4
_UNLIMITED = QueueLimits(1 << 40, 1 << 50, tenant_share=None)


@dataclass(frozen=True)
class Scenario:
    """What is simulated.

    Attributes:
        tenants: how many there are.
        gpus: each with an engine of its own.
        bytes_per_second: of each host link.
        exponent: of Zipf's law; 0: all tenants alike.
        host_parts: of :func:`gpu_machine`.
        depth: batches in flight.
        waits_for_layers: whether a layer waits for its own copies only.
        requests: of each of the two runs.
        seed: of the draws.
    """

    tenants: int
    gpus: int
    bytes_per_second: float
    exponent: float = 1.0
    host_parts: float = 1.0
    depth: int = 3
    waits_for_layers: bool = True
    requests: int = 200_000
    seed: int = 0


@dataclass(frozen=True)
class Forecast:
    """What a scenario gives.

    Attributes:
        requests_per_second: of all GPUs, with always enough to do.
        hidden_share: of fetch, search and copy, meanwhile; None where there was nothing of it.
        compute_share: of the time, that the devices computed.
        miss_ratio: of tenants of batches, that were not on the device.
        p50: seconds, at :data:`LOAD` of that throughput.
        p99: the same, 99th percentile.
        most_over_mean: requests of the engine that got most, over the mean of all.
    """

    requests_per_second: float
    hidden_share: float | None
    compute_share: float
    miss_ratio: float
    p50: float
    p99: float
    most_over_mean: float


def forecast(scenario: Scenario, host: Costs, num_tokens: Sequence[int]) -> Forecast:
    """Simulates a closed loop for the throughput, and an open loop for the latencies.

    Args:
        scenario: what to simulate.
        host: costs of the processor's stages.
        num_tokens: of texts, of which each request has one.
    """
    generator = np.random.default_rng(scenario.seed)
    popularity = zipf_popularity(scenario.tenants, scenario.exponent, scenario.seed)
    sizes = tenant_sizes(scenario.tenants)
    workload = Workload(
        tenants=_draw(popularity, 2 * scenario.requests, generator),
        tokens=generator.choice(np.asarray(num_tokens, dtype=np.int64), 2 * scenario.requests),
        sizes=sizes,
    )
    machine = gpu_machine(
        host,
        scenario.bytes_per_second,
        sizes,
        host_parts=scenario.host_parts,
        depth=scenario.depth,
        waits_for_layers=scenario.waits_for_layers,
    )
    asked = _draw(popularity, scenario.requests // 2, generator)
    warm_up = partial(_warm_up, sizes=sizes, popularity=popularity, asked=asked, will_ask=workload.tenants)
    simulation = Simulation(Cluster(machine, scenario.gpus, limits=_UNLIMITED), workload, warm_up)
    batch = machine.max_batch_tokens / float(workload.tokens.mean())
    concurrency = min(int(_BATCHES_OPEN * batch * scenario.gpus), scenario.requests // 4)
    loaded = simulation.closed_loop(scenario.requests, concurrency=concurrency)
    rate, seconds = _steady_rate(loaded.outcomes, concurrency)
    gaps = generator.exponential(1 / (LOAD * rate), scenario.requests)
    latencies = _latencies(simulation.open_loop(np.cumsum(gaps)))
    counts = np.bincount(loaded.engines, minlength=scenario.gpus)
    return Forecast(
        requests_per_second=rate,
        hidden_share=loaded.times.hidden_share,
        compute_share=loaded.times.compute / (seconds * scenario.gpus),
        miss_ratio=loaded.misses / max(1, loaded.hits + loaded.misses),
        p50=float(np.quantile(latencies, 0.5)),
        p99=float(np.quantile(latencies, 0.99)),
        most_over_mean=float(counts.max() / counts.mean()),
    )


def _draw(popularity: npt.NDArray[np.float64], count: int, generator: np.random.Generator) -> _Numbers:
    cumulated = np.cumsum(popularity)
    places = np.searchsorted(cumulated, generator.random(count) * cumulated[-1], side="right")
    return places.astype(np.int64)


def _steady_rate(outcomes: Outcomes, concurrency: int) -> tuple[float, float]:
    """Answers a second from the middle on, while enough is open; and the seconds from the middle on."""
    ends = np.sort(outcomes.finished[outcomes.fates == Fate.ANSWERED])
    first, last = len(ends) // 2, len(ends) - concurrency
    middle = float(outcomes.due[len(outcomes) // 2])
    return (last - first) / float(ends[last - 1] - ends[first - 1]), float(ends[-1]) - middle


def _latencies(found: Simulated) -> npt.NDArray[np.float64]:
    """Of the second half."""
    half = len(found.outcomes) // 2
    return found.outcomes.finished[half:] - found.outcomes.due[half:]


def _warm_up(
    engines: Sequence[SimulatedEngine],
    router: AffinityRouter,
    *,
    sizes: _Numbers,
    popularity: npt.NDArray[np.float64],
    asked: _Numbers,
    will_ask: _Numbers,
) -> None:
    """Each engine gets its own tenants, the most popular first, and then its part of ``asked``.

    Tenants that are too much for one engine under the router's bound are spread over as many as they need.
    Where a tier holds all of an engine's tenants, it gets only those that anybody asks for: nobody leaves.
    """
    order = np.argsort(-popularity, kind="stable")
    need = np.ceil(popularity * len(engines) / router.balance).astype(np.int64)
    spread = {
        int(tenant): router.preferences(int(tenant))[: need[tenant]] for tenant in np.flatnonzero(need > 1)
    }
    first = router.first_choices(np.arange(len(popularity)))
    generator = np.random.default_rng(0)
    homes = first[asked]
    for place in np.flatnonzero(np.isin(asked, list(spread))).tolist():
        homes[place] = generator.choice(spread[int(asked[place])])
    is_asked = np.zeros(len(popularity), dtype=bool)
    is_asked[asked] = is_asked[will_ask] = True
    for number, engine in enumerate(engines):
        is_own = first == number
        for tenant, places in spread.items():
            is_own[tenant] = number in places
        own = order[is_own[order]]
        num_bytes = int(sizes[own].sum())
        engine.memory.warm_up(
            [own if tier.capacity < num_bytes else own[is_asked[own]] for tier in engine.memory.tiers],
            asked[homes == number].tolist(),
        )
