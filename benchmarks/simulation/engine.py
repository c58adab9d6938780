"""An engine as a process in simulated time: it queues, forms batches, prepares ahead, computes, answers."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from benchmarks.load_outcomes import Fate
from benchmarks.simulation.cores import SharedCores
from benchmarks.simulation.machine import Machine
from benchmarks.simulation.memory import Memory
from hmi_engine.errors import DeadlineExceededError, OverloadedError
from hmi_engine.memory.eviction import Tickets
from hmi_engine.schedule.cost_model import BatchSizer, StageCoefficients, StageCosts, StageWork
from hmi_engine.schedule.limits import QueueLimits
from hmi_engine.schedule.queued_request import QueuedRequest
from hmi_engine.schedule.scheduler import Scheduler

__all__ = ["EngineTimes", "SimulatedEngine", "Workload"]

# As hmi_engine/serving_threads.py and hmi_engine/request_queue.py have it.
_ADMITTED_AT_ONCE = 256
_TENANTS_AHEAD = 32

_Numbers = npt.NDArray[np.int64]
_Tickets = tuple[Tickets[int], Tickets[int]]
_Steps = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests by number: ``tenants`` and ``tokens`` int64 [n]; ``sizes`` int64 [tenants], bytes of each."""

    tenants: _Numbers
    tokens: _Numbers
    sizes: _Numbers


@dataclass
class EngineTimes:
    """Seconds of an engine's stages.

    Attributes:
        fetch: waiting for disk and memory, and the work of it.
        search: as in the engine.
        copy: that the link was busy.
        compute: of the model alone.
        respond: as in the engine.
        exposed: that compute waited for fetch, search and copy, or had nothing to do beside them.
        batches: that were computed.
        tokens: of these.
    """

    fetch: float = 0.0
    search: float = 0.0
    copy: float = 0.0
    compute: float = 0.0
    respond: float = 0.0
    exposed: float = 0.0
    batches: int = 0
    tokens: int = 0

    def since(self, before: EngineTimes) -> EngineTimes:
        """What has come since ``before``."""
        return EngineTimes(**{name: value - vars(before)[name] for name, value in vars(self).items()})

    @property
    def hidden_share(self) -> float | None:
        """Of fetch, search and copy, what compute did not wait for; None where there was nothing to hide."""
        work = self.fetch + self.search + self.copy
        return min(1.0, max(0.0, 1 - self.exposed / work)) if work > 0 else None


@dataclass(eq=False)
class _Batch:
    """Requests on their way.

    ``copied`` holds for each layer when its copies are there, and ``arrived`` when those are that were made
    ahead of the batch.
    """

    requests: list[QueuedRequest[_Waiting]]
    tenants: list[int]
    work: StageWork
    copied: list[float] = field(default_factory=list)
    arrived: float = 0.0
    cold: StageWork = field(default_factory=StageWork)
    prepare_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class _Waiting:
    number: int
    tickets: _Tickets


class SimulatedEngine:
    """Does in simulated time what AsyncEngine does: same threads, scheduler, eviction and order of things.

    What it does with each request ends in a call of ``on_end``, once for each.
    """

    def __init__(
        self,
        environment: simpy.Environment,
        machine: Machine,
        workload: Workload,
        on_end: Callable[[int, Fate], None],
        *,
        limits: QueueLimits | None = None,
        timeout: float | None = None,
        is_fair: bool = True,
    ) -> None:
        """Waits for requests.

        Args:
            environment: keeps the time.
            machine: what it runs on.
            workload: the requests, which come by number.
            on_end: called with a request's number and fate when it meets it.
            limits: of the queue.
            timeout: seconds after which a request need not be begun any more.
            is_fair: whether tenants have queues of their own.
        """
        self._environment = environment
        self._machine = machine
        self._workload = workload
        self._on_end = on_end
        self._limits = limits or QueueLimits()
        self._timeout = timeout
        self._is_fair = is_fair
        self.memory = Memory(machine, workload.sizes)
        self.times = EngineTimes()
        self._scheduler = Scheduler[_Waiting](clock=lambda: environment.now, queue_limits=self._limits)
        self._costs = {"compute": StageCosts(), "fetch": StageCosts(driven_by="bytes")}
        self._sizer = BatchSizer(
            self._costs, max_batch_tokens=machine.max_batch_tokens, latency_target=machine.latency_target
        )
        self._generator = np.random.default_rng(0)
        self._cores = SharedCores(environment, machine.cores)
        self._is_computing = False
        self._toll = 0.0  # seconds that the batch which computes has yet to lose
        self._formed: deque[_Batch] = deque()
        self._fetched = Counter[int]()  # tenants of formed batches
        self._inbox: deque[tuple[int, float | None]] = deque()
        self._arrived = environment.event()
        self._queued = environment.event()
        self._preparer = simpy.Resource(environment)  # the thread
        self._loading = simpy.Resource(environment)  # residency loads for one at a time
        self._ahead: simpy.Process | None = None
        self._link_free_at = 0.0
        self._arriving: dict[int, float] = {}  # tenants that were copied ahead, until when
        environment.process(self._admit())
        environment.process(self._compute())

    def arrive(self, number: int) -> None:
        """A request comes."""
        if len(self._inbox) + len(self._scheduler) >= self._limits.max_queued_requests:
            self._on_end(number, Fate.REFUSED)
            return
        deadline = None if self._timeout is None else self._environment.now + self._timeout
        self._inbox.append((number, deadline))
        if not self._arrived.triggered:
            self._arrived.succeed()

    # The thread that admits.

    def _admit(self) -> _Steps:
        while True:
            if not self._inbox:
                self._arrived = self._environment.event()
                yield self._arrived
                if self._is_computing:
                    yield self._environment.timeout(self._machine.admission_delay)
            arrivals = [self._inbox.popleft() for _ in range(min(_ADMITTED_AT_ONCE, len(self._inbox)))]
            tokens = sum(int(self._workload.tokens[number]) for number, _ in arrivals)
            yield self._work(
                self._machine.costs.admit,
                StageWork(tokens, len(arrivals)),
                contention=self._machine.admission_contention,
            )
            for number, deadline in arrivals:
                self._queue(number, deadline)

    def _queue(self, number: int, deadline: float | None) -> None:
        tenant = int(self._workload.tenants[number])
        waiting = _Waiting(number, self.memory.expect(tenant))
        request = QueuedRequest(
            tenant=str(tenant) if self._is_fair else "everybody",
            weights_key=tenant,
            num_tokens=int(self._workload.tokens[number]),
            adapter_bytes=int(self._workload.sizes[tenant]),
            payload=waiting,
            deadline=deadline,
        )
        try:
            self._scheduler.submit(request)
        except (DeadlineExceededError, OverloadedError) as error:
            self.memory.forget(waiting.tickets)
            is_late = isinstance(error, DeadlineExceededError)
            self._on_end(number, Fate.EXPIRED if is_late else Fate.REFUSED)
        else:
            if not self._queued.triggered:
                self._queued.succeed()

    # The thread that computes: hmi_engine/pipeline/flow.py.

    def _compute(self) -> _Steps:
        in_flight: deque[tuple[_Batch, simpy.Event]] = deque()
        while True:
            if in_flight:
                batch, prepared = in_flight.popleft()
            else:
                batch, prepared = (yield from self._next_batch()), None
                began = self._environment.now
                yield from self._prepare(batch)
                self.times.exposed += self._environment.now - began
            while len(in_flight) < self._machine.depth - 1 and (following := self._form()) is not None:
                yield self._work(self._machine.costs.form, following.work)
                in_flight.append((following, self._environment.process(self._prepare_ahead(following))))
            self._start_looking_ahead()
            if prepared is not None:
                began = self._environment.now
                yield prepared
                self.times.exposed += self._environment.now - began
            yield from self._run(batch)
            self._answer(batch)

    def _next_batch(self) -> _Steps:
        while (batch := self._form()) is None:
            self._queued = self._environment.event()
            yield self._queued
        yield self._work(self._machine.costs.form, batch.work)
        return batch

    def _form(self) -> _Batch | None:
        for request in self._scheduler.expire():
            self._leave(request, Fate.EXPIRED)
        max_tokens = self._sizer.batch_tokens(self._machine.depth)
        ahead = [batch.work for batch in self._formed]
        requests = self._scheduler.next_batch(
            max_tokens=max_tokens,
            max_adapter_bytes=self._machine.batch_bytes,
            is_resident=lambda tenant: tenant in self._fetched or tenant in self.memory.arena,
            max_cold_bytes=self._sizer.cold_bytes(ahead, batch_tokens=max_tokens),
        )
        if not requests:
            return None
        tenants = [int(self._workload.tenants[each.payload.number]) for each in requests]
        distinct = list(dict.fromkeys(tenants))
        num_bytes = sum(int(self._workload.sizes[tenant]) for tenant in distinct)
        work = StageWork(sum(each.num_tokens for each in requests), len(distinct), num_bytes)
        batch = _Batch(requests, distinct, work)
        self._formed.append(batch)
        self._fetched.update(distinct)
        return batch

    def _run(self, batch: _Batch) -> _Steps:
        compute, start = self._machine.costs.compute.seconds(batch.work), self._environment.now
        compute *= self._machine.variation.draw(batch.work.tokens, self._generator)
        if self._machine.compute_cores:
            yield from self._compute_on_cores(compute + self._machine.tolls.batch)
            self.times.compute += self._environment.now - start
        else:
            now = self._environment.now
            end = max(now, batch.arrived)
            copied = batch.copied or [end]
            for at in copied:  # a layer waits for its own copies, and for the layer before it
                end = max(end, at) + compute / len(copied)
            yield self._environment.timeout(end - now)
            self.times.compute += compute
            self.times.exposed += end - now - compute
        batch.compute_seconds = self._environment.now - start
        began = self._environment.now
        yield self._work(self._machine.costs.respond, batch.work)
        self.times.respond += self._environment.now - began
        self.times.batches += 1
        self.times.tokens += int(batch.work.tokens)

    def _compute_on_cores(self, seconds: float) -> _Steps:
        """Computes, and then for as long as was lost meanwhile; more may be lost in that time."""
        self._is_computing = True
        while seconds > 0:
            yield self._cores.work(seconds, self._machine.compute_cores)
            seconds, self._toll = self._toll, 0.0
        self._is_computing = False

    def _interrupt(self, seconds: float) -> None:
        """Whatever computes now loses these seconds."""
        if self._is_computing:
            self._toll += seconds

    def _answer(self, batch: _Batch) -> None:
        self._formed.remove(batch)
        self._fetched.subtract(batch.tenants)
        self._fetched += Counter()  # drops those at zero
        if self._machine.latency_target is not None:
            work = StageWork(batch.work.tokens, batch.work.tenants)
            self._costs["compute"].observe(work, batch.compute_seconds)
            self._costs["fetch"].observe(batch.cold, batch.prepare_seconds)
        self.memory.arena.release(batch.tenants)
        self._scheduler.finish(batch.requests)
        for request in batch.requests:
            self._leave(request, Fate.ANSWERED)

    def _leave(self, request: QueuedRequest[_Waiting], fate: Fate) -> None:
        self.memory.forget(request.payload.tickets)
        self._on_end(request.payload.number, fate)

    # The thread that prepares: hmi_engine/pipeline/step.py.

    def _prepare_ahead(self, batch: _Batch) -> _Steps:
        with self._preparer.request() as turn:
            yield turn
            yield from self._prepare(batch)

    def _prepare(self, batch: _Batch) -> _Steps:
        start = began = self._environment.now
        with self._loading.request() as turn:
            yield turn
            missing, read = self.memory.hold(batch.tenants)
            batch.arrived = max((self._arriving.get(tenant, 0.0) for tenant in batch.tenants), default=0.0)
            batch.cold = StageWork(0, len(missing), self._bytes_of(missing))
            batch.copied = yield from self._fetch(missing, read)
        self.times.fetch += self._environment.now - began
        began = self._environment.now
        yield self._work(self._machine.costs.search, batch.work, contention=self._machine.contention)
        self.times.search += self._environment.now - began
        batch.prepare_seconds = self._environment.now - start

    def _fetch(self, missing: Sequence[int], read: Sequence[int]) -> _Steps:
        """Returns when the copies for each layer will be there, if any have to be made."""
        num_bytes = self._bytes_of(missing)
        fetching = StageWork(0, len(missing), num_bytes)
        yield self._work(self._machine.costs.fetch, fetching, contention=self._machine.contention)
        self._interrupt(self._machine.tolls.tenant * len(read))
        if read:
            yield self._environment.timeout(self._machine.disk.seconds(self._workload.sizes[read].tolist()))
        if not missing or self._machine.link is None:
            return []
        layers = self._machine.upper_layers
        seconds = self._machine.link.seconds(len(missing) * layers, num_bytes)
        start = max(self._environment.now, self._link_free_at)
        self._link_free_at = start + seconds
        self.times.copy += seconds
        return [start + seconds * (layer + 1) / layers for layer in range(layers)]

    def _bytes_of(self, tenants: Sequence[int]) -> int:
        return int(self._workload.sizes[list(tenants)].sum()) if tenants else 0

    def _start_looking_ahead(self) -> None:
        is_busy = self._ahead is not None and self._ahead.is_alive
        if self._machine.looks_ahead and self._machine.depth > 1 and not is_busy:
            self._ahead = self._environment.process(self._look_ahead())

    def _look_ahead(self) -> _Steps:
        with self._preparer.request() as turn:
            yield turn
            soon = [each.payload.number for each in self._scheduler.peek(_TENANTS_AHEAD)]
            with self._loading.request() as loading:
                yield loading
                distinct = dict.fromkeys(int(self._workload.tenants[number]) for number in soon)
                came, read = self.memory.prefetch(list(distinct))
                copied = yield from self._fetch(came, read)
        now = self._environment.now
        self._arriving = {key: at for key, at in self._arriving.items() if at > now}
        if copied:
            self._arriving.update(dict.fromkeys(came, copied[-1]))

    def _work(
        self, cost: StageCoefficients, work: StageWork, *, contention: float | None = None
    ) -> simpy.Event:
        return self._cores.work(cost.seconds(work), contention=contention)
