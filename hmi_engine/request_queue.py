"""Requests of many callers between their arrival and their answer."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from hmi_engine.errors import DeadlineExceededError, EngineClosedError, HmiError, OverloadedError
from hmi_engine.inbox import Arrival, Inbox, answer, fail
from hmi_engine.memory.residency import BatchTickets
from hmi_engine.memory.tenant_reader import digest_of
from hmi_engine.pipeline.admission import AdmittedRequest
from hmi_engine.pipeline.faults import as_fault
from hmi_engine.pipeline.step import BatchItem, BatchResult
from hmi_engine.request import Request, Response
from hmi_engine.schedule.cost_model import BatchSizer, StageCoefficients, StageCosts, StageWork
from hmi_engine.schedule.limits import QueueLimits, TenantLimits
from hmi_engine.schedule.queued_request import QueuedRequest, RequestState
from hmi_engine.schedule.scheduler import Scheduler
from hmi_engine.schedule.statistics import SchedulerStatistics
from hmi_engine.serving_core import ServingCore
from hmi_engine.waiting_for_work import wait_for_work

__all__ = ["RequestQueue"]

_TENANTS_AHEAD = 32  # about those of one batch

_logger = logging.getLogger("hmi_engine")


@dataclass(eq=False)
class _Waiting:
    """A request that can be computed, and what memory was told of it."""

    arrival: Arrival
    admitted: AdmittedRequest
    tickets: BatchTickets


class _Formed(NamedTuple):
    """A batch on its way, and what it asks of the stages."""

    requests: list[QueuedRequest[_Waiting]]
    compute: StageWork
    fetch: StageWork


class RequestQueue:
    """What arrives, what waits, what runs; a source of a flow. Safe to use from many threads.

    Every future that :meth:`put` returns gets a response or an error, at the latest from :meth:`abandon`.
    """

    def __init__(
        self,
        core: ServingCore,
        *,
        limits: QueueLimits,
        tenant_limits: Callable[[str], TenantLimits],
        latency_target: float | None,
    ) -> None:
        """Nothing waits yet; see :class:`~hmi_engine.AsyncEngine` for the arguments."""
        self._core = core
        self._scheduler = Scheduler[_Waiting](clock=time.perf_counter, queue_limits=limits)
        self._limits_of = tenant_limits
        self._costs = {"compute": StageCosts(), "fetch": StageCosts(driven_by="bytes")}
        self._sizer = BatchSizer(
            self._costs,
            max_batch_tokens=core.options.max_batch_tokens,
            latency_target=latency_target,
        )
        self._lock = threading.Lock()
        self._queued = threading.Condition(self._lock)  # for the thread that computes
        self._inbox = Inbox(
            self._lock,
            max_requests=limits.max_queued_requests,
            num_queued=self._scheduler.__len__,
            retry_after_seconds=self._seconds_of_a_batch,
            count_answers=core.statistics.count_answers,
        )
        self._formed: deque[_Formed] = deque()
        self._fetched = Counter[Hashable]()  # weights of formed batches, by how many of their requests
        self._unanswered: set[QueuedRequest[_Waiting]] = set()  # queued or running; they hold tickets
        self._stopping = False

    def put(self, request: Request, *, priority: int = 0, timeout: float | None = None) -> Future[Response]:
        """Takes a request; raises as :meth:`hmi_engine.inbox.Inbox.put`."""
        return self._inbox.put(request, priority=priority, timeout=timeout)

    def _seconds_of_a_batch(self) -> float | None:
        """In what time a batch leaves the queue, and makes room; None before anything was served."""
        rate = self._scheduler.statistics.tokens_per_second
        return self._core.options.max_batch_tokens / rate if rate else None

    def check_open(self) -> None:
        """Raises EngineClosedError where requests are not taken any more."""
        self._inbox.check_open()

    def statistics(self) -> SchedulerStatistics:
        """What the scheduler did, and what it holds."""
        with self._lock:
            return self._scheduler.statistics

    def costs(self) -> dict[str, StageCoefficients]:
        """Seconds of the stages as fitted to what they took, of those that have run."""
        with self._lock:
            fitted = {stage: costs.coefficients for stage, costs in self._costs.items()}
        return {stage: each for stage, each in fitted.items() if each is not None}

    def refuse(self) -> None:
        """Takes no requests any more."""
        with self._lock:
            self._inbox.refuse()

    def wait_until_empty(self) -> None:
        """Returns when every request that was taken is answered."""
        self._inbox.wait_until_empty()

    def stop(self) -> None:
        """Ends the loops of both threads; what waits stays for :meth:`abandon`."""
        with self._lock:
            self._inbox.refuse()
            self._stopping = True
            self._inbox.arrived.notify_all()
            self._queued.notify_all()

    def abandon(self, reason: str) -> None:
        """Fails whatever is not answered; for when no thread serves any more."""
        with self._lock:
            self._inbox.refuse()
            left, self._unanswered = self._unanswered, set()
        try:
            self._core.residency.release(*(request.payload.tickets for request in left))
        finally:  # whatever is broken, nobody waits for ever
            self._inbox.abandon(EngineClosedError(reason))

    # For the thread that admits.

    def admit_arrivals(self, most: int) -> bool:
        """Waits for requests and queues those that can be served; returns False when there are no more."""
        with self._lock:
            self._inbox.arrived.wait_for(lambda: len(self._inbox) or self._stopping)
            if self._stopping:
                return False
            arrivals = self._inbox.take(most)
        arrivals = [arrival for arrival in arrivals if not arrival.future.cancelled()]
        try:
            results = self._core.admit([arrival.request for arrival in arrivals])
        except Exception as error:
            results = [as_fault(error, "tokenise")] * len(arrivals)
        admitted = []
        for arrival, result in zip(arrivals, results, strict=True):
            if isinstance(result, HmiError):
                answer(arrival.future, Response.failed(arrival.request, result))
            else:
                admitted.append((arrival, result))
        tickets = self._core.residency.expect([[result.tenant] for _, result in admitted])
        for (arrival, result), own_tickets in zip(admitted, tickets, strict=True):
            self._queue(_Waiting(arrival, result, own_tickets))
        return True

    def _queue(self, waiting: _Waiting) -> None:
        """Queues a request; one that cannot be queued is told why, and holds nothing."""
        arrival = waiting.arrival
        try:
            # Where warnings are errors, it is one of this request.
            self._core.warn_of_mismatches([waiting.admitted.tenant], stacklevel=2)
            request = self._queueable(waiting)
            # The operator's own code: it may raise anything, take long, or ask the engine for statistics.
            limits = self._limits_of(request.tenant)
            with self._lock:
                self._scheduler.submit(request, limits)
                self._unanswered.add(request)
                self._queued.notify()
        except OverloadedError as error:
            self._core.residency.release(waiting.tickets)
            fail(arrival.future, error)
        except Exception as error:
            self._core.residency.release(waiting.tickets)
            answer(arrival.future, Response.failed(arrival.request, as_fault(error, "admit")))
        else:
            arrival.future.add_done_callback(lambda future: self._leave(future, request))

    def _queueable(self, waiting: _Waiting) -> QueuedRequest[_Waiting]:
        described = self._core.describe(waiting.admitted)
        return QueuedRequest(
            tenant=waiting.admitted.tenant.name,
            weights_key=described.weights_key,
            num_tokens=described.num_tokens,
            adapter_bytes=described.adapter_bytes,
            payload=waiting,
            priority=waiting.arrival.priority,
            deadline=waiting.arrival.deadline,
        )

    def _leave(self, future: Future[Response], request: QueuedRequest[_Waiting]) -> None:
        """Takes a request out whose caller has gone; what it holds in memory is free at once if it waited."""
        if not future.cancelled():
            return
        with self._lock:
            has_left = request.state is RequestState.QUEUED and request in self._unanswered
            self._scheduler.cancel(request)
            if has_left:
                self._unanswered.remove(request)
        if has_left:
            self._core.residency.release(request.payload.tickets)

    # For the thread that computes.

    def next_batch(self, *, wait: bool) -> list[BatchItem] | None:
        """The next batch of those that wait, fair between tenants; see ``BatchSource``."""
        while True:
            with self._lock:
                if self._stopping:
                    return None
                expired = self._scheduler.expire()
                self._unanswered.difference_update(expired)
                formed = self._form()
                if formed:
                    self._formed.append(self._described(formed))
                    self._fetched.update(each.weights_key for each in formed)
                elif wait and not expired:
                    wait_for_work(self._queued, self._has_work)
            self._answer_expired(expired)
            if formed:
                return [
                    BatchItem(each.payload.admitted.tenant, each.payload.admitted.encoded.input_ids)
                    for each in formed
                ]
            if not wait:
                return None

    def _has_work(self) -> bool:
        """With the lock: whether there is something to compute, or somebody to tell that it is too late."""
        return self._stopping or len(self._scheduler) > 0 or self._scheduler.has_untold

    def _form(self) -> list[QueuedRequest[_Waiting]]:
        """A batch of a size, and with as many weights to fetch, as the measured costs suggest."""
        max_tokens = self._sizer.batch_tokens(self._core.options.pipeline_depth)
        ahead = [batch.compute for batch in self._formed]
        return self._scheduler.next_batch(
            max_tokens=max_tokens,
            max_adapter_bytes=self._core.residency.batch_bytes,
            is_resident=self._is_coming,
            max_cold_bytes=self._sizer.cold_bytes(ahead, batch_tokens=max_tokens),
        )

    def _described(self, formed: list[QueuedRequest[_Waiting]]) -> _Formed:
        """A batch that was just formed, and what it asks of the stages."""
        sizes = {each.weights_key: each.adapter_bytes for each in formed}
        cold = [size for key, size in sizes.items() if not self._is_coming(key)]
        return _Formed(
            formed,
            compute=StageWork(sum(each.num_tokens for each in formed), len(sizes)),
            fetch=StageWork(tenants=len(cold), num_bytes=sum(cold)),
        )

    def look_ahead(self) -> None:
        """Loads tenants of requests that wait and whose turns come first, as far as there is room."""
        with self._lock:
            soon = [request.payload.admitted.tenant for request in self._scheduler.peek(_TENANTS_AHEAD)]
        try:
            self._core.residency.prefetch([info for info in soon if not self._is_coming(digest_of(info))])
        except HmiError as error:
            _logger.debug("not loaded ahead of its request, which will tell why: %s", error)

    def _is_coming(self, digest: Hashable) -> bool:
        """Whether a tenant is in memory, or will be for a batch that was formed."""
        return digest in self._fetched or self._core.residency.is_resident(digest)

    def answer(self, result: BatchResult) -> None:
        """Answers the oldest batch that was formed."""
        with self._lock:
            formed, compute, fetch = self._formed.popleft()
            self._costs["compute"].observe(compute, result.compute_seconds)
            self._costs["fetch"].observe(fetch, result.prepare_seconds)
        waiting = [each.payload for each in formed]
        try:
            responses = self._core.respond(
                [each.admitted for each in waiting], result, [each.arrival.arrived for each in waiting]
            )
        except Exception as error:
            fault = as_fault(error, "respond")
            responses = [Response.failed(each.arrival.request, fault) for each in waiting]
        self._core.residency.release(*(each.tickets for each in waiting))
        with self._lock:
            self._scheduler.finish(formed)
            self._fetched.subtract(each.weights_key for each in formed)
            self._fetched += Counter()  # drops those at zero
            self._unanswered.difference_update(formed)
        for each, response in zip(waiting, responses, strict=True):
            answer(each.arrival.future, response)

    def _answer_expired(self, expired: Sequence[QueuedRequest[_Waiting]]) -> None:
        for waiting in (request.payload for request in expired):
            self._core.residency.release(waiting.tickets)
            error = DeadlineExceededError(
                "the request's timeout passed while it waited; give it more time, or send fewer at a time"
            )
            answer(waiting.arrival.future, Response.failed(waiting.arrival.request, error))
