"""Requests that have come and that no thread has taken yet, and the callers who have no answer."""

from __future__ import annotations

import math
import numbers
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from hmi_engine.errors import EngineClosedError, HmiError, InvalidRequestError, OverloadedError
from hmi_engine.request import Request, Response, TextPiece

__all__ = ["Arrival", "Emit", "Inbox", "answer", "fail"]

Emit = Callable[[TextPiece], None]

_LONGEST_TIMEOUT = 1e30  # seconds: no engine runs so long, and an integer can be too large for a float


@dataclass(eq=False)
class Arrival:
    """A request as it came, and who waits for it.

    Attributes:
        request: the request.
        future: of its response.
        arrived: seconds of ``time.perf_counter``, as ``deadline``.
        priority: among requests of its tenant.
        deadline: when it need not be begun any more; None for never.
        emit: takes each piece of a text as it comes; None if nobody wants it.
    """

    request: Request
    future: Future[Response]
    arrived: float
    priority: int
    deadline: float | None
    emit: Emit | None = None


class Inbox:
    """Takes requests from any thread until it refuses, and knows when all that it took are answered.

    It shares its queue's lock, so that what waits here and there is counted together. Tenants take turns
    here too: whoever sends thousands at once would otherwise keep others from the fair queue behind.
    """

    def __init__(
        self,
        lock: threading.Lock,
        *,
        max_requests: int,
        num_queued: Callable[[], int],
        retry_after_seconds: Callable[[], float | None] = lambda: None,
        count_answers: Callable[[int, int], None] = lambda answers, errors: None,
    ) -> None:
        """Nothing has come yet.

        Args:
            lock: the queue's.
            max_requests: that may wait, here and in the queue.
            num_queued: how many wait in the queue; called with the lock held, as are the next two.
            retry_after_seconds: when one that is refused may come again.
            count_answers: told how many requests are answered or cancelled, and how many of them with an
                error, before whoever drains.
        """
        self._lock = lock
        self._max_requests = max_requests
        self._num_queued, self._retry_after_seconds = num_queued, retry_after_seconds
        self._count_answers = count_answers
        self.arrived = threading.Condition(lock)
        self._answered = threading.Condition(lock)
        self._arrivals = OrderedDict[str | None, deque[Arrival]]()  # by tenant, whose turn is next first
        self._num_arrivals = 0
        self._open: set[Arrival] = set()  # all that came and are not answered, wherever they are
        self._is_refusing = False

    def __len__(self) -> int:
        """How many wait here."""
        return self._num_arrivals

    def put(
        self, request: Request, *, priority: int, timeout: float | None, emit: Emit | None = None
    ) -> Future[Response]:
        """Takes a request.

        Raises:
            InvalidRequestError: it is no :class:`Request`, ``priority`` no integer or ``timeout`` no number.
            EngineClosedError: requests are not taken any more.
            OverloadedError: the queue is full.
        """
        if not isinstance(request, Request):
            raise InvalidRequestError(f"a request must be a Request, found {type(request).__name__}")
        if not isinstance(priority, int):
            raise InvalidRequestError(f"priority must be an integer, found {priority!r:.80}")
        now = time.perf_counter()
        arrival = Arrival(request, Future(), now, priority, _deadline(now, timeout), emit)
        with self._lock:
            self._check_open()
            if self._num_arrivals + self._num_queued() >= self._max_requests:
                raise OverloadedError(
                    f"{self._max_requests} requests wait already; send this one again later, or give the "
                    "engine larger queue_limits",
                    retry_after_seconds=self._retry_after_seconds(),
                )
            self._open.add(arrival)
            # What is no name is told so by the thread that admits, and may be no key.
            tenant = request.tenant if isinstance(request.tenant, str) else None
            self._arrivals.setdefault(tenant, deque()).append(arrival)
            self._num_arrivals += 1
            self.arrived.notify()
        arrival.future.add_done_callback(lambda _: self._note_answer(arrival))
        return arrival.future

    def take(self, most: int | None = None) -> list[Arrival]:
        """What has come, the oldest of each tenant in turn, at most so many; with the lock held."""
        taken: list[Arrival] = []
        while self._arrivals and (most is None or len(taken) < most):
            tenant, arrivals = self._arrivals.popitem(last=False)
            taken.append(arrivals.popleft())
            if arrivals:
                self._arrivals[tenant] = arrivals
        self._num_arrivals -= len(taken)
        return taken

    def check_open(self) -> None:
        """Raises EngineClosedError where requests are not taken any more."""
        with self._lock:
            self._check_open()

    def _check_open(self) -> None:
        if self._is_refusing:
            raise EngineClosedError("the engine is closed; open another one on the store")

    def refuse(self) -> None:
        """Takes no requests any more; with the lock held."""
        self._is_refusing = True

    def wait_until_empty(self) -> None:
        """Returns when every request that was taken is answered."""
        with self._lock:
            self._answered.wait_for(lambda: not self._open)

    def abandon(self, error: HmiError) -> None:
        """Refuses what comes and fails whatever came and is not answered; for when no thread serves."""
        with self._lock:
            self._is_refusing = True
            self._arrivals.clear()
            self._num_arrivals = 0
            left = [arrival for arrival in self._open if not arrival.future.done()]
        for arrival in left:
            fail(arrival.future, error)

    def _note_answer(self, arrival: Arrival) -> None:
        with self._lock:
            self._count_answers(1, _is_failed(arrival.future))
            self._open.discard(arrival)
            if not self._open:
                self._answered.notify_all()


def _deadline(now: float, timeout: Any) -> float | None:
    if timeout is None:
        return None
    is_number = isinstance(timeout, numbers.Real)
    if not is_number or not -math.inf <= timeout <= math.inf:
        raise InvalidRequestError(
            f"timeout must be a number of seconds, or None for no limit, found {timeout!r:.80}"
        )
    return now + float(min(max(timeout, 0), _LONGEST_TIMEOUT))  # below 0 it has passed already


def answer(future: Future[Response], response: Response) -> None:
    """Gives the answer, unless the caller has gone."""
    if future.set_running_or_notify_cancel():
        future.set_result(response)


def fail(future: Future[Response], error: HmiError) -> None:
    """Raises ``error`` in whoever waits, unless the caller has gone."""
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def _is_failed(future: Future[Response]) -> bool:
    """Whether who waited got an error, of a future that is done; who has gone got nothing."""
    return not future.cancelled() and (future.exception() is not None or future.result().error is not None)
