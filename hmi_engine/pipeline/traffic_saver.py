"""Brings what the traffic of each domain asked for from an engine's memory into the store."""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from hmi_engine.domain_store import DomainStore
from hmi_engine.errors import HmiError, UnknownDomainError
from hmi_engine.knowledge.traffic_file import TrafficCounts
from hmi_engine.memory.traffic import TrafficRecorder

__all__ = ["MOST_WAITING_FILES", "TrafficSaver", "TrafficStatistics"]

MOST_WAITING_FILES = 32
"""Files of one domain's traffic that wait for an update: a store that nobody updates stays bounded."""


@dataclass
class TrafficStatistics:
    """What became of the traffic that an engine counted.

    Attributes:
        saved_tokens: tokens whose n-grams are in the store, where the next update finds them.
        dropped_tokens: tokens whose n-grams were forgotten: their domain is gone, too many files wait for an
            update already, or they could not be written.
        errors: how often they could not be written.
        last_error: why, the last time.
        share_of_time: seconds that counting took, per second.
    """

    saved_tokens: int = 0
    dropped_tokens: int = 0
    errors: int = 0
    last_error: str | None = None
    share_of_time: float = 0.0


class TrafficSaver:
    """Counts in bounded memory and saves now and then, beside the requests, which it never fails.

    Where :data:`MOST_WAITING_FILES` of a domain wait for an update, its counts stay in memory and go on
    growing more exact; at the end they are dropped. Thread-safe.
    """

    def __init__(
        self,
        store: DomainStore,
        *,
        max_bytes: int | str,
        interval_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes no memory for counts yet.

        Args:
            store: open for writing.
            max_bytes: for the counts of all domains together, as ``TrafficRecorder`` has it.
            interval_seconds: time between two savings.
            clock: seconds; another one for tests.

        Raises:
            InvalidSizeError, ValueError: a number is out of its range.
        """
        if interval_seconds < 0:
            raise ValueError(f"traffic_interval is {interval_seconds}, must be at least 0 seconds")
        general = store.general
        self.recorder = TrafficRecorder(
            general.window, max_bytes=max_bytes, is_causal=general.is_causal, spill=self._keep
        )
        self._store = store
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._due = clock() + interval_seconds
        self._thread: threading.Thread | None = None
        self._saving = threading.Lock()
        self._lock = threading.Lock()
        self._statistics = TrafficStatistics()
        self._waiting = self._count_waiting()

    @property
    def statistics(self) -> TrafficStatistics:
        """Counts since the start."""
        share = self.recorder.share_of_time
        with self._lock:
            return replace(self._statistics, share_of_time=share)

    def save_if_due(self) -> None:
        """Saves on another thread if the interval is over: files take milliseconds, which requests have not.

        For the one thread that answers requests.
        """
        if self._clock() < self._due or (self._thread is not None and self._thread.is_alive()):
            return
        self._due = self._clock() + self._interval_seconds
        if self.recorder.domains:
            self._thread = threading.Thread(target=self.save, name="hmi-traffic")
            self._thread.start()

    def save(self) -> None:
        """Saves what was counted since the last time, but for domains of which too many files wait."""
        with self._saving:
            try:
                waiting = self._count_waiting()
                full = {info.name for info in self._store.domains.values() if _is_full(waiting, info.id)}
            except HmiError as error:
                self._note(error, 0)
                return
            with self._lock:
                self._waiting = waiting
            for domain in self.recorder.domains:
                if domain not in full:
                    self._keep(domain, self.recorder.drain(domain))

    def close(self) -> None:
        """Saves the rest, and waits for what is being saved."""
        if self._thread is not None:
            self._thread.join()
        self.save()
        for domain in self.recorder.domains:
            self._drop(self.recorder.drain(domain))

    def _count_waiting(self) -> Counter[int]:
        """By a domain's id, how many files of its traffic wait for an update."""
        return Counter(file.domain_id for file in self._store.catalog.traffic_files())

    def _keep(self, domain: str, counts: TrafficCounts) -> None:
        """Writes a file, if there is something to write and room for it."""
        if not counts.tokens:
            return
        try:
            number = self._store.domains[domain].id
            with self._lock:
                is_full = _is_full(self._waiting, number)
            if is_full:
                self._drop(counts)
                return
            self._store.save_traffic(domain, counts)
        except UnknownDomainError:
            self._drop(counts)  # removed meanwhile: nobody will ask for it again
        except (HmiError, OSError) as error:
            self._note(error, counts.tokens)
        else:
            with self._lock:
                self._waiting[number] += 1
                self._statistics.saved_tokens += counts.tokens

    def _drop(self, counts: TrafficCounts) -> None:
        with self._lock:
            self._statistics.dropped_tokens += counts.tokens

    def _note(self, error: Exception, tokens: int) -> None:
        with self._lock:
            is_first = self._statistics.errors == 0
            self._statistics.errors += 1
            self._statistics.last_error = str(error)
            self._statistics.dropped_tokens += tokens
        if is_first:
            warnings.warn(
                f"traffic cannot be saved, so domains will not learn from it (requests are served): {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def _is_full(waiting: Counter[int], number: int) -> bool:
    return waiting[number] >= MOST_WAITING_FILES
