"""Who may join the queue, and when it is worth while to try again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from hmi_engine.errors import OverloadedError
from hmi_engine.schedule.limits import QueueLimits, RateLimiter, TenantLimits
from hmi_engine.schedule.queued_request import QueuedRequest
from hmi_engine.schedule.tenant_queue import Amount

__all__ = ["Admission", "Situation"]

Payload = TypeVar("Payload")


@dataclass(frozen=True, slots=True)
class Situation:
    """How things stand when a request comes.

    Attributes:
        queued: of all tenants.
        own_queued: of the request's tenant.
        own_running: of the request's tenant.
        tokens_per_second: at which all are served together, as measured; None if nothing was yet.
        own_share: of the service, that the tenant has while those queue that do now; above 0, at most 1.
    """

    queued: Amount
    own_queued: Amount
    own_running: Amount
    tokens_per_second: float | None
    own_share: float


class Admission(Generic[Payload]):
    """Decides at once; refuses with the time after which a new attempt is worth while.

    For a full queue this is how long the tokens take to be served that must go first, at the measured rate of
    serving, or at the tenant's share of it where its own must go first. For the rate limit it is exact.
    """

    def __init__(self, limits: QueueLimits, rates: RateLimiter) -> None:
        """For a queue of ``limits``."""
        self._limits = limits
        self._rates = rates

    def refusal(
        self, request: QueuedRequest[Payload], limits: TenantLimits, situation: Situation, now: float
    ) -> OverloadedError | None:
        """Why ``request`` may not join; None if it may."""
        served = situation.tokens_per_second
        own_served = None if served is None else served * situation.own_share
        if (excess := self._queue_excess(request, situation.queued)) is not None:
            return self._refuse(f"the queue is full: {_told(situation.queued)}", _duration(excess, served))
        if (excess := self._share_excess(situation)) is not None:
            return self._refuse(
                f"tenant {request.tenant!r} has {_told(situation.own_queued)} queued, as much as it may "
                f"while others need room",
                _duration(excess, own_served),
            )
        if (excess := _concurrency_excess(limits, situation)) is not None:
            return self._refuse(
                f"tenant {request.tenant!r} has {_told(situation.own_queued)} queued and "
                f"{_told(situation.own_running)} running, its limit (max_concurrent={limits.max_concurrent})",
                _duration(excess, own_served),
            )
        if wait := self._rates.seconds_until(request.tenant, limits, request.num_tokens, now):
            return self._refuse(
                f"tenant {request.tenant!r} sends more than tokens_per_second={limits.tokens_per_second:g}",
                wait,
            )
        return None

    def _queue_excess(self, request: QueuedRequest[Payload], queued: Amount) -> float | None:
        """How many tokens must leave the queue so that there is room for ``request``; None if there is."""
        if not queued.num_requests:
            return None
        requests = queued.num_requests + 1 - self._limits.max_queued_requests
        tokens = queued.num_tokens + request.num_tokens - self._limits.max_queued_tokens
        if requests <= 0 and tokens <= 0:
            return None
        return max(requests * queued.num_tokens / queued.num_requests, tokens)

    def _share_excess(self, situation: Situation) -> float | None:
        """How many of its own tokens must be served before the tenant may queue more; None if it may."""
        share, own = self._limits.tenant_share, situation.own_queued
        if share is None or not own.num_requests:
            return None
        free_requests = self._limits.max_queued_requests - situation.queued.num_requests
        free_tokens = self._limits.max_queued_tokens - situation.queued.num_tokens
        if own.num_requests < share * free_requests and own.num_tokens < share * free_tokens:
            return None
        # Each that goes makes the tenant's part smaller and the free part larger by as much.
        requests = math.floor((own.num_requests - share * free_requests) / (1 + share)) + 1
        tokens = (own.num_tokens - share * free_tokens) / (1 + share)
        return max(requests * own.num_tokens / own.num_requests, tokens)

    @staticmethod
    def _refuse(reason: str, seconds: float | None) -> OverloadedError:
        when = "later" if seconds is None else f"in {seconds:.3g} s"
        return OverloadedError(f"{reason}; try again {when}", retry_after_seconds=seconds)


def _concurrency_excess(limits: TenantLimits, situation: Situation) -> float | None:
    """How many of its own tokens must be served before the tenant may have one more request; None if none."""
    queued, running = situation.own_queued, situation.own_running
    num_requests = queued.num_requests + running.num_requests
    if limits.max_concurrent is None or num_requests < limits.max_concurrent:
        return None
    excess = num_requests + 1 - limits.max_concurrent
    return excess * (queued.num_tokens + running.num_tokens) / num_requests


def _told(amount: Amount) -> str:
    return f"{amount.num_requests} requests of {amount.num_tokens} tokens"


def _duration(num_tokens: float, tokens_per_second: float | None) -> float | None:
    return None if tokens_per_second is None else num_tokens / tokens_per_second
