"""The engine: requests of many tenants in, responses out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from hmi_engine.errors import EngineClosedError, HmiError
from hmi_engine.generation.batch_run import run_requests
from hmi_engine.generation.core import DecoderCore
from hmi_engine.pipeline.admission import AdmittedRequest
from hmi_engine.pipeline.step import BatchItem
from hmi_engine.request import Request, Response
from hmi_engine.schedule.batching import QueuedSequence, form_batches
from hmi_engine.serving_core import EngineStatistics, ServingCore
from hmi_engine.serving_options import EngineOptions
from hmi_engine.store import Store

__all__ = ["Engine", "EngineStatistics"]


class Engine(AbstractContextManager["Engine"]):
    """Serves a store's tenants, mixed freely in one call; concurrent calls of ``run`` take turns."""

    def __init__(self, store: Store, **options: Any) -> None:
        """Opens an engine over a store, which stays the caller's to close.

        Args:
            store: the tenants' store.
            options: the fields of :class:`~hmi_engine.EngineOptions`.

        Raises:
            TypeError: there is no such option.
            ValueError: an option is none of those that there are, or out of range.
            ReadOnlyStoreError: ``update_domains_every`` needs a store that is open for writing.
            OverloadedError: the pinned tenants take more than the budget.
        """
        self.store = store
        checked = EngineOptions(**options)
        self._core: ServingCore | DecoderCore
        if store.general.is_causal:
            self._core = DecoderCore(store, checked)
        else:
            self._core = ServingCore(store, checked)
        self._lock = threading.Lock()
        self._closed = False

    @property
    def options(self) -> EngineOptions:
        """The options that the engine was opened with."""
        return self._core.options

    def run(self, requests: Sequence[Request]) -> list[Response]:
        """Answers requests, in their order; a request that fails carries its error and harms no other.

        Raises:
            EngineClosedError: the engine is closed.
        """
        with self._lock:
            self._check_open()
            if isinstance(self._core, DecoderCore):
                return run_requests(self._core, requests)
            with self._core.use_backend():
                return self._run(self._core, requests)

    def _run(self, core: ServingCore, requests: Sequence[Request]) -> list[Response]:
        started = time.perf_counter()
        responses: list[Response | None] = [None] * len(requests)
        queue = []
        for index, result in enumerate(core.admit(requests)):
            if isinstance(result, HmiError):
                responses[index] = Response.failed(requests[index], result)
            else:
                queue.append((index, result))
        core.warn_of_mismatches((item.tenant for _, item in queue), stacklevel=3)
        self._run_queue(core, queue, responses, started)
        if core.traffic is not None:
            core.traffic.save_if_due()
        return _finish(core, responses)

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
        return self._core.residency.prefetch([self.store.tenants[name] for name in tenants])

    def stats(self) -> EngineStatistics:
        """Counts since the engine started."""
        with self._lock:
            return self._core.current_statistics()

    def close(self) -> None:
        """Gives memory back and saves what was counted of traffic; a second call does nothing.

        Updates under way are given up.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._core.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the engine."""
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed; open another one on the store")

    def _run_queue(
        self,
        core: ServingCore,
        queue: list[tuple[int, AdmittedRequest]],
        responses: list[Response | None],
        started: float,
    ) -> None:
        """Answers what was admitted, batch by batch; memory knows from the start what all of them need."""
        batches = _batches(core, [item for _, item in queue])
        tenants = [[queue[number][1].tenant for number in batch] for batch in batches]
        waiting = deque(core.residency.expect(tenants))
        results = core.flow.run(_Given([[queue[number][1] for number in batch] for batch in batches]))
        try:
            for batch, result in zip(batches, results, strict=True):
                admitted = [queue[number][1] for number in batch]
                answered = core.respond(admitted, result, [started] * len(admitted))
                for number, response in zip(batch, answered, strict=True):
                    responses[queue[number][0]] = response
                core.residency.release(waiting.popleft())
        finally:
            results.close()
            core.residency.release(*waiting)


def _batches(core: ServingCore, queue: list[AdmittedRequest]) -> list[list[int]]:
    described = [QueuedSequence(*core.describe(item)) for item in queue]
    return list(
        form_batches(
            described,
            max_batch_tokens=core.options.max_batch_tokens,
            max_adapter_bytes=core.residency.batch_bytes,
        )
    )


def _finish(core: ServingCore, responses: list[Response | None]) -> list[Response]:
    finished = [response for response in responses if response is not None]
    core.statistics.count_answers(len(finished), sum(response.error is not None for response in finished))
    return finished


class _Given:
    """Batches that are all known; a source of a flow."""

    def __init__(self, batches: Sequence[Sequence[AdmittedRequest]]) -> None:
        self._batches: Iterator[Sequence[AdmittedRequest]] = iter(batches)

    def next_batch(self, *, wait: bool) -> list[BatchItem] | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        return [BatchItem(admitted.tenant, admitted.encoded.input_ids) for admitted in batch]
