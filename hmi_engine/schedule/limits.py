"""What the operator allows: of the queue, and of each tenant."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hmi_engine.lazy_heap import LazyHeap

__all__ = ["NO_LIMITS", "QueueLimits", "RateLimiter", "TenantLimits", "no_limits"]

_ROUNDING = 1e-9  # of a bucket: what its level may lack by rounding alone


@dataclass(frozen=True)
class TenantLimits:
    """What one tenant may have.

    Attributes:
        weight: its share of the service, relative to the other tenants that have something queued.
        tokens_per_second: most tokens it may submit in the long run; None for no limit.
        burst_tokens: most tokens it may submit at once after a pause; None for what it may in one second.
        max_concurrent: most requests it may have queued and running together; None for no limit.

    Raises:
        ValueError: a limit is out of range.
    """

    weight: float = 1.0
    tokens_per_second: float | None = None
    burst_tokens: float | None = None
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        """Checks what was given."""
        _check_positive("weight", self.weight)
        if self.tokens_per_second is not None:
            _check_positive("tokens_per_second", self.tokens_per_second)
        if self.burst_tokens is not None:
            _check_positive("burst_tokens", self.burst_tokens)
            if self.tokens_per_second is None:
                raise ValueError(
                    "burst_tokens means nothing without tokens_per_second: give both, or neither"
                )
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ValueError(
                f"max_concurrent is {self.max_concurrent}, must be at least 1, or None for no limit"
            )


@dataclass(frozen=True)
class QueueLimits:
    """What the queue of all tenants together may hold.

    Attributes:
        max_queued_requests: most requests.
        max_queued_tokens: most tokens. A single larger request is let into an empty queue.
        tenant_share: a tenant that has something queued may add to it only while that is less than this
            many times what is free, in requests and in tokens; None for no such rule. So others find room
            however much one sends: in the long run k tenants that send without end fill k / (k + 1) of the
            queue at 1.0.
            Method: dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for
            shared-memory packet switches", IEEE/ACM Transactions on Networking 1998).

    Raises:
        ValueError: a limit is out of range.
    """

    max_queued_requests: int = 16_384
    max_queued_tokens: int = 4_194_304
    tenant_share: float | None = 1.0

    def __post_init__(self) -> None:
        """Checks what was given."""
        if self.max_queued_requests < 1:
            raise ValueError(f"max_queued_requests is {self.max_queued_requests}, must be at least 1")
        if self.max_queued_tokens < 1:
            raise ValueError(f"max_queued_tokens is {self.max_queued_tokens}, must be at least 1")
        if self.tenant_share is not None:
            _check_positive("tenant_share", self.tenant_share)


class RateLimiter:
    """Token buckets: how many tokens each tenant may submit now.

    A bucket fills at ``tokens_per_second`` up to ``burst_tokens``; a request takes its tokens out. One that
    is larger than the bucket passes when the bucket is full, and leaves it below zero, so the rate holds in
    the long run for requests of every size. Full buckets are forgotten: a new one is full too, so what is
    remembered is bounded by the tenants that sent something within the time a bucket takes to fill. Limits
    may change between calls. Not thread-safe; calls take logarithmic time, amortized.
    """

    def __init__(self) -> None:
        """All buckets are full."""
        self._buckets: dict[str, _Bucket] = {}
        self._full = LazyHeap[str, float]()

    def __len__(self) -> int:
        """How many buckets are remembered."""
        return len(self._buckets)

    def seconds_until(self, tenant: str, limits: TenantLimits, num_tokens: int, now: float) -> float:
        """In how many seconds a request of ``num_tokens`` may pass if no other does before; 0 for now."""
        self._forget(now)
        if limits.tokens_per_second is None:
            return 0.0
        burst = _burst_tokens(limits)
        lacking = min(num_tokens, burst) - self._level(tenant, limits, now)
        return lacking / limits.tokens_per_second if lacking > _ROUNDING * burst else 0.0

    def take(self, tenant: str, limits: TenantLimits, num_tokens: int, now: float) -> None:
        """A request passes: its tokens leave the bucket."""
        if limits.tokens_per_second is None:
            return
        level = self._level(tenant, limits, now) - num_tokens
        full_at = now + (_burst_tokens(limits) - level) / limits.tokens_per_second
        self._buckets[tenant] = _Bucket(level, now, full_at)
        self._full.put(tenant, full_at)

    def give_back(self, tenant: str, limits: TenantLimits, num_tokens: int, now: float) -> None:
        """A request that passed is not served after all: its tokens return to the bucket."""
        if tenant in self._buckets:
            self.take(tenant, limits, -num_tokens, now)

    def _level(self, tenant: str, limits: TenantLimits, now: float) -> float:
        burst, rate = _burst_tokens(limits), limits.tokens_per_second or 0.0
        bucket = self._buckets.get(tenant)
        return burst if bucket is None else min(burst, bucket.level + (now - bucket.since) * rate)

    def _forget(self, now: float) -> None:
        """Drops the buckets that are full by now; see the class."""
        while (tenant := self._full.first()) is not None and self._buckets[tenant].full_at <= now:
            self._full.pop()
            del self._buckets[tenant]


@dataclass(frozen=True, slots=True)
class _Bucket:
    level: float  # tokens
    since: float  # seconds on the scheduler's clock
    full_at: float


def _burst_tokens(limits: TenantLimits) -> float:
    return limits.burst_tokens or limits.tokens_per_second or 0.0


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}, must be a finite number above 0")


NO_LIMITS = TenantLimits()


def no_limits(tenant: str) -> TenantLimits:
    """The limits of any tenant where the operator sets none."""
    return NO_LIMITS
