"""For tests of the scheduler: a clock that is set, requests in short, an engine that takes a given time."""

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field

from hmi_engine.errors import OverloadedError
from hmi_engine.schedule.queued_request import QueuedRequest


class Clock:
    """Stands still until it is set."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def request(tenant, tokens=10, *, key=None, adapter_bytes=100, payload=None, priority=0, deadline=None):
    """One that runs through its tenant's only weights."""
    return QueuedRequest(
        tenant=tenant,
        weights_key=tenant if key is None else key,
        num_tokens=tokens,
        adapter_bytes=adapter_bytes,
        payload=payload,
        priority=priority,
        deadline=deadline,
    )


def number_of_segments(batch):
    """How many runs of equal weights there are."""
    keys = [one.weights_key for one in batch]
    return sum(number == 0 or keys[number - 1] != key for number, key in enumerate(keys))


@dataclass
class Engine:
    """A pipeline in which computing one batch follows the other, ``depth`` of them formed at most.

    Weights live in a cache of ``cache_bytes``, the least recently used leave; a batch waits for what it
    lacks, which is fetched while the batches before it are computed.
    """

    scheduler: object
    clock: Clock
    depth: int = 3
    max_tokens: int = 512
    max_adapter_bytes: int = 1 << 40
    max_cold_bytes: int | None = None
    cache_bytes: int = 1 << 40
    seconds_per_batch: float = 0.002
    seconds_per_token: float = 1e-4
    seconds_per_byte: float = 0.0
    batches: list = field(default_factory=list)  # (time formed, requests)
    waits: dict = field(default_factory=dict)  # request -> seconds from arrival to its batch being formed
    refused: list = field(default_factory=list)

    def __post_init__(self):
        self._cache = OrderedDict()
        self._computed_at = 0.0
        self._fetched_at = 0.0
        self._in_flight = []  # (time done, number, requests)

    def run(self, arrivals):
        """``arrivals`` are (seconds, request), sorted; runs until all are served or refused."""
        arrivals = list(arrivals)[::-1]
        while arrivals or self._in_flight or len(self.scheduler):
            while arrivals and arrivals[-1][0] <= self.clock.now:
                self._submit(arrivals.pop()[1])
            while self._in_flight and self._in_flight[0][0] <= self.clock.now:
                self.scheduler.finish(heapq.heappop(self._in_flight)[2])
            if len(self._in_flight) < self.depth and len(self.scheduler):
                self._form()
                continue
            times = [arrivals[-1][0]] if arrivals else []
            times += [self._in_flight[0][0]] if self._in_flight else []
            if times:
                self.clock.now = max(self.clock.now, min(times))

    def _submit(self, one):
        try:
            self.scheduler.submit(one)
        except OverloadedError as error:
            self.refused.append((one, error))

    def _form(self):
        batch = self.scheduler.next_batch(
            max_tokens=self.max_tokens,
            max_adapter_bytes=self.max_adapter_bytes,
            is_resident=self._cache.__contains__,
            max_cold_bytes=self.max_cold_bytes,
        )
        self.batches.append((self.clock.now, batch))
        for one in batch:
            self.waits[one] = self.clock.now - one.arrival
        missing = 0
        for one in batch:
            missing += 0 if one.weights_key in self._cache else one.adapter_bytes
            self._cache[one.weights_key] = one.adapter_bytes
            self._cache.move_to_end(one.weights_key)
        while sum(self._cache.values()) > self.cache_bytes and len(self._cache) > 1:
            self._cache.popitem(last=False)
        self._fetched_at = max(self._fetched_at, self.clock.now) + missing * self.seconds_per_byte
        begin = max(self._computed_at, self.clock.now, self._fetched_at if missing else 0.0)
        tokens = sum(one.num_tokens for one in batch)
        self._computed_at = begin + self.seconds_per_batch + tokens * self.seconds_per_token
        heapq.heappush(self._in_flight, (self._computed_at, len(self.batches), batch))
