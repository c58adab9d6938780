"""The threads of an engine that serves many callers at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from hmi_engine.request_queue import RequestQueue
from hmi_engine.serving_core import ServingCore

__all__ = ["ServingThreads"]

_ADMITTED_AT_ONCE = 256

_logger = logging.getLogger(__name__)


class ServingThreads:
    """One thread that admits what arrives, and one that computes, until they are told to stop."""

    def __init__(self, core: ServingCore, queue: RequestQueue) -> None:
        """Starts them."""
        self._core = core
        self._queue = queue
        self._stopping = threading.Lock()
        self._stopped = False
        self._counting = threading.Lock()
        self._num_running = 2
        self._reason = "the engine was closed before the request's turn came"
        # Daemons, so that a program that forgets to close the engine ends all the same.
        self._threads = [
            threading.Thread(target=self._run, args=(self._admit,), name="hmi-admit", daemon=True),
            threading.Thread(target=self._run, args=(self._compute,), name="hmi-compute", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads after the batches that are under way, fails what waits, and closes the core.

        A second call does nothing.
        """
        with self._stopping:
            if self._stopped:
                return
            self._stopped = True
            self._queue.stop()
            for thread in self._threads:
                thread.join()
            self._core.close()

    def _run(self, loop: Callable[[], None]) -> None:
        """Runs one of the threads; the last to end leaves nobody waiting."""
        try:
            loop()
        except BaseException as error:
            _logger.error("the engine stops serving", exc_info=error)
            self._reason = f"the engine stopped after an error of its own: {type(error).__name__}: {error}"
        finally:
            self._queue.stop()  # neither can serve alone
            with self._counting:
                self._num_running -= 1
                is_last = not self._num_running
            if is_last:
                self._queue.abandon(self._reason)

    def _admit(self) -> None:
        while self._queue.admit_arrivals(_ADMITTED_AT_ONCE):
            pass

    def _compute(self) -> None:
        with self._core.use_backend():
            for result in self._core.flow.run(self._queue):
                self._queue.answer(result)
                if self._core.traffic is not None:
                    self._core.traffic.save_if_due()
