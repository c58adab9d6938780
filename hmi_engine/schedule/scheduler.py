"""Who goes next: the queue of all tenants' requests, fair by tokens, aware of what is in memory."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from hmi_engine.errors import DeadlineExceededError
from hmi_engine.lazy_heap import LazyHeap
from hmi_engine.schedule.admission import Admission, Situation
from hmi_engine.schedule.fairness import VirtualTokenCounters
from hmi_engine.schedule.limits import NO_LIMITS, QueueLimits, RateLimiter, TenantLimits
from hmi_engine.schedule.open_batch import Obstacle, OpenBatch
from hmi_engine.schedule.queued_request import QueuedRequest, RequestState
from hmi_engine.schedule.serving_rate import ServingRate
from hmi_engine.schedule.statistics import SchedulerStatistics, SchedulerTotals
from hmi_engine.schedule.tenant_queue import Amount, TenantQueue
from hmi_engine.schedule.turns import Turns

__all__ = ["Scheduler"]

Payload = TypeVar("Payload")

_MAX_MISFITS = 32  # tenants too large for what is left of a batch before it is closed
_MAX_COLD_LOOKS = 128  # tenants whose weights are on their way that are looked at again for one batch


class Scheduler(Generic[Payload]):
    """Queues requests and forms batches of them; ``docs/scheduling.md`` tells the rule and proves its bounds.

    For an engine that forms batches while earlier ones are computed: service is charged when a batch is
    formed, and :meth:`finish` comes later. Equal calls at equal times give equal batches.

    Not thread-safe: the caller holds one lock around every call. Bookkeeping only, no tensors, no threads.
    Each call takes logarithmic time for each request that it moves, amortized, in the number of tenants and
    of requests; :meth:`next_batch` besides looks at a bounded number of tenants that it passes over.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        queue_limits: QueueLimits | None = None,
        max_lead_tokens: float = 8192,
        max_passings: int = 8,
    ) -> None:
        """Nothing is queued.

        Args:
            clock: seconds from any origin, never falling.
            queue_limits: what the queue may hold; the default of :class:`QueueLimits` if None.
            max_lead_tokens: a tenant passes one whose turn is earlier, and who does not fit, only while it is
                no more than this many weighted tokens ahead of the tenant with the smallest counter. Larger
                fills batches better, smaller is fairer.
            max_passings: in how many batches a tenant may be passed over before its next request is served.

        Raises:
            ValueError: an option is out of range.
        """
        if not max_lead_tokens >= 0:
            raise ValueError(f"max_lead_tokens is {max_lead_tokens}, must be at least 0")
        if max_passings < 1:
            raise ValueError(f"max_passings is {max_passings}, must be at least 1")
        self._clock = clock
        self._max_lead = max_lead_tokens
        self._max_passings = max_passings
        self._counters = VirtualTokenCounters()
        self._rates = RateLimiter()
        self._serving = ServingRate()
        self._admission = Admission[Payload](queue_limits or QueueLimits(), self._rates)
        self._tenants: dict[str, TenantQueue[Payload]] = {}  # that have something queued or running
        self._turns = Turns[Payload](self._counters)
        self._deadlines = LazyHeap[QueuedRequest[Payload], float]()
        self._expired: list[QueuedRequest[Payload]] = []  # not told of yet
        self._running: set[QueuedRequest[Payload]] = set()
        self._passed_over: deque[tuple[int, TenantQueue[Payload]]] = deque()  # since which batch, who
        self._queued = Amount()
        self._queued_tenants = 0
        self._queued_weight = 0.0
        self._totals = SchedulerTotals()

    def __len__(self) -> int:
        """How many requests are queued."""
        return self._queued.num_requests

    @property
    def queued_tokens(self) -> int:
        """Of all queued requests."""
        return self._queued.num_tokens

    @property
    def has_untold(self) -> bool:
        """Whether requests are too late that :meth:`expire` has not told of: they do not count as queued."""
        return bool(self._expired)

    @property
    def statistics(self) -> SchedulerStatistics:
        """How things stand."""
        return SchedulerStatistics(
            totals=dataclasses.replace(self._totals),
            queued_requests=self._queued.num_requests,
            queued_tokens=self._queued.num_tokens,
            queued_tenants=self._queued_tenants,
            running_requests=len(self._running),
            remembered_counters=len(self._counters),
            tokens_per_second=self._serving.tokens_per_second,
        )

    def submit(self, request: QueuedRequest[Payload], limits: TenantLimits = NO_LIMITS) -> None:
        """Queues ``request``, or refuses it at once; one that was refused may be submitted again.

        ``limits`` are what its tenant may have from now on. A request of any size is accepted if limits
        allow: what is larger than a batch is served alone.

        Raises:
            OverloadedError: the queue's limits or the tenant's would be exceeded; its
                ``retry_after_seconds`` tells when a new attempt is worth while, as far as is known.
            DeadlineExceededError: its deadline has passed.
            ValueError: it was submitted before.
        """
        if request.state is not RequestState.NEW:
            raise ValueError(
                f"a request of tenant {request.tenant!r} is {request.state.value}: submit each request once"
            )
        now = self._clock()
        self._drop_expired(now)
        if _has_passed(request, now):
            self._totals.refused += 1
            raise DeadlineExceededError(
                f"the deadline of a request of tenant {request.tenant!r} passed before it was submitted; "
                f"allow more time"
            )
        tenant = self._tenants.get(request.tenant) or TenantQueue(request.tenant, limits)
        refusal = self._admission.refusal(request, limits, self._situation(tenant, limits), now)
        if refusal is not None:
            self._totals.refused += 1
            raise refusal
        self._rates.take(request.tenant, limits, request.num_tokens, now)
        self._totals.submitted += 1
        request.arrival = now
        self._queue(request, tenant, limits)

    def next_batch(
        self,
        *,
        max_tokens: int,
        max_adapter_bytes: int,
        is_resident: Callable[[Hashable], bool] | None = None,
        max_cold_bytes: int | None = None,
    ) -> list[QueuedRequest[Payload]]:
        """Forms a batch, and charges it; each of its requests must be given to :meth:`finish` later.

        **The rule.** The tenant with the smallest counter of weighted tokens is next, with its request of the
        highest priority, of these the earliest. Priority moves requests inside a tenant only: it is the
        client's to set, and a tenant that calls everything important must not push others away. Between
        tenants the ``weight`` decides, which the operator sets. A tenant whose request does not fit, or whose
        weights are cold where the batch fetches enough already, is passed over: it keeps its counter, so it
        is first next time. Others pass it only while they are within ``max_lead_tokens`` of the smallest
        counter, and in at most ``max_passings`` batches: after these the cold limit does not apply to it, and
        if it does not fit, the batch is closed. If nobody who is resident may be chosen, the tenant with the
        smallest counter is, cold or not: a batch is never empty while anything is queued.

        **The bounds,** in tokens of batches formed; proofs in ``docs/scheduling.md``. B: the most tokens of
        a batch, L: of a request, n: the tenants that have something queued at some time meanwhile, W: their
        weights together, w: the weight of a tenant, D = max_lead_tokens + L / (the smallest w).

        - The weighted service of two tenants that both have something queued all the while differs by at
          most 2 D.
        - A request of a tenant that had nothing queued, and no service within the last D, waits for at most
          (n - 1) L + max_passings * max(B, L) tokens, however much the others send.
        - Any request waits for at most Q + (n - 1) L + W (D + max_lead_tokens + Q / w) tokens, where Q are
          those of its own tenant served before it.

        Args:
            max_tokens: most tokens; only a single larger request passes it, alone.
            max_adapter_bytes: most bytes of different weights; only a single larger request passes it, alone.
            is_resident: whether the weights of a ``weights_key`` are in memory, or will be before this batch
                runs because an earlier one brings them; must not raise. None if all are.
            max_cold_bytes: most bytes of weights to fetch for this batch: what can arrive while the batches
                before it are computed; None for no limit.

        Returns:
            Requests, those of one ``weights_key`` together. Empty only if nothing is queued, which may be
            because the last of it has just become too late: see :attr:`has_untold`.

        Raises:
            ValueError: a budget is out of range.
        """
        if max_tokens < 1 or max_adapter_bytes < 0 or (max_cold_bytes is not None and max_cold_bytes < 0):
            raise ValueError(
                f"a batch of max_tokens={max_tokens}, max_adapter_bytes={max_adapter_bytes}, "
                f"max_cold_bytes={max_cold_bytes} cannot be formed: give at least 1 token, no negative bytes"
            )
        now = self._clock()
        self._drop_expired(now)
        batch = OpenBatch[Payload](
            max_tokens=max_tokens,
            max_adapter_bytes=max_adapter_bytes,
            is_resident=is_resident,
            max_cold_bytes=max_cold_bytes,
        )
        self._look_at_due()
        self._fill(batch)
        if not batch and (tenant := self._turns.pop_cold()) is not None:
            self._take(batch, tenant)
            self._fill(batch)
        if batch:
            self._totals.batches += 1
            self._serving.begin(now)
        return batch.requests()

    def finish(self, requests: Iterable[QueuedRequest[Payload]]) -> None:
        """Requests of a batch have been computed, or have failed: they do not count as running any more.

        Raises:
            ValueError: one of them is not running; then none is taken.
        """
        finished = list(requests)
        if len(self._running.intersection(finished)) < len(finished):
            raise ValueError("requests that are not running were given to finish: give each of a batch once")
        if not finished:
            return
        for request in finished:
            self._running.remove(request)
            tenant = self._tenants[request.tenant]
            tenant.running.subtract(request)
            self._forget_if_absent(tenant)
            if request.state is RequestState.RUNNING:
                request.state = RequestState.DONE
                self._totals.served += 1
        num_tokens = sum(request.num_tokens for request in finished)
        self._totals.served_tokens += num_tokens
        self._serving.end(num_tokens, self._clock(), still_running=bool(self._running))

    def cancel(self, request: QueuedRequest[Payload]) -> bool:
        """Nobody waits for ``request`` any more.

        One that is queued leaves at once. One that is running is marked; it is charged and counts as running
        until :meth:`finish`.

        Returns:
            Whether it was queued or running, and not cancelled before.
        """
        if request.state is RequestState.QUEUED:
            self._withdraw(request, RequestState.CANCELLED, self._clock())
        elif request.state is RequestState.RUNNING:
            request.state = RequestState.CANCELLED
        else:
            return False
        self._totals.cancelled += 1
        return True

    def expire(self) -> list[QueuedRequest[Payload]]:
        """Takes queued requests out whose deadline has passed, and tells of each once, by deadline."""
        self._drop_expired(self._clock())
        expired, self._expired = self._expired, []
        return expired

    def peek(self, limit: int) -> list[QueuedRequest[Payload]]:
        """The next request of each of the ``limit`` tenants whose turns come first, in order.

        What these need is needed soonest: a prefetcher fetches it before their batch is formed.
        """
        self._drop_expired(self._clock())
        return [self._tenants[name].first for name in self._counters.first(limit)]

    def _situation(self, tenant: TenantQueue[Payload], limits: TenantLimits) -> Situation:
        own_weight = tenant.limits.weight if tenant.queued.num_requests else 0.0
        others = max(0.0, self._queued_weight - own_weight)
        return Situation(
            queued=self._queued,
            own_queued=tenant.queued,
            own_running=tenant.running,
            tokens_per_second=self._serving.tokens_per_second,
            own_share=limits.weight / (others + limits.weight),
        )

    def _queue(
        self, request: QueuedRequest[Payload], tenant: TenantQueue[Payload], limits: TenantLimits
    ) -> None:
        request.state = RequestState.QUEUED
        if tenant.queued.num_requests:
            self._queued_weight -= tenant.limits.weight
            is_absent = False
        else:
            self._tenants[tenant.name] = tenant
            self._queued_tenants += 1
            is_absent = True
        tenant.limits = limits
        self._queued_weight += limits.weight
        tenant.add(request)
        self._queued.add(request)
        if request.deadline is not None:
            self._deadlines.put(request, request.deadline)
        if is_absent:
            self._counters.enter(tenant.name)
            self._turns.put(tenant)
        elif tenant.first is request:
            self._turns.look_again(tenant)

    def _look_at_due(self) -> None:
        """Tenants that were passed over often enough may join the next batch, wherever their weights are."""
        while self._passed_over and self._is_due(self._passed_over[0][0]):
            since, tenant = self._passed_over.popleft()
            if tenant.passed_over_since == since:
                self._turns.look_again(tenant)

    def _is_due(self, since: int | None) -> bool:
        return since is not None and self._totals.batches - since >= self._max_passings

    def _fill(self, batch: OpenBatch[Payload]) -> None:
        """Takes tenants in turn until nothing fits, or nobody may be passed over for it."""
        cold: list[TenantQueue[Payload]] = []
        misfits: list[TenantQueue[Payload]] = []
        while not batch.is_full and len(misfits) < _MAX_MISFITS:
            tenant = self._turns.pop(with_cold=len(cold) < _MAX_COLD_LOOKS)
            if tenant is None:
                break
            is_due = self._is_due(tenant.passed_over_since)
            obstacle = batch.obstacle(tenant.first, mind_cold=not is_due)
            if self._is_too_far_ahead(tenant) or (is_due and obstacle is not None):
                self._turns.put(tenant)
                break
            if obstacle is None:
                self._take(batch, tenant)
            else:
                self._pass_over(tenant)
                (cold if obstacle is Obstacle.COLD else misfits).append(tenant)
        for tenant in cold:
            self._turns.put(tenant, cold=True)
        for tenant in misfits:
            self._turns.put(tenant)

    def _is_too_far_ahead(self, tenant: TenantQueue[Payload]) -> bool:
        counter, _ = self._counters.turn(tenant.name)
        return counter - self._counters.floor > self._max_lead

    def _pass_over(self, tenant: TenantQueue[Payload]) -> None:
        self._totals.passed_over += 1
        if tenant.passed_over_since is None:
            tenant.passed_over_since = self._totals.batches
            self._passed_over.append((self._totals.batches, tenant))

    def _take(self, batch: OpenBatch[Payload], tenant: TenantQueue[Payload]) -> None:
        """Moves the first request of ``tenant``, which stands nowhere, into ``batch``, and charges it."""
        request = tenant.first
        batch.add(request)
        request.state = RequestState.RUNNING
        self._running.add(request)
        tenant.running.add(request)
        tenant.passed_over_since = None
        self._counters.charge(tenant.name, request.num_tokens, tenant.limits.weight)
        self._unqueue(request, tenant)
        if tenant.queued.num_requests:
            self._turns.put(tenant)

    def _withdraw(self, request: QueuedRequest[Payload], state: RequestState, now: float) -> None:
        """Takes a queued request out that will not be served."""
        tenant = self._tenants[request.tenant]
        was_first = tenant.first is request
        request.state = state
        self._rates.give_back(tenant.name, tenant.limits, request.num_tokens, now)
        self._unqueue(request, tenant)
        if was_first and tenant.queued.num_requests:
            self._turns.look_again(tenant)
        self._forget_if_absent(tenant)

    def _unqueue(self, request: QueuedRequest[Payload], tenant: TenantQueue[Payload]) -> None:
        tenant.remove(request)
        self._queued.subtract(request)
        self._deadlines.remove(request)
        if not tenant.queued.num_requests:
            tenant.passed_over_since = None
            self._turns.remove(tenant)
            self._counters.leave(tenant.name)
            self._queued_tenants -= 1
            self._queued_weight = self._queued_weight - tenant.limits.weight if self._queued_tenants else 0.0

    def _drop_expired(self, now: float) -> None:
        while (request := self._deadlines.first()) is not None and _has_passed(request, now):
            self._withdraw(request, RequestState.EXPIRED, now)
            self._totals.expired += 1
            self._expired.append(request)

    def _forget_if_absent(self, tenant: TenantQueue[Payload]) -> None:
        if not tenant.queued.num_requests and not tenant.running.num_requests:
            del self._tenants[tenant.name]


def _has_passed(request: QueuedRequest[Payload], now: float) -> bool:
    return request.deadline is not None and request.deadline <= now
