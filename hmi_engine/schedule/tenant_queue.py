"""What is queued, counted, and what one tenant has queued."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from hmi_engine.lazy_heap import LazyHeap
from hmi_engine.schedule.limits import TenantLimits
from hmi_engine.schedule.queued_request import QueuedRequest

__all__ = ["Amount", "TenantQueue"]

Payload = TypeVar("Payload")


@dataclass(slots=True)
class Amount:
    """How many requests, and of how many tokens together."""

    num_requests: int = 0
    num_tokens: int = 0

    def add(self, request: QueuedRequest[Payload]) -> None:
        """One more."""
        self.num_requests += 1
        self.num_tokens += request.num_tokens

    def subtract(self, request: QueuedRequest[Payload]) -> None:
        """One less."""
        self.num_requests -= 1
        self.num_tokens -= request.num_tokens


class TenantQueue(Generic[Payload]):
    """The queued requests of one tenant, the highest priority first, then the earliest.

    Attributes:
        name: of the tenant.
        limits: as they were when it last submitted.
        queued: how much waits.
        running: how much is in batches.
        passed_over_since: number of the first batch in which its first request was passed over after the
            tenant was last served; None if none was.
    """

    def __init__(self, name: str, limits: TenantLimits) -> None:
        """Nothing is queued."""
        self.name = name
        self.limits = limits
        self.queued = Amount()
        self.running = Amount()
        self.passed_over_since: int | None = None
        self._requests = LazyHeap[QueuedRequest[Payload], float]()

    @property
    def first(self) -> QueuedRequest[Payload]:
        """What is served next; only where something is queued."""
        first = self._requests.first()
        if first is None:
            raise LookupError(f"tenant {self.name!r} has nothing queued")
        return first

    def add(self, request: QueuedRequest[Payload]) -> None:
        """Queues."""
        self._requests.put(request, -request.priority)
        self.queued.add(request)

    def remove(self, request: QueuedRequest[Payload]) -> None:
        """Takes a queued request out, wherever it stands."""
        self._requests.remove(request)
        self.queued.subtract(request)
