"""The engine: requests of many tenants in, responses out."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from types import TracebackType

import hmi_kernels
from hmi_engine.errors import EngineClosedError, HmiError, MissPolicyWarning, ReadOnlyStoreError
from hmi_engine.knowledge.sizes import parse_bytes
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.memory.residency import AdapterResidency
from hmi_engine.memory.traffic import DEFAULT_TRAFFIC_BYTES
from hmi_engine.pipeline.admission import AdmittedRequest, admit
from hmi_engine.pipeline.domain_updates import DomainUpdater
from hmi_engine.pipeline.respond import respond
from hmi_engine.pipeline.step import BatchItem, BatchRunner, MissPolicy
from hmi_engine.pipeline.traffic_saver import TrafficSaver
from hmi_engine.request import Request, Response, Timing
from hmi_engine.schedule.batching import QueuedSequence, form_batches
from hmi_engine.store import Store

__all__ = ["Engine", "EngineStatistics"]


@dataclass
class EngineStatistics:
    """Counts since the engine started.

    ``plot`` and ``adapters`` hold the fields of ``PlotStatistics`` (tokens, windows) and
    ``ResidencyStatistics`` (tenants, bytes); ``host_adapters`` those of ``HostStatistics``, or None where
    host memory is no tier of its own; ``traffic`` and ``updates`` those of ``TrafficStatistics`` and
    ``UpdateStatistics``, or None where the engine does neither.
    """

    requests: int = 0
    errors: int = 0
    batches: int = 0
    tokens: int = 0
    prepare_seconds: float = 0.0
    compute_seconds: float = 0.0
    resident_tenants: int = 0
    resident_bytes: int = 0
    plot: dict[str, int] | None = None
    adapters: dict[str, int] | None = None
    host_adapters: dict[str, int] | None = None
    traffic: dict[str, int | float | str | None] | None = None
    updates: dict[str, int | str | None] | None = None


class Engine(AbstractContextManager["Engine"]):
    """Serves a store's tenants, mixed freely in one call; concurrent calls of ``run`` take turns."""

    def __init__(
        self,
        store: Store,
        *,
        device: str = "auto",
        backend: str = "auto",
        dtype: str = "auto",
        device_memory: int | str = "auto",
        host_memory: int | str = "2GiB",
        miss: MissPolicy = "backoff",
        exact_budget: float = 0.05,
        max_batch_tokens: int = 8192,
        overlay_memory: int | str = "256MiB",
        record_traffic: bool = True,
        traffic_memory: int | str = DEFAULT_TRAFFIC_BYTES,
        traffic_interval: float = 60.0,
        update_domains_every: float | None = None,
        update_share: float = 0.25,
    ) -> None:
        """Opens an engine over a store, which stays the caller's to close.

        Args:
            store: the tenants' store.
            device: ``"auto"`` or ``"cpu"``.
            backend: kernels: ``"auto"``, ``"cpu"`` or ``"reference"`` (plain torch, slow).
            dtype: ``"auto"`` or ``"float32"``.
            device_memory: budget for adapters where the device computes with them, in bytes or as
                ``"512MiB"``, before which ``host_memory`` is a second tier. ``"auto"`` on the CPU: there is
                one tier, of ``host_memory``.
            host_memory: budget for adapters in host memory, in bytes or as ``"2GiB"``.
            miss: ``"backoff"`` composes a missing window from shorter n-grams, ``"exact"`` computes it,
                ``"budget"`` computes those that a batch has most often, of equals those that corpora and
                recorded traffic have most often, and composes the others.
            exact_budget: ``miss="budget"``: most windows computed per token of a batch, 0 to 1.
            max_batch_tokens: most tokens computed at once.
            overlay_memory: budget for the rows of windows computed in traffic, which later batches find.
            record_traffic: whether to count the n-grams that requests ask for and to keep them in the store
                for ``Store.update_domain``. A store opened with ``read_only=True`` records nothing.
            traffic_memory: budget for these counts.
            traffic_interval: seconds between two savings of them; the rest is saved by :meth:`close`.
            update_domains_every: seconds between two rounds of updates of the domains that had traffic, on a
                thread of the engine; None for no updates. Each writes the domain's table anew, so minutes
                to hours suit large ones.
            update_share: most of its time that this thread works, 0 to 1.

        Raises:
            ValueError: an option is none of those above, or out of range.
            ReadOnlyStoreError: ``update_domains_every`` needs a store that is open for writing.
            OverloadedError: the pinned tenants take more than the budget.
        """
        _check_option("device", device, ("auto", "cpu"))
        _check_option("backend", backend, ("auto", "cpu", "reference"))
        _check_option("dtype", dtype, ("auto", "float32"))
        _check_option("miss", miss, ("backoff", "exact", "budget"))
        if not 0 <= exact_budget <= 1:
            raise ValueError(f"exact_budget is {exact_budget}, must be 0 to 1 windows per token")
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}, must be at least 1")
        self.store = store
        self.max_batch_tokens = max_batch_tokens
        self._backend = backend
        self._miss = miss
        self._warned: set[str] = set()
        self._residency = _open_residency(store, device_memory, host_memory)
        store.catalog.arena_bytes[self] = self._residency.arena.capacity_bytes
        self._residency.load_pinned(store.tenants.pinned())
        self._plots: PlotLibrary | None = None
        if store.general.plot_layers:
            overlay_bytes = parse_bytes(overlay_memory)
            self._plots = PlotLibrary(
                store.layout,
                store.catalog,
                store.general,
                overlay_bytes=overlay_bytes,
                domain_layers=store.domain_layers,
            )
        self._traffic: TrafficSaver | None = None
        if self._plots is not None and record_traffic and not store.catalog.read_only:
            self._traffic = TrafficSaver(store, max_bytes=traffic_memory, interval_seconds=traffic_interval)
        self._runner = BatchRunner(
            store.general,
            store.model,
            self._plots,
            self._residency,
            miss=miss,
            exact_budget=exact_budget,
            recorder=self._traffic.recorder if self._traffic is not None else None,
        )
        self._lock = threading.Lock()
        self._closed = False
        self._statistics = EngineStatistics()
        self._updater: DomainUpdater | None = None
        if update_domains_every is not None:
            self._updater = self._start_updates(update_domains_every, update_share)

    def _start_updates(self, every: float, max_share: float) -> DomainUpdater:
        if self.store.catalog.read_only:
            raise ReadOnlyStoreError(
                f"{self.store.layout.root} was opened with read_only=True, so its domains cannot be updated; "
                "open it for writing or leave update_domains_every out"
            )
        # Without own counts there may still be those of other processes' engines.
        flush = self._traffic.save if self._traffic is not None else lambda: None
        return DomainUpdater(self.store, every=every, max_share=max_share, flush=flush)

    def run(self, requests: Sequence[Request]) -> list[Response]:
        """Answers requests, in their order; a request that fails carries its error and harms no other.

        Raises:
            EngineClosedError: the engine is closed.
        """
        with self._lock, hmi_kernels.use_backend(self._backend):
            self._check_open()
            started = time.perf_counter()
            admitted = admit(requests, self.store.tenants, self.store.encoder)
            responses: list[Response | None] = [None] * len(requests)
            queue = []
            for index, result in enumerate(admitted):
                if isinstance(result, HmiError):
                    responses[index] = Response.failed(requests[index], result)
                else:
                    queue.append((index, result))
            self._warn_of_mismatches([item for _, item in queue])
            self._run_queue(queue, responses, started)
            if self._traffic is not None:
                self._traffic.save_if_due()
            return self._finish(responses)

    def prefetch(self, tenants: Sequence[str]) -> int:
        """Loads tenants into memory ahead of their requests, as far as there is room; beside :meth:`run` too.

        Nothing that queued requests wait for is evicted for it. Frequent tenants and those that come soon are
        worth it; memory is given to those given first.

        Returns:
            How many of them are in memory now.

        Raises:
            UnknownTenantError: no such tenant; nothing is loaded.
            StoreCorruptError: a tenant's file cannot be read; the others are loaded.
            OverloadedError: a tenant is larger than all memory, or a pinned one finds no room.
            EngineClosedError: the engine is closed.
        """
        self._check_open()
        return self._residency.prefetch([self.store.tenants[name] for name in tenants])

    def stats(self) -> EngineStatistics:
        """Counts since the engine started."""
        with self._lock:
            current = EngineStatistics(**vars(self._statistics))
            current.resident_tenants = self._residency.num_resident
            current.resident_bytes = self._residency.arena.used_bytes
            current.plot = asdict(self._runner.plot_statistics)
            current.adapters = asdict(self._residency.statistics)
            host = self._residency.host_statistics
            current.host_adapters = None if host is None else asdict(host)
            current.traffic = asdict(self._traffic.statistics) if self._traffic is not None else None
            current.updates = asdict(self._updater.statistics) if self._updater is not None else None
            return current

    def close(self) -> None:
        """Gives memory back and saves what was counted of traffic; a second call does nothing.

        Updates under way are given up.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.store.catalog.arena_bytes.pop(self, None)
            if self._updater is not None:
                self._updater.close()
            if self._traffic is not None:
                self._traffic.close()
            if self._plots is not None:
                self._plots.close()
            self._residency.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the engine."""
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed; open another one on the store")

    def _warn_of_mismatches(self, queue: list[AdmittedRequest]) -> None:
        """Says once for each tenant that it was trained under another policy, which costs accuracy."""
        if self._plots is None:
            return
        # Under a budget most misses are composed: training for it is training for back-off.
        served = "backoff" if self._miss == "budget" else self._miss
        for tenant in {item.tenant.name: item.tenant for item in queue}.values():
            trained = tenant.card.get("training", {}).get("settings", {}).get("miss", served)
            if trained != served and tenant.name not in self._warned:
                self._warned.add(tenant.name)
                warnings.warn(
                    f"tenant {tenant.name!r} was trained for miss={trained!r} and is served with "
                    f"miss={self._miss!r}; its accuracy may suffer",
                    MissPolicyWarning,
                    stacklevel=3,
                )

    def _run_queue(
        self, queue: list[tuple[int, AdmittedRequest]], responses: list[Response | None], started: float
    ) -> None:
        """Answers what was admitted, batch by batch; memory knows from the start what all of them need."""
        batches = self._batches([item for _, item in queue])
        tenants = [[queue[number][1].tenant for number in batch] for batch in batches]
        waiting = deque(self._residency.expect(tenants))
        try:
            for batch in batches:
                self._answer([queue[number] for number in batch], responses, started)
                self._residency.release(waiting.popleft())
        finally:
            self._residency.release(*waiting)

    def _batches(self, queue: list[AdmittedRequest]) -> list[list[int]]:
        described = [
            QueuedSequence(
                num_tokens=len(item.encoded.input_ids),
                tenant=(item.tenant.id, item.tenant.generation),
                adapter_bytes=AdapterArena.allocated_bytes(item.tenant.bytes // 4),
            )
            for item in queue
        ]
        return list(
            form_batches(
                described,
                max_batch_tokens=self.max_batch_tokens,
                max_adapter_bytes=self._residency.batch_bytes,
            )
        )

    def _answer(
        self,
        batch: list[tuple[int, AdmittedRequest]],
        responses: list[Response | None],
        started: float,
    ) -> None:
        queue_seconds = time.perf_counter() - started
        items = [BatchItem(admitted.tenant, admitted.encoded.input_ids) for _, admitted in batch]
        result = self._runner.run(items)
        timing = Timing(queue_seconds, result.prepare_seconds, result.compute_seconds)
        for (index, admitted), output in zip(batch, result.outputs, strict=True):
            if isinstance(output, HmiError):
                responses[index] = Response.failed(admitted.request, output)
            else:
                responses[index] = respond(admitted, output, timing, self.store.encoder)
        self._statistics.batches += 1
        self._statistics.tokens += sum(len(item.input_ids) for item in items)
        self._statistics.prepare_seconds += result.prepare_seconds
        self._statistics.compute_seconds += result.compute_seconds

    def _finish(self, responses: list[Response | None]) -> list[Response]:
        finished = [response for response in responses if response is not None]
        self._statistics.requests += len(finished)
        self._statistics.errors += sum(response.error is not None for response in finished)
        return finished


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; this release knows {', '.join(map(repr, allowed))}")


def _open_residency(store: Store, device_memory: int | str, host_memory: int | str) -> AdapterResidency:
    host_bytes = parse_bytes(host_memory)
    if device_memory == "auto":  # the CPU computes in host memory
        return AdapterResidency(store.layout, store.catalog, store.general, host_bytes)
    return AdapterResidency(
        store.layout,
        store.catalog,
        store.general,
        parse_bytes(device_memory),
        host_bytes=host_bytes,
    )
