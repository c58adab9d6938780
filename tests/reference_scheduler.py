"""The scheduler's rule as it is written down: lists, fractions, nothing forgotten or kept in order."""

import math
from fractions import Fraction


class ReferenceScheduler:
    """Takes the same calls as ``Scheduler``, without limits of admission; requests are any objects."""

    def __init__(self, *, weights, max_lead_tokens, max_passings):
        self.weights = {tenant: Fraction(weight) for tenant, weight in weights.items()}
        self.max_lead_tokens = max_lead_tokens
        self.max_passings = max_passings
        self.queue = []  # in the order of submission
        self.counters = dict.fromkeys(weights, Fraction(0))
        self.set_at = dict.fromkeys(weights, 0)  # at which change the counter got its value
        self.changes = 0
        self.last_to_leave = None
        self.batches = 0
        self.passed_over_since = {}

    def waiting(self):
        return {request.tenant for request in self.queue}

    def floor(self):
        """OSDI 2024, algorithm 2, lines 8 to 14."""
        if self.queue:
            return min(self.counters[tenant] for tenant in self.waiting())
        return self.counters[self.last_to_leave] if self.last_to_leave else Fraction(0)

    def set_counter(self, tenant, value):
        self.changes += 1
        self.counters[tenant] = value
        self.set_at[tenant] = self.changes

    def submit(self, request):
        if request.tenant not in self.waiting():
            self.set_counter(request.tenant, max(self.counters[request.tenant], self.floor()))
        self.queue.append(request)

    def withdraw(self, request):
        self.queue.remove(request)
        if request.tenant not in self.waiting():
            self.last_to_leave = request.tenant
            self.passed_over_since.pop(request.tenant, None)

    def expire(self, now):
        late = [request for request in self.queue if request.deadline is not None and request.deadline <= now]
        late.sort(key=lambda request: request.deadline)
        for request in late:
            self.withdraw(request)
        return late

    def in_turn(self):
        return sorted(self.waiting(), key=lambda tenant: (self.counters[tenant], self.set_at[tenant]))

    def head(self, tenant):
        own = [request for request in self.queue if request.tenant == tenant]
        return max(own, key=lambda request: (request.priority, -self.queue.index(request)))

    def next_batch(self, *, max_tokens, max_adapter_bytes, resident, max_cold_bytes):
        batch = []
        self.fill(batch, max_tokens, max_adapter_bytes, resident, max_cold_bytes)
        if not batch and self.queue:
            self.take(batch, self.in_turn()[0])
            self.fill(batch, max_tokens, max_adapter_bytes, resident, max_cold_bytes)
        self.batches += bool(batch)
        keys = []
        for request in batch:
            if request.weights_key not in keys:
                keys.append(request.weights_key)
        return [request for key in keys for request in batch if request.weights_key == key]

    def take(self, batch, tenant):
        request = self.head(tenant)
        batch.append(request)
        self.passed_over_since.pop(tenant, None)
        self.set_counter(tenant, self.counters[tenant] + request.num_tokens / self.weights[tenant])
        self.withdraw(request)

    def fill(self, batch, max_tokens, max_adapter_bytes, resident, max_cold_bytes):
        aside = set()
        while True:
            candidates = [tenant for tenant in self.in_turn() if tenant not in aside]
            if not candidates or sum(request.num_tokens for request in batch) >= max_tokens:
                return
            tenant = candidates[0]
            if self.counters[tenant] - self.floor() > self.max_lead_tokens:
                return
            request = self.head(tenant)
            is_due = self.batches - self.passed_over_since.get(tenant, math.inf) >= self.max_passings
            taken = {other.weights_key: other.adapter_bytes for other in [request, *batch]}
            is_new = all(other.weights_key != request.weights_key for other in batch)
            cold = sum(size for key, size in taken.items() if resident is not None and key not in resident)
            is_cold = is_new and resident is not None and request.weights_key not in resident
            too_cold = is_cold and not is_due and max_cold_bytes is not None and cold > max_cold_bytes
            tokens = sum(other.num_tokens for other in [request, *batch])
            too_large = bool(batch) and (tokens > max_tokens or sum(taken.values()) > max_adapter_bytes)
            if not too_cold and not too_large:
                self.take(batch, tenant)
            elif is_due:
                return
            else:
                aside.add(tenant)
                self.passed_over_since.setdefault(tenant, self.batches)
