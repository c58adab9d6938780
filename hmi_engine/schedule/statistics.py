"""What a scheduler tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SchedulerStatistics", "SchedulerTotals"]


@dataclass
class SchedulerTotals:
    """Counted since the scheduler was made.

    Attributes:
        submitted: requests that joined the queue.
        refused: requests that did not.
        served: requests that were finished and not cancelled before.
        cancelled: requests cancelled, while queued or running.
        expired: requests whose deadline passed while they were queued.
        served_tokens: tokens of all requests that were finished, cancelled ones included.
        batches: how many were formed.
        passed_over: how often a tenant whose turn it was did not fit a batch.
    """

    submitted: int = 0
    refused: int = 0
    served: int = 0
    cancelled: int = 0
    expired: int = 0
    served_tokens: int = 0
    batches: int = 0
    passed_over: int = 0


@dataclass(frozen=True)
class SchedulerStatistics:
    """A scheduler at one moment.

    Attributes:
        totals: counted up to now.
        queued_requests: of all tenants.
        queued_tokens: of all tenants.
        queued_tenants: that have something queued.
        running_requests: in batches that were formed and are not finished.
        remembered_counters: of tenants that have something queued, and of those that lately had.
        tokens_per_second: while anything runs, as measured; None before anything was finished.
    """

    totals: SchedulerTotals
    queued_requests: int
    queued_tokens: int
    queued_tenants: int
    running_requests: int
    remembered_counters: int
    tokens_per_second: float | None
