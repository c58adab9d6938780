"""Batches on their way through the stages: one after another, or several in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, Protocol, TypeVar

import torch

__all__ = ["BatchSource", "Flow", "Stages"]

Batch = TypeVar("Batch")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")
_Batch_co = TypeVar("_Batch_co", covariant=True)
_Batch_contra = TypeVar("_Batch_contra", contravariant=True)
_Result_co = TypeVar("_Result_co", covariant=True)


class BatchSource(Protocol[_Batch_co]):
    """Where batches come from."""

    def next_batch(self, *, wait: bool) -> _Batch_co | None:
        """The next batch; None if there is none now, or with ``wait`` if there will be none any more."""


class Stages(Protocol[_Batch_contra, Prepared, _Result_co]):
    """What is done with a batch. A step answers for its own failures: what it raises ends the flow."""

    is_asynchronous: bool
    """Whether a device goes on computing when ``compute`` has returned."""

    def prepare(self, batch: _Batch_contra, /) -> Prepared:
        """Fetches and searches; what it returns may hold memory, until ``compute`` or ``discard``."""

    def compute(self, prepared: Prepared, /) -> Callable[[], _Result_co]:
        """Runs the model, or has a device run it; to be called once, what it returns waits for the result.

        When that has returned, nothing of what ``prepare`` held is held any more.
        """

    def discard(self, prepared: Prepared, /) -> None:
        """Lets go of what ``prepare`` held, of a batch that is not computed."""


class Flow(Generic[Batch, Prepared, Result]):
    """Runs batches through :class:`Stages`, in order, ``depth`` of them in flight.

    With ``depth`` 1 everything happens in the caller's thread, one batch after another. With more, batches
    are prepared on a thread of the flow while those before them are computed in the caller's: parts and
    results are the same. A batch before which nothing is in flight is prepared in the caller's thread too, as
    there is nothing to do meanwhile.

    A device that computes beside the host gets the next batch, if that is prepared, before the host waits for
    the results of the one before: so it need not stand still while the host reads them.
    """

    def __init__(
        self,
        stages: Stages[Batch, Prepared, Result],
        *,
        depth: int,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        look_ahead: Callable[[], None] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            stages: what is done.
            depth: most batches in flight, at least 1.
            waiting: entered while no batch is computed because the next is being prepared.
            look_ahead: called on the preparing thread when all batches that are there have been prepared, for
                those that will come; it must not raise.
        """
        if depth < 1:
            raise ValueError(f"pipeline_depth is {depth}, must be at least 1")
        self._stages = stages
        self._depth = depth
        self._waiting = waiting
        self._look_ahead = look_ahead
        self._ahead: Future[None] | None = None
        self._preparer: ThreadPoolExecutor | None = None

    def run(self, source: BatchSource[Batch]) -> Generator[Result, None, None]:
        """Yields the results in the order of the batches; who stops early closes the generator.

        The next batch is taken from ``source`` before a result is computed, and never more than ``depth`` are
        between the two.
        """
        in_flight: deque[Future[Prepared]] = deque()
        computing: deque[Callable[[], Result]] = deque()
        current: Future[Prepared] | None = None
        try:
            while True:
                if computing and not self._is_next_ready(in_flight, len(computing)):
                    yield computing.popleft()()
                    if computing:
                        self._fill(in_flight, source, len(computing))
                    continue
                if in_flight:
                    current = in_flight.popleft()
                else:
                    batch = source.next_batch(wait=True)
                    if batch is None:
                        return
                    with self._waiting():
                        current = _done(self._stages.prepare(batch))
                self._fill(in_flight, source, 1 + len(computing))
                self._start_looking_ahead()
                with self._waiting():
                    prepared = current.result()
                computing.append(self._stages.compute(prepared))
                current = None
        finally:
            for result in computing:
                result()
            for flight in (current, *in_flight):
                if flight is not None and not flight.cancel() and flight.exception() is None:
                    self._stages.discard(flight.result())

    def _is_next_ready(self, in_flight: deque[Future[Prepared]], num_computing: int) -> bool:
        """Whether the device can get one more batch at once."""
        return self._stages.is_asynchronous and num_computing == 1 and bool(in_flight) and in_flight[0].done()

    def close(self) -> None:
        """Ends the thread, if there is one; no ``run`` may be going on."""
        if self._preparer is not None:
            self._preparer.shutdown()
            self._preparer = None

    def _fill(self, in_flight: deque[Future[Prepared]], source: BatchSource[Batch], num_others: int) -> None:
        """Starts to prepare batches, as many as with the others make ``depth``."""
        while len(in_flight) + num_others < self._depth:
            batch = source.next_batch(wait=False)
            if batch is None:
                return
            in_flight.append(self._thread().submit(self._stages.prepare, batch))

    def _start_looking_ahead(self) -> None:
        if self._look_ahead is None or self._depth == 1 or (self._ahead and not self._ahead.done()):
            return
        self._ahead = self._thread().submit(self._look_ahead)

    def _thread(self) -> ThreadPoolExecutor:
        if self._preparer is None:
            self._preparer = _one_core_thread()
        return self._preparer


def _done(prepared: Prepared) -> Future[Prepared]:
    future: Future[Prepared] = Future()
    future.set_result(prepared)
    return future


def _one_core_thread() -> ThreadPoolExecutor:
    """A thread whose kernels use one core: a second team would fight that of the computing thread.

    torch keeps the number for each thread, but what a thread sets is also what threads that torch has not
    seen yet begin with; so the caller sets its own again, and the new thread is seen before it sets its own.
    """
    num_threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(1, "hmi-prepare")
    executor.submit(torch.get_num_threads).result()
    executor.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(num_threads)
    return executor
