"""The bounds that are promised hold for arrivals, sizes, weights and residency of any kind."""

import collections
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_simulation import Clock, Engine, request

from hmi_engine.schedule.limits import QueueLimits, TenantLimits
from hmi_engine.schedule.scheduler import Scheduler

LARGEST = 40
MAX_TOKENS = 64
UNLIMITED = QueueLimits(10**9, 10**12, None)


class World:
    """Tenants that always have something queued, others that come and go, and weights that are anywhere.

    Remembers for each request what was formed between its arrival and its own batch.
    """

    def __init__(self, seed, *, lead, passings, always_cold=()):
        self.random = random.Random(seed)
        self.busy = [f"busy{number}" for number in range(3)]
        self.passing = [f"passing{number}" for number in range(self.random.choice([2, 12]))]
        self.weights = {
            tenant: self.random.choice([0.5, 1.0, 1.0, 4.0]) for tenant in self.busy + self.passing
        }
        self.always_cold = always_cold
        self.scheduler = Scheduler(
            clock=Clock(),
            queue_limits=UNLIMITED,
            max_lead_tokens=lead,
            max_passings=passings,
        )
        self.served = collections.Counter()  # weighted tokens by tenant
        self.queued = collections.Counter()  # requests by tenant
        self.formed = 0  # tokens
        self.largest = 0
        self.waiting = {}  # request -> (formed before it came, tenants queued since)
        self.waits = []  # (request, tokens formed while it waited, tenants queued meanwhile)
        self.sizes = self.random.choice([(1, LARGEST), (LARGEST - 1, LARGEST), (1, 3)])
        self.mood = self.random.choice(["anywhere", "one is cold", "all cold"])

    def submit(self, tenant, *, tokens=None, watched=False):
        one = request(tenant, tokens or self.random.randint(*self.sizes))
        self.largest = max(self.largest, one.num_tokens)
        self.scheduler.submit(one, TenantLimits(weight=self.weights.get(tenant, 1.0)))
        self.queued[tenant] += 1
        for _, tenants in self.waiting.values():
            tenants.add(tenant)
        if watched:
            self.waiting[one] = (self.formed, {name for name, count in self.queued.items() if count})
        return one

    def top_up(self):
        """No batch can empty the queue of a busy tenant."""
        for tenant in self.busy:
            while self.queued[tenant] <= MAX_TOKENS:
                self.submit(tenant)

    def come_and_go(self):
        for tenant in self.passing:
            if self.random.random() < 0.2:
                self.submit(tenant)

    def is_resident(self, key):
        if key in self.always_cold:
            return False
        if self.mood == "anywhere":
            return self.random.random() < 0.5
        return self.mood == "one is cold" and key != "busy0"

    def next_batch(self):
        batch = self.scheduler.next_batch(
            max_tokens=self.random.randint(1, MAX_TOKENS),
            max_adapter_bytes=self.random.choice([100, 300, 10**6]),
            is_resident=self.is_resident,
            max_cold_bytes=self.random.choice([None, 0, 0, 100, 250]),
        )
        for one in batch:
            self.served[one.tenant] += one.num_tokens / self.weights.get(one.tenant, 1.0)
            self.queued[one.tenant] -= 1
            if one in self.waiting:
                before, tenants = self.waiting.pop(one)
                self.waits.append((one, self.formed - before, tenants))
        self.formed += sum(one.num_tokens for one in batch)
        self.scheduler.finish(batch)


worlds = {
    "seed": st.integers(0, 2**32),
    "lead": st.sampled_from([0, 5, 50, 500]),
    "passings": st.integers(1, 6) | st.just(10**6),
}


@settings(max_examples=150, deadline=None)
@given(**worlds)
def test_service_of_backlogged_tenants_differs_by_no_more_than_the_bound(seed, lead, passings):
    world = World(seed, lead=lead, passings=passings)
    differences = {pair: [0.0] for pair in itertools.combinations(world.busy, 2)}
    world.top_up()
    for _ in range(60):
        world.next_batch()
        world.top_up()
        world.come_and_go()
        for (first, second), seen in differences.items():
            seen.append(world.served[first] - world.served[second])
    bound = 2 * (lead + world.largest / min(world.weights.values()))
    for seen in differences.values():
        assert max(seen) - min(seen) <= bound + 1e-6, "from any moment to any later one"


@settings(max_examples=150, deadline=None)
@given(**worlds)
def test_a_newcomer_waits_for_one_request_of_each_and_a_few_batches(seed, lead, passings):
    newcomers = [f"new{number}" for number in range(20)]
    world = World(seed, lead=lead, passings=passings, always_cold=newcomers)
    for newcomer in newcomers:
        world.top_up()
        for _ in range(world.random.randint(1, 5)):
            world.come_and_go()
            world.next_batch()
            world.top_up()
        world.submit(newcomer, watched=True)
    while world.waiting:
        world.next_batch()
        world.top_up()
        world.come_and_go()
    for one, tokens, tenants in world.waits:
        bound = (len(tenants) - 1) * world.largest + passings * max(MAX_TOKENS, world.largest)
        assert tokens <= bound, one.tenant


@settings(max_examples=30, deadline=None)
@given(**worlds)
def test_any_request_waits_no_longer_than_the_bound(seed, lead, passings):
    world = World(seed, lead=lead, passings=passings)
    world.top_up()
    own = {}
    for _ in range(30):
        world.next_batch()
        world.top_up()
        world.come_and_go()
        tenant = world.random.choice(world.busy + world.passing)
        own_tokens = world.queued[tenant] * world.sizes[1]
        own[world.submit(tenant, watched=True)] = own_tokens
    while world.waiting:
        world.next_batch()
        world.top_up()
        world.come_and_go()
    w_min = min(world.weights.values())
    for one, tokens, tenants in world.waits:
        weight, total = world.weights[one.tenant], sum(world.weights[tenant] for tenant in tenants)
        furthest = lead + world.largest / w_min
        others = total * (furthest + lead + own[one] / weight) + (len(tenants) - 1) * world.largest
        assert tokens <= own[one] + others


def poisson(generator, tenant, per_second, seconds, sizes=(16, 64)):
    now, arrivals = 0.0, []
    while (now := now + generator.expovariate(per_second)) < seconds:
        arrivals.append((now, request(tenant, generator.randint(*sizes))))
    return arrivals


def mixed_load(seed, shares, tokens_per_second, seconds):
    """Arrivals of tenants by their shares of so many tokens a second together, 40 to a request."""
    generator = random.Random(seed)
    arrivals = []
    for tenant, share in shares.items():
        arrivals += poisson(generator, tenant, share * tokens_per_second / 40, seconds)
    return sorted(arrivals, key=lambda arrival: arrival[0])


LIGHT = [f"light{number}" for number in range(99)]
MIXED = {"heavy": 100 / 199, **dict.fromkeys(LIGHT, 1 / 199)}
ALONE = dict.fromkeys(LIGHT, 1 / 99)
CAPACITY = 10_000  # tokens a second of the simulated engine


def run(shares, load, *, seconds=30.0, seed=1, queue_limits=UNLIMITED, **options):
    clock = Clock()
    scheduler = Scheduler(clock=clock, queue_limits=queue_limits)
    engine = Engine(scheduler, clock, seconds_per_batch=0.0, seconds_per_token=1 / CAPACITY, **options)
    engine.run(mixed_load(seed, shares, load * CAPACITY, seconds))
    return engine


def p99(engine):
    waits = sorted(wait for one, wait in engine.waits.items() if one.tenant != "heavy")
    return waits[int(0.99 * len(waits))]


def fifo_waits(arrivals):
    """What everybody would wait in one queue in order of arrival."""
    free_at, waits = 0.0, []
    for time, one in arrivals:
        waits.append(max(0.0, free_at - time))
        free_at = max(free_at, time) + one.num_tokens / CAPACITY
    return waits


def test_a_heavy_tenant_beyond_capacity_does_not_raise_the_waits_of_others():
    """It sends a hundred times what each of 99 others does, together 1.5 times what can be served."""
    engine = run(MIXED, 1.5)
    passed_over, largest, batch = 8, 64, 512
    tokens = 99 * largest + passed_over * batch + engine.depth * batch  # the bound, and what was in flight
    light = [wait for one, wait in engine.waits.items() if one.tenant != "heavy"]
    assert len(light) > 5000
    assert max(light) <= tokens / CAPACITY
    assert max(fifo_waits(mixed_load(1, MIXED, 1.5 * CAPACITY, 30.0))) > 5 * tokens / CAPACITY


@pytest.mark.parametrize("load", [0.5, 0.8, 0.95])
def test_a_heavy_tenant_is_no_worse_than_more_light_ones(load):
    assert p99(run(MIXED, load)) <= 2 * p99(run(ALONE, load))


def test_a_full_queue_refuses_the_heavy_tenant_and_nobody_else():
    engine = run(MIXED, 1.5, queue_limits=QueueLimits(max_queued_requests=400))
    refused = collections.Counter(one.tenant for one, _ in engine.refused)
    assert set(refused) == {"heavy"}
    first, last = engine.batches[0][0], engine.batches[-1][0]
    served = sum(one.num_tokens for _, batch in engine.batches for one in batch)
    assert served / (last - first) >= 0.99 * CAPACITY, "a full queue keeps the engine busy"


def test_cold_tenants_do_not_starve_beside_busy_ones():
    """Each of 300 comes once, its weights nowhere; memory holds those of ten; five always have work."""
    generator = random.Random(3)
    arrivals = [(2.0 + 0.05 * number, request(f"rare{number}", 32)) for number in range(300)]
    for number in range(5):
        arrivals += poisson(generator, f"busy{number}", 80, 20.0)
    clock = Clock()
    scheduler = Scheduler(clock=clock, queue_limits=UNLIMITED)
    engine = Engine(
        scheduler,
        clock,
        max_cold_bytes=100,
        cache_bytes=1000,
        seconds_per_batch=0.0,
        seconds_per_token=1 / CAPACITY,
        seconds_per_byte=1e-4,
    )
    engine.run(sorted(arrivals, key=lambda arrival: arrival[0]))
    rare = {one: wait for one, wait in engine.waits.items() if one.tenant.startswith("rare")}
    assert len(rare) == 300
    number_of = {one: number for number, (_, batch) in enumerate(engine.batches) for one in batch}
    for one in rare:
        came_at = sum(time < one.arrival for time, _ in engine.batches)
        assert number_of[one] - came_at <= 8 + 1 + -(-305 * 64 // 512)
    busiest = max(wait for one, wait in engine.waits.items() if one.tenant.startswith("busy"))
    assert max(rare.values()) < busiest / 2, "though the busy ones are behind by seconds"


def test_equal_calls_give_equal_batches():
    def told():
        engine = run(MIXED, 1.2, seconds=5.0, max_cold_bytes=500, cache_bytes=3000)
        return [(time, [(one.tenant, one.arrival) for one in batch]) for time, batch in engine.batches]

    assert told() == told()


def test_everything_that_was_submitted_is_served_once():
    engine = run(MIXED, 1.2, seconds=10.0, max_cold_bytes=300, cache_bytes=2000, max_adapter_bytes=1500)
    served = [one for _, batch in engine.batches for one in batch]
    expected = mixed_load(1, MIXED, 1.2 * CAPACITY, 10.0)
    assert len(served) == len(set(served)) == len(expected)
    for _, batch in engine.batches:
        keys = {one.weights_key for one in batch}
        assert sum(one.num_tokens for one in batch) <= 512
        assert 100 * len(keys) <= 1500
