"""Decoders under load: how throughput depends on how many tenants there are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.load_traffic import poisson_times, zipf_popularity
from hmi_engine.generation.core import DecoderCore
from hmi_engine.generation.service import DecoderService
from hmi_engine.knowledge.adapters import random_adapter
from hmi_engine.knowledge.changes import NewTenant
from hmi_engine.knowledge.heads import GenerationHead
from hmi_engine.request import Request, TextPiece
from hmi_engine.sampling import Sampling
from hmi_engine.schedule.limits import QueueLimits, no_limits
from hmi_engine.serving_options import EngineOptions
from hmi_engine.store import Store

__all__ = ["TenantLoad", "measure_tenants"]

EXPONENT = 1.0
SHORTEST, LONGEST = 8, 64
OVERLOAD = 2.0
"""So far above what was measured first that a host which becomes faster meanwhile is never out of work."""

_ROUNDS = 3
_SETTLE_SHARE = 0.25


@dataclass(frozen=True)
class TenantLoad:
    """What an engine did with requests of so many tenants.

    Attributes:
        tenants: that are asked for.
        offered_per_second: prompts' and texts' tokens that the requests ask for.
        tokens_per_second: those that were computed, after the first moments.
        first_token_p50: seconds from a request to its first token, median.
        per_token_p50: seconds between two tokens, median of the requests' means.
    """

    tenants: int
    offered_per_second: float
    tokens_per_second: float
    first_token_p50: float
    per_token_p50: float


@dataclass
class _Watch:
    """When a request was sent, and when its tokens came, in seconds of perf_counter."""

    sent: float
    num_prompt: int
    times: list[float] = field(default_factory=list)

    def note(self, _: TextPiece) -> None:
        self.times.append(time.perf_counter())


def measure_tenants(
    store: Store,
    domain: str,
    prompts: Sequence[list[int]],
    counts: Sequence[int],
    *,
    rank: int,
    seconds: float,
) -> list[TenantLoad]:
    """Loads of different numbers of tenants, in turn; each figure is the median of the rounds."""
    names = [f"load-{number}" for number in range(max(counts))]
    store.add_tenants(
        NewTenant(name, domain, random_adapter(store.general, "lora", rank, number), GenerationHead(), {})
        for number, name in enumerate(names)
    )
    rate = _capacity(store, names[: counts[0]], prompts, seconds / 2) * OVERLOAD
    found: dict[int, list[TenantLoad]] = {count: [] for count in counts}
    for number in range(_ROUNDS):
        for place in np.random.default_rng(number).permutation(len(counts)).tolist():
            count = counts[place]
            found[count].append(
                _run(store, names[:count], prompts, rate=rate, seconds=seconds, seed=100 * number + place)
            )
    return [
        TenantLoad(
            count,
            *(
                float(np.median([getattr(load, name) for load in found[count]]))
                for name in ("offered_per_second", "tokens_per_second", "first_token_p50", "per_token_p50")
            ),
        )
        for count in counts
    ]


def _capacity(store: Store, names: Sequence[str], prompts: Sequence[list[int]], seconds: float) -> float:
    """Requests a second that an engine finishes where it always has enough."""
    load = _run(store, names, prompts, rate=200.0, seconds=seconds, seed=9_000)
    return load.tokens_per_second / (SHORTEST + LONGEST)


def _run(
    store: Store,
    names: Sequence[str],
    prompts: Sequence[list[int]],
    *,
    rate: float,
    seconds: float,
    seed: int,
) -> TenantLoad:
    generator = np.random.default_rng(seed)
    due = poisson_times(rate, seconds, generator)
    chosen = generator.choice(len(names), len(due), p=zipf_popularity(len(names), EXPONENT))
    lengths = generator.integers(SHORTEST, LONGEST + 1, size=(len(due), 2))
    core = DecoderCore(store, EngineOptions(record_traffic=False, prefix_cache="off"))
    service = DecoderService(core, limits=QueueLimits(), tenant_limits=no_limits)
    watches = []
    try:
        core.residency.prefetch([store.tenants[name] for name in names])
        start = time.perf_counter() + 0.05
        for number, at in enumerate(due.tolist()):
            prompt = prompts[(seed + number) % len(prompts)][: int(lengths[number, 0])]
            sampling = Sampling(max_tokens=int(lengths[number, 1]), ignore_end=True)
            pause = start + at - time.perf_counter()
            if pause > 0:
                time.sleep(pause)
            watch = _Watch(time.perf_counter(), len(prompt))
            watches.append(watch)
            request = Request(names[int(chosen[number])], input_ids=prompt, sampling=sampling)
            service.put(request, emit=watch.note)
        end = time.perf_counter()
    finally:
        service.stop()
    offered = sum(watch.num_prompt for watch in watches) + int(lengths[:, 1].sum())
    return _summary(len(names), offered / seconds, watches, start + _SETTLE_SHARE * (end - start), end)


def _summary(
    tenants: int, offered: float, watches: Sequence[_Watch], since: float, until: float
) -> TenantLoad:
    tokens = 0
    first, gaps = [], []
    for watch in watches:
        times = [at for at in watch.times if since <= at < until]
        tokens += len(times)
        if watch.times and since <= watch.times[0] < until:
            tokens += watch.num_prompt
            first.append(watch.times[0] - watch.sent)
        if len(times) > 1:
            gaps.append((times[-1] - times[0]) / (len(times) - 1))
    return TenantLoad(
        tenants,
        offered,
        tokens / (until - since),
        float(np.median(first)) if first else float("nan"),
        float(np.median(gaps)) if gaps else float("nan"),
    )
