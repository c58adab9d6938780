"""The engine for many callers at once: requests are queued, batched fairly, and answered as they are done."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, overload

import hmi_kernels
from hmi_engine.errors import InvalidRequestError
from hmi_engine.frozen_heap import FrozenHeap
from hmi_engine.generation.core import DecoderCore
from hmi_engine.generation.service import DecoderService
from hmi_engine.request import Request, Response, TextPiece
from hmi_engine.request_queue import RequestQueue
from hmi_engine.schedule.limits import QueueLimits, TenantLimits, no_limits
from hmi_engine.schedule.statistics import SchedulerStatistics
from hmi_engine.serving_core import EngineStatistics, ServingCore
from hmi_engine.serving_options import EngineOptions
from hmi_engine.serving_threads import ServingThreads
from hmi_engine.store import Store

__all__ = ["AsyncEngine"]

_STREAMED_AHEAD = 256


class AsyncEngine(AbstractAsyncContextManager["AsyncEngine"]):
    """Serves a store's tenants to any number of tasks and threads.

    Requests wait in one queue, which is fair between tenants by tokens served (docs/scheduling.md). A thread
    of the engine forms batches from it and computes them; another finds tenants and tokenises; a third reads
    adapters and searches n-grams for the batches to come.
    """

    def __init__(
        self,
        store: Store,
        *,
        latency_target: float | None = None,
        queue_limits: QueueLimits | None = None,
        tenant_limits: Callable[[str], TenantLimits] | None = None,
        **options: Any,
    ) -> None:
        """Opens an engine over a store, which stays the caller's to close.

        Args:
            store: the tenants' store.
            latency_target: seconds from a request's arrival to its response, where the queue is short:
                batches are made as small as that needs, by what the stages were seen to take. None for the
                largest batches that ``max_batch_tokens`` lets.
            queue_limits: how much may wait; beyond it requests are refused at once.
            tenant_limits: weight, rate and concurrency of a tenant by its name; the same for all by default.
                Asked for each request, on the thread that admits them: while it thinks, no others are.
            options: the fields of :class:`~hmi_engine.EngineOptions`.

        Raises:
            As :class:`~hmi_engine.Engine`; ValueError for a ``latency_target`` that is not above 0.
        """
        if latency_target is not None and not latency_target > 0:
            raise ValueError(f"latency_target is {latency_target}, must be above 0 seconds")
        self.store = store
        limits, limits_of = queue_limits or QueueLimits(), tenant_limits or no_limits
        checked = EngineOptions(**options)
        self._core: ServingCore | DecoderCore
        self._queue: RequestQueue | DecoderService
        self._threads: ServingThreads | DecoderService
        with ExitStack() as undoing:  # what fails behind the core leaves no memory reserved
            if store.general.is_causal:
                if latency_target is not None:
                    raise ValueError("latency_target is for encoders; decoders have max_step_tokens")
                self._core = DecoderCore(store, checked)
                undoing.callback(self._core.close)
                self._queue = self._threads = DecoderService(
                    self._core, limits=limits, tenant_limits=limits_of
                )
            else:
                self._core = ServingCore(store, checked, self._look_ahead)
                undoing.callback(self._core.close)
                self._queue = RequestQueue(
                    self._core, latency_target=latency_target, limits=limits, tenant_limits=limits_of
                )
                self._threads = ServingThreads(self._core, self._queue)
            undoing.pop_all()
        # A second team of threads, with which weights were loaded, would slow down that which computes.
        hmi_kernels.release_team()
        self._frozen_heap = FrozenHeap()
        atexit.register(self._threads.stop)

    async def submit(self, request: Request, *, priority: int = 0, timeout: float | None = None) -> Response:
        """Answers a request; what is wrong with it is the response's ``error``.

        To cancel the task that waits frees what the request holds, at whatever stage it is.

        Args:
            request: the request.
            priority: among requests of its tenant, higher ones go first.
            timeout: seconds after which it need not be begun: its ``error`` is then a
                :class:`DeadlineExceededError`.

        Raises:
            InvalidRequestError: ``priority`` or ``timeout`` is not a number of its kind.
            OverloadedError: the queue is full, or the tenant is over its limits; ``retry_after_seconds`` says
                when it is worth while to come again.
            EngineClosedError: the engine is closed, or was before the request's turn came.
        """
        return await asyncio.wrap_future(self.submit_nowait(request, priority=priority, timeout=timeout))

    def submit_nowait(
        self, request: Request, *, priority: int = 0, timeout: float | None = None
    ) -> Future[Response]:
        """Queues a request, from any thread; the future is that of :meth:`submit`'s response or error.

        Raises:
            InvalidRequestError: ``priority`` or ``timeout`` is not a number of its kind.
            OverloadedError: the queue is full.
            EngineClosedError: the engine is closed.
        """
        return self._queue.put(request, priority=priority, timeout=timeout)

    @overload
    def stream(self, requests: Request, *, priority: int = 0) -> AsyncIterator[TextPiece | Response]: ...

    @overload
    def stream(
        self,
        requests: Iterable[Request] | AsyncIterable[Request],
        *,
        at_a_time: int = _STREAMED_AHEAD,
        priority: int = 0,
    ) -> AsyncIterator[Response]: ...

    def stream(
        self,
        requests: Request | Iterable[Request] | AsyncIterable[Request],
        *,
        at_a_time: int = _STREAMED_AHEAD,
        priority: int = 0,
    ) -> AsyncIterator[TextPiece | Response] | AsyncIterator[Response]:
        """Yields what is there as soon as it is: of one request its text, of many their responses.

        Of one request to a generation head: each :class:`TextPiece` as it comes, and at last the response.
        Who stops early cancels it, and what it holds is free within a step.

        Of many requests the responses as they are done; see :meth:`stream_responses`.
        """
        if isinstance(requests, Request):
            return self.stream_text(requests, priority=priority)
        return self.stream_responses(requests, at_a_time=at_a_time, priority=priority)

    async def stream_text(
        self, request: Request, *, priority: int = 0
    ) -> AsyncIterator[TextPiece | Response]:
        """Yields the pieces of a text as they come, and at last the response; raises as :meth:`submit`.

        Raises:
            InvalidRequestError: the store's models are encoders.
        """
        if not isinstance(self._queue, DecoderService):
            raise InvalidRequestError(
                f"{self.store.layout.root} is a store of encoders, which generate no text"
            )
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[TextPiece | None] = asyncio.Queue()

        def tell(piece: TextPiece | None) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody listens any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        future = self._queue.put(request, priority=priority, emit=tell)
        future.add_done_callback(lambda _: tell(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield future.result()
        finally:
            future.cancel()

    async def stream_responses(
        self,
        requests: Iterable[Request] | AsyncIterable[Request],
        *,
        at_a_time: int = _STREAMED_AHEAD,
        priority: int = 0,
    ) -> AsyncIterator[Response]:
        """Answers many requests and yields responses as they are done; ``Request.id`` tells whose they are.

        Requests are drawn as responses are taken: at most ``at_a_time`` are in the engine. A source that
        waits, such as for an answer, withholds nobody else's. Whoever stops early cancels those, and ends
        the source if it is an asynchronous generator. Raises as :meth:`submit`, and what the source raises.
        """
        ended: asyncio.Queue[asyncio.Future[Response | None]] = asyncio.Queue()
        places = asyncio.Semaphore(max(1, at_a_time))
        open_tasks: set[asyncio.Future[Response | None]] = set()

        def open_task(task: asyncio.Future[Any]) -> None:
            open_tasks.add(task)
            task.add_done_callback(ended.put_nowait)

        async def send_all() -> None:
            async with aclosing(_as_async(requests)) as source:
                await places.acquire()
                async for request in source:
                    open_task(asyncio.wrap_future(self.submit_nowait(request, priority=priority)))
                    await places.acquire()

        # One task draws all: what a generator began in a task, it may have to end there.
        open_task(asyncio.create_task(send_all()))
        try:
            while open_tasks:
                task = await ended.get()
                open_tasks.remove(task)
                if (response := task.result()) is not None:
                    places.release()
                    yield response
        finally:
            for task in open_tasks:
                task.cancel()
            await asyncio.gather(*open_tasks, return_exceptions=True)

    async def prefetch(self, tenants: Sequence[str]) -> int:
        """Loads tenants ahead of their requests; see :meth:`hmi_engine.Engine.prefetch`."""
        self._queue.check_open()
        infos = [self.store.tenants[name] for name in tenants]
        return await asyncio.to_thread(self._core.residency.prefetch, infos)

    def _look_ahead(self) -> None:
        if isinstance(self._queue, RequestQueue):
            self._queue.look_ahead()

    def stats(self) -> EngineStatistics:
        """Counts since the engine started, and what the stages cost (``costs``)."""
        current = self._core.current_statistics()
        current.costs = {stage: asdict(costs) for stage, costs in self._queue.costs().items()}
        return current

    def queue_stats(self) -> SchedulerStatistics:
        """What waits and what was done with it."""
        return self._queue.statistics()

    async def drain(self) -> None:
        """Takes no requests any more, and returns when all that were taken are answered."""
        self._queue.refuse()
        await asyncio.to_thread(self._queue.wait_until_empty)

    async def close(self, *, finish: bool = True) -> None:
        """Gives memory back; a second call does nothing.

        Args:
            finish: answer what was taken before; else what has not begun fails with
                :class:`EngineClosedError`.
        """
        if finish:
            await self.drain()
        await asyncio.to_thread(self._threads.stop)
        atexit.unregister(self._threads.stop)
        self._frozen_heap.thaw()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the engine; after an error without finishing what waits."""
        await self.close(finish=error is None)


async def _as_async(requests: Iterable[Request] | AsyncIterable[Request]) -> AsyncGenerator[Request, None]:
    if not isinstance(requests, AsyncIterable):
        for request in requests:
            yield request
            await asyncio.sleep(0)  # let who waits have what has come meanwhile
    elif isinstance(requests, AsyncGenerator):
        async with aclosing(requests):
            async for request in requests:
                yield request
    else:
        async for request in requests:
            yield request
