"""Lets domains learn from their traffic while an engine serves it."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import hmi_kernels
from hmi_engine.domain_store import DomainStore, DomainUpdate
from hmi_engine.errors import EngineClosedError, StoreBusyError, UnknownDomainError

__all__ = ["DomainUpdater", "UpdateStatistics"]


@dataclass
class UpdateStatistics:
    """What the updates of an engine did.

    Attributes:
        updates: domains brought up to date, each as often as it was.
        promoted: n-grams that got a row.
        demoted: n-grams that lost theirs.
        traffic_tokens: tokens of traffic that were taken in.
        postponed: updates left to the next time because someone else was changing the domain.
        errors: updates that failed; their traffic waits for the next one.
        last_error: why, the last time.
    """

    updates: int = 0
    promoted: int = 0
    demoted: int = 0
    traffic_tokens: int = 0
    postponed: int = 0
    errors: int = 0
    last_error: str | None = None


class DomainUpdater:
    """A thread that takes in waiting traffic again and again. Requests see each table before or after."""

    def __init__(
        self,
        store: DomainStore,
        *,
        every: float,
        max_share: float,
        flush: Callable[[], None],
    ) -> None:
        """Starts the thread.

        Args:
            store: open for writing; it must stay open until :meth:`close` has returned.
            every: seconds from the end of one round to the beginning of the next.
            max_share: most of its time that the thread works; it sleeps for the rest.
            flush: called before each round, to bring traffic that is still in memory into the store.

        Raises:
            ValueError: a number is out of its range.
        """
        if not every > 0:
            raise ValueError(f"update_domains_every is {every}, must be above 0 seconds")
        if not 0 < max_share <= 1:
            raise ValueError(f"update_share is {max_share}, must be above 0 and at most 1")
        self._store = store
        self._every = every
        self._max_share = max_share
        self._flush = flush
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._statistics = UpdateStatistics()
        self._thread = threading.Thread(target=self._work, name="hmi-domain-updates", daemon=True)
        self._thread.start()

    @property
    def statistics(self) -> UpdateStatistics:
        """Counts since the start."""
        with self._lock:
            return replace(self._statistics)

    def close(self) -> None:
        """Stops the thread and waits for it: at most for a batch of rows, or for files being written.

        An update under way is given up; the store is as before it, and the traffic waits for the next one.
        """
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopped.wait(self._every):
            try:
                self._flush()
                names = self._waiting_domains()
            except Exception as error:  # whatever it is, the thread goes on and the statistics tell
                self._note(error)
                continue
            for name in names:
                if not self._stopped.is_set():
                    self._update(name)
            hmi_kernels.release_team()  # requests are computed on another

    def _waiting_domains(self) -> list[str]:
        waiting = {file.domain_id for file in self._store.catalog.traffic_files()}
        return [info.name for info in self._store.domains.values() if info.id in waiting]

    def _update(self, name: str) -> None:
        # The pauses are made here and not by the store, whose pauses close() could not cut short.
        pace = _Pace(self._stopped, self._max_share)
        try:
            self._count(self._store.update_domain(name, progress=pace))
        except (EngineClosedError, UnknownDomainError):
            pass  # we stop, or the domain was removed meanwhile
        except StoreBusyError:
            with self._lock:
                self._statistics.postponed += 1
        except Exception as error:  # as above
            self._note(error)

    def _count(self, update: DomainUpdate) -> None:
        with self._lock:
            self._statistics.updates += 1
            self._statistics.promoted += update.promoted
            self._statistics.demoted += update.demoted
            self._statistics.traffic_tokens += update.traffic_tokens

    def _note(self, error: Exception) -> None:
        with self._lock:
            is_first = self._statistics.errors == 0
            self._statistics.errors += 1
            self._statistics.last_error = f"{type(error).__name__}: {error}"
        if is_first:
            warnings.warn(
                f"a domain could not learn from its traffic (requests are served): {error}",
                RuntimeWarning,
                stacklevel=2,
            )


class _Pace:
    """Progress that sleeps after each piece of work, and raises EngineClosedError once it is to stop."""

    def __init__(self, stopped: threading.Event, max_share: float) -> None:
        self._stopped = stopped
        self._rest = 1 / max_share - 1
        self._resumed = time.perf_counter()

    def __call__(self, step: str, done: int, total: int | None) -> None:
        worked = time.perf_counter() - self._resumed
        if self._stopped.wait(worked * self._rest):
            raise EngineClosedError(f"the engine was closed while it was {step}")
        self._resumed = time.perf_counter()
