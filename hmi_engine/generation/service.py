"""Decoders for many callers at once: a thread takes what arrives, steps, and tells the callers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from hmi_engine.errors import DeadlineExceededError, EngineClosedError, HmiError, OverloadedError
from hmi_engine.generation.core import DecoderCore
from hmi_engine.generation.sequence import DecoderSequence
from hmi_engine.inbox import Arrival, Emit, Inbox, answer, fail
from hmi_engine.pipeline.faults import as_fault
from hmi_engine.request import Request, Response
from hmi_engine.schedule.cost_model import StageCoefficients
from hmi_engine.schedule.limits import QueueLimits, TenantLimits
from hmi_engine.schedule.queued_request import QueuedRequest, RequestState
from hmi_engine.schedule.scheduler import Scheduler
from hmi_engine.schedule.statistics import SchedulerStatistics
from hmi_engine.waiting_for_work import wait_for_work

__all__ = ["DecoderService"]

_ADMITTED_AT_ONCE = 256
_ADMITTED_BESIDE_TEXTS = 64  # in one go: the texts under way wait meanwhile

_logger = logging.getLogger("hmi_engine")


class DecoderService:
    """The queue and the thread of an asynchronous engine over a store of decoders.

    Which request begins next is fair between tenants by tokens, those of the prompt and those that may be
    generated (docs/scheduling.md); what has begun gets a part of every step.
    """

    def __init__(
        self,
        core: DecoderCore,
        *,
        limits: QueueLimits,
        tenant_limits: Callable[[str], TenantLimits],
    ) -> None:
        """Starts the thread."""
        self._core = core
        self._scheduler = Scheduler[tuple[Arrival, DecoderSequence]](
            clock=time.perf_counter, queue_limits=limits
        )
        self._limits_of = tenant_limits
        self._lock = threading.Lock()
        self._inbox = Inbox(
            self._lock,
            max_requests=limits.max_queued_requests,
            num_queued=self._scheduler.__len__,
            count_answers=core.statistics.count_answers,
        )
        self._queued: dict[Arrival, QueuedRequest[tuple[Arrival, DecoderSequence]]] = {}
        self._stopping = self._stopped = False
        self._reason = "the engine was closed before the request's turn came"
        self._stop_lock = threading.Lock()
        # A daemon, so that a program that forgets to close the engine ends all the same.
        self._thread = threading.Thread(target=self._run, name="hmi-decode", daemon=True)
        self._thread.start()

    def put(
        self,
        request: Request,
        *,
        priority: int = 0,
        timeout: float | None = None,
        emit: Emit | None = None,
    ) -> Future[Response]:
        """Takes a request; raises as :meth:`hmi_engine.inbox.Inbox.put`.

        ``emit`` is called on the engine's thread with each piece of the text.
        """
        return self._inbox.put(request, priority=priority, timeout=timeout, emit=emit)

    def check_open(self) -> None:
        """Raises EngineClosedError where requests are not taken any more."""
        self._inbox.check_open()

    def statistics(self) -> SchedulerStatistics:
        """What the scheduler did, and what it holds."""
        with self._lock:
            return self._scheduler.statistics

    def costs(self) -> dict[str, StageCoefficients]:
        """Nothing: steps are not sized by what they cost."""
        return {}

    def refuse(self) -> None:
        """Takes no requests any more."""
        with self._lock:
            self._inbox.refuse()

    def wait_until_empty(self) -> None:
        """Returns when every request that was taken is answered."""
        self._inbox.wait_until_empty()

    def stop(self) -> None:
        """Ends the thread after the step under way, fails what is open, closes the core; once is enough."""
        with self._stop_lock:
            if self._stopped:
                return
            self._stopped = True
            with self._lock:
                self._inbox.refuse()
                self._stopping = True
                self._inbox.arrived.notify_all()
            self._thread.join()
            self._core.close()

    def _run(self) -> None:
        try:
            with self._core.use_backend():
                while self._serve():
                    pass
        except BaseException as error:
            _logger.error("the engine stops serving", exc_info=error)
            self._reason = f"the engine stopped after an error of its own: {type(error).__name__}: {error}"
        finally:
            self._abandon()

    def _serve(self) -> bool:
        """One round: admit, and step with those whose turn it is; returns False when it is to stop."""
        if not len(self._core.loop):
            self._core.rest()
        with self._lock:
            if not len(self._core.loop):
                wait_for_work(self._inbox.arrived, self._has_work)
            if self._stopping:
                return False
            arrivals = self._inbox.take(_ADMITTED_BESIDE_TEXTS if len(self._core.loop) else _ADMITTED_AT_ONCE)
        self._admit([arrival for arrival in arrivals if not arrival.future.cancelled()])
        self._tell_expired()
        self._core.loop.step(self._next_sequence)
        return True

    def _has_work(self) -> bool:
        """With the lock: whether there is somebody to admit, to begin with, or to tell of the deadline."""
        return (
            self._stopping or len(self._inbox) > 0 or len(self._scheduler) > 0 or self._scheduler.has_untold
        )

    def _admit(self, arrivals: list[Arrival]) -> None:
        if not arrivals:
            return
        try:
            results = self._core.admit([arrival.request for arrival in arrivals])
        except Exception as error:
            results = [as_fault(error, "tokenise")] * len(arrivals)
        for arrival, result in zip(arrivals, results, strict=True):
            if isinstance(result, HmiError):
                _refuse(arrival, result)
                continue
            try:
                sequence = self._core.sequence(
                    result, partial(answer, arrival.future), arrival.emit, arrived=arrival.arrived
                )
            except Exception as error:
                _refuse(arrival, as_fault(error, "admit"))
            else:
                self._queue(arrival, sequence)

    def _queue(self, arrival: Arrival, sequence: DecoderSequence) -> None:
        """Queues a request; one that cannot be queued is told why, and holds nothing."""
        try:
            queued = _queueable(arrival, sequence)
            # The operator's own code: it may raise anything, take long, or ask the engine for statistics.
            limits = self._limits_of(queued.tenant)
            with self._lock:
                self._scheduler.submit(queued, limits)
                self._queued[arrival] = queued
        except OverloadedError as error:
            self._core.release(sequence)
            fail(arrival.future, error)
        except Exception as error:
            self._core.release(sequence)
            _refuse(arrival, as_fault(error, "admit"))
        else:
            arrival.future.add_done_callback(lambda future: self._leave(future, arrival, sequence))

    def _tell_expired(self) -> None:
        with self._lock:
            expired = self._scheduler.expire()
        for queued in expired:
            arrival, sequence = queued.payload
            self._core.release(sequence)
            error = DeadlineExceededError(
                "the request's timeout passed while it waited; give it more time, or send fewer at a time"
            )
            _refuse(arrival, error)

    def _next_sequence(self) -> DecoderSequence | None:
        """Whose turn it is to begin."""
        with self._lock:
            batch = self._scheduler.next_batch(max_tokens=1, max_adapter_bytes=0)  # never more than one
        return batch[0].payload[1] if batch else None

    def _leave(self, future: Future[Response], arrival: Arrival, sequence: DecoderSequence) -> None:
        """The request is answered, or its caller has gone: then what it holds is free within a step."""
        with self._lock:
            queued = self._queued.pop(arrival, None)
            if queued is None:
                return
            is_waiting = queued.state is RequestState.QUEUED
            if future.cancelled():
                self._scheduler.cancel(queued)
                sequence.is_cancelled = True
            if queued.state in (RequestState.RUNNING, RequestState.CANCELLED) and not is_waiting:
                self._scheduler.finish([queued])
        if future.cancelled() and is_waiting:
            self._core.release(sequence)

    def _abandon(self) -> None:
        error = EngineClosedError(self._reason)
        with self._lock:
            self._inbox.refuse()
            not_begun = (RequestState.QUEUED, RequestState.EXPIRED)
            waiting = [queued for queued in self._queued.values() if queued.state in not_begun]
        try:
            for sequence in self._core.loop.abandon():
                self._core.release(sequence)
                sequence.respond(Response.failed(sequence.request, error))
            for queued in waiting:
                self._core.release(queued.payload[1])
        finally:  # whatever is broken, nobody waits for ever
            self._inbox.abandon(error)


def _refuse(arrival: Arrival, error: HmiError) -> None:
    answer(arrival.future, Response.failed(arrival.request, error))


def _queueable(arrival: Arrival, sequence: DecoderSequence) -> QueuedRequest[tuple[Arrival, DecoderSequence]]:
    most = sequence.num_prompt + (sequence.sampling.max_tokens if sequence.is_generating else 0)
    return QueuedRequest(
        tenant=sequence.tenant.name,
        weights_key=sequence.tenant.name,
        num_tokens=min(most, sequence.most_tokens),  # the model's positions end a text however much is asked
        adapter_bytes=0,
        payload=(arrival, sequence),
        priority=arrival.priority,
        deadline=arrival.deadline,
    )
