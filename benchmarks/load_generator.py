"""Sends requests to an engine: at their times whatever it does, or so many at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
import numpy.typing as npt

from benchmarks.load_outcomes import Fate, Outcomes
from hmi_engine.async_engine import AsyncEngine
from hmi_engine.errors import DeadlineExceededError, OverloadedError
from hmi_engine.request import Request, Response

__all__ = ["LoadGenerator", "Run"]

LONGEST_WAIT_SECONDS = 120.0
_LEAD_SECONDS = 0.05

_clock = time.perf_counter


@dataclass(frozen=True, eq=False)
class Run:
    """What was sent and what came back.

    Attributes:
        outcomes: of all requests, in seconds from the start.
        lateness: float64 [n], seconds from when a request was due to when it was handed to the engine.
        generator_seconds: processor time of the thread that sent.
        seconds: that it sent for.
    """

    outcomes: Outcomes
    lateness: npt.NDArray[np.float64]
    generator_seconds: float
    seconds: float


class LoadGenerator:
    """Sends from the calling thread; the engine's threads only put what is done into a queue.

    Nothing of an answer is looked at where the engine works, so that the generator takes little of it.
    """

    def __init__(self, engine: AsyncEngine, *, timeout: float | None = None) -> None:
        """Sends nothing yet; ``timeout`` is that of ``AsyncEngine.submit``."""
        self._engine = engine
        self._timeout = timeout
        self._done: SimpleQueue[tuple[int, float, Future[Response]]] = SimpleQueue()
        self._num_open = 0

    def open_loop(self, requests: Sequence[Request], due: npt.NDArray[np.float64]) -> Run:
        """Sends each request when it is due, in seconds from the start, and waits for all answers.

        Latencies count from when a request was due, so that a generator that is late hides nothing.

        Raises:
            TimeoutError: some have no answer two minutes after the last answer.
        """
        outcomes = Outcomes(due)
        lateness = np.zeros(len(due))
        worked = time.thread_time()
        start = _clock() + _LEAD_SECONDS
        for number, (request, at) in enumerate(zip(requests, due.tolist(), strict=True)):
            self._collect(outcomes, start)
            pause = start + at - _clock()
            if pause > 0:
                time.sleep(pause)
            lateness[number] = _clock() - start - at
            self._send(number, request, outcomes, start)
        worked, seconds = time.thread_time() - worked, _clock() - start
        self._wait_for_all(outcomes, start)
        return Run(outcomes, lateness, worked, seconds)

    def closed_loop(self, requests: Sequence[Request], *, concurrency: int, seconds: float) -> Run:
        """Keeps ``concurrency`` requests in the engine for so long; takes them in turn, from the first again.

        A request is due when another one's answer makes room for it.

        Raises:
            TimeoutError: as :meth:`open_loop`.
        """
        due: list[float] = []
        ends: list[tuple[int, Fate, float]] = []
        worked = time.thread_time()
        start = _clock()
        while (now := _clock() - start) < seconds:
            if self._num_open < concurrency:
                due.append(now)
                refused = self._submit(len(due) - 1, requests[(len(due) - 1) % len(requests)])
                if refused:
                    ends.append((len(due) - 1, Fate.REFUSED, now))
            else:
                ends.append(self._take(start))
        worked, taken = time.thread_time() - worked, _clock() - start
        while self._num_open:
            ends.append(self._take(start))
        outcomes = Outcomes(np.array(due))
        for number, fate, at in ends:
            outcomes.end(number, fate, at)
        return Run(outcomes, np.zeros(len(due)), worked, taken)

    def _send(self, number: int, request: Request, outcomes: Outcomes, start: float) -> None:
        if self._submit(number, request):
            outcomes.end(number, Fate.REFUSED, _clock() - start)

    def _submit(self, number: int, request: Request) -> bool:
        """Returns whether it was refused at once."""
        try:
            future = self._engine.submit_nowait(request, timeout=self._timeout)
        except OverloadedError:
            return True
        self._num_open += 1
        future.add_done_callback(lambda done: self._done.put((number, _clock(), done)))
        return False

    def _collect(self, outcomes: Outcomes, start: float) -> None:
        while not self._done.empty():
            outcomes.end(*self._take(start))

    def _wait_for_all(self, outcomes: Outcomes, start: float) -> None:
        while self._num_open:
            outcomes.end(*self._take(start))

    def _take(self, start: float) -> tuple[int, Fate, float]:
        try:
            number, at, future = self._done.get(timeout=LONGEST_WAIT_SECONDS)
        except Empty:
            raise TimeoutError(
                f"{self._num_open} requests have no answer after {LONGEST_WAIT_SECONDS:g} s"
            ) from None
        self._num_open -= 1
        return number, _fate(future), at - start


def _fate(future: Future[Response]) -> Fate:
    failure = future.exception()
    error = failure if failure is not None else future.result().error
    if error is None:
        return Fate.ANSWERED
    if isinstance(error, OverloadedError):
        return Fate.REFUSED
    return Fate.EXPIRED if isinstance(error, DeadlineExceededError) else Fate.FAILED
