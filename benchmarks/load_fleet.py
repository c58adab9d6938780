"""A store of distinct tenants, real texts for them, and engines over it as the load benchmarks open them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from pydantic import JsonValue

from benchmarks.arguments import Arguments, read_texts
from benchmarks.load_traffic import Arrivals
from benchmarks.tenant_fleet import FLEET, fleet_tenants, tenant_name
from hmi_engine.async_engine import AsyncEngine
from hmi_engine.demo.base_model import packaged_model
from hmi_engine.demo.stream import cut_to_tokens
from hmi_engine.engine import Engine
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.request import Request
from hmi_engine.schedule.limits import NO_LIMITS, QueueLimits, TenantLimits
from hmi_engine.schedule.queued_request import QueuedRequest
from hmi_engine.schedule.scheduler import Scheduler
from hmi_engine.store import Store

__all__ = ["Fleet", "build_fleet", "open_engine", "resident_engine"]

DOMAIN = "documentation"
MAX_TOKENS = 64

Payload = TypeVar("Payload")


@dataclass(frozen=True)
class Fleet:
    """What is served.

    Attributes:
        store: folder of the store.
        texts: held-out texts.
        num_tokens: of each text.
        adapter_bytes: of each tenant, by its number, in an arena.
        settings: what a result says of it.
    """

    store: Path
    texts: list[str]
    num_tokens: list[int]
    adapter_bytes: list[int]
    settings: dict[str, JsonValue]

    @property
    def names(self) -> list[str]:
        """Names of all tenants, by number."""
        return [tenant_name(number) for number in range(len(self.adapter_bytes))]

    def requests(self, arrivals: Arrivals) -> list[Request]:
        """What the engine is sent for ``arrivals``."""
        pairs = zip(arrivals.tenants.tolist(), arrivals.texts.tolist(), strict=True)
        return [Request(tenant_name(tenant), self.texts[text]) for tenant, text in pairs]


def build_fleet(arguments: Arguments, folder: Path, *, num_tenants: int, plot_bytes: int) -> Fleet:
    """Makes a store below ``folder`` with tenants of mixed kinds and ranks, each with weights of its own."""
    data = read_texts(arguments, max_words=60)
    path = folder / "store"
    with Store.create(path, general=packaged_model()) as store:
        corpus = chain.from_iterable(domain.texts for domain in data.domains)
        store.add_domain(DOMAIN, corpus, plot_bytes=plot_bytes)
        store.add_tenants(fleet_tenants(store.general, DOMAIN, range(num_tenants)))
        texts = [example.text for task in data.tasks for example in task.test]
        texts = cut_to_tokens(texts, store.encoder, MAX_TOKENS)
        num_tokens = [len(ids) for ids in store.encoder.token_ids(texts)]
        infos = [store.tenants[tenant_name(number)] for number in range(num_tenants)]
        adapter_bytes = [AdapterArena.allocated_bytes(info.bytes // 4) for info in infos]
        settings: dict[str, JsonValue] = {
            "text": data.source,
            "held_out_texts": len(texts),
            "mean_tokens": round(sum(num_tokens) / len(num_tokens), 1),
            "plot_layers": store.general.plot_layers,
            "tenants": num_tenants,
            "adapter_bytes_of_all": sum(adapter_bytes),
            "fleet": [f"{kind} {rank}" if rank else kind for kind, rank in FLEET],
        }
    return Fleet(path, texts, num_tokens, adapter_bytes, settings)


class _FirstComeFirstServed(Scheduler[Payload]):
    """All tenants share one counter and one queue: what a server without fairness does."""

    def submit(self, request: QueuedRequest[Payload], limits: TenantLimits = NO_LIMITS) -> None:
        """As the scheduler does, in the name of everybody."""
        request.tenant = "everybody"
        super().submit(request, limits)


@contextmanager
def open_engine(
    fleet: Fleet,
    *,
    limits: QueueLimits | None = None,
    is_fair: bool = True,
    resident: Sequence[str] = (),
    **options: Any,
) -> Iterator[AsyncEngine]:
    """An engine over the fleet's store with the tenants ``resident`` in memory already.

    Args:
        fleet: what is served.
        limits: of the queue.
        is_fair: whether tenants have queues of their own.
        resident: names.
        options: of :class:`~hmi_engine.AsyncEngine`.
    """
    with Store.open(fleet.store, read_only=True) as store:
        engine = _open(store, limits, is_fair, options)
        try:
            asyncio.run(engine.prefetch(resident))
            yield engine
        finally:
            asyncio.run(engine.close(finish=False))


@contextmanager
def resident_engine(fleet: Fleet) -> Iterator[tuple[Store, Engine]]:
    """An engine without a pipeline that has all tenants in memory, and its store."""
    with (
        Store.open(fleet.store, read_only=True) as store,
        Engine(
            store,
            pipeline_depth=1,
            record_traffic=False,
            host_memory=4 * sum(fleet.adapter_bytes) + (64 << 20),
        ) as engine,
    ):
        engine.prefetch(fleet.names)
        yield store, engine


def _open(store: Store, limits: QueueLimits | None, is_fair: bool, options: dict[str, Any]) -> AsyncEngine:
    options = {"record_traffic": False, **options}
    if is_fair:
        return AsyncEngine(store, queue_limits=limits, **options)
    # No option of the engine turns fairness off, as nobody should; the comparison needs it.
    with patch("hmi_engine.request_queue.Scheduler", _FirstComeFirstServed):
        return AsyncEngine(store, queue_limits=limits, **options)
