"""Which tenants are in memory, as the engine's residency decides it, without anything in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.simulation.machine import Machine
from hmi_engine.memory.eviction import DemandQueue, FrequencyPerByte, Tickets

__all__ = ["Memory", "Tier"]

_Sizes = npt.NDArray[np.int64]


class Tier:
    """Memory of ``capacity`` bytes for tenants by number, of sizes int64 [tenants], without fragments.

    What has users stays; of the others those leave that the engine's policy chooses.
    """

    def __init__(self, capacity: int, sizes: _Sizes) -> None:
        """Empty."""
        self.capacity = capacity
        self.used_bytes = 0
        self.hits = 0
        self.misses = 0
        self.queue = DemandQueue[int](FrequencyPerByte())
        self._sizes = sizes
        self._resident: set[int] = set()
        self._users = Counter[int]()

    def __contains__(self, tenant: int) -> bool:
        """Whether it is here."""
        return tenant in self._resident

    def __len__(self) -> int:
        """How many are here."""
        return len(self._resident)

    def hold(self, tenants: Iterable[int]) -> list[int]:
        """Has distinct tenants in memory until :meth:`release`; returns those that were not.

        Raises:
            ValueError: those in use leave no room.
        """
        wanted = list(tenants)
        for tenant in wanted:
            self.queue.used(tenant, int(self._sizes[tenant]))
            if tenant in self._resident:
                self._users[tenant] += 1
                self.queue.withdraw(tenant)
        missing = [tenant for tenant in wanted if tenant not in self._resident]
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        for tenant in missing:
            if not self._make_room(int(self._sizes[tenant]), spare_needed=False):
                raise ValueError(
                    f"no room for tenant {tenant} of {self._sizes[tenant]} bytes: of {self.capacity} bytes "
                    f"{self.used_bytes} are in use"
                )
            self._bring(tenant)
            self._users[tenant] += 1
        return missing

    def release(self, tenants: Iterable[int]) -> None:
        """Tenants have a user less."""
        for tenant in tenants:
            self._users[tenant] -= 1
            if not self._users[tenant]:
                del self._users[tenant]
                self.queue.offer(tenant)

    def prefetch(self, tenants: Iterable[int]) -> list[int]:
        """Brings in, as far as there is room beside what is needed; returns those that came."""
        came = []
        for tenant in tenants:
            if tenant in self._resident:
                continue
            self.queue.used(tenant, int(self._sizes[tenant]))
            if self._make_room(int(self._sizes[tenant]), spare_needed=True):
                self._bring(tenant)
                self.queue.offer(tenant)
                came.append(tenant)
        return came

    def fill(self, tenants: Iterable[int]) -> None:
        """Puts tenants in until one does not fit; nobody has asked for them yet."""
        for tenant in tenants:
            size = int(self._sizes[tenant])
            if self.used_bytes + size > self.capacity:
                return
            self.queue.used(tenant, size)
            self._bring(tenant)
            self.queue.offer(tenant)

    def _bring(self, tenant: int) -> None:
        self._resident.add(tenant)
        self.used_bytes += int(self._sizes[tenant])

    def _make_room(self, size: int, *, spare_needed: bool) -> bool:
        while self.used_bytes + size > self.capacity:
            victim = self.queue.evict(spare_needed=spare_needed)
            if victim is None:
                return False
            self._resident.remove(victim)
            self.used_bytes -= int(self._sizes[victim])
        return True


class Memory:
    """The arena, and the tier before it if the machine has one."""

    def __init__(self, machine: Machine, sizes: _Sizes) -> None:
        """Empty."""
        self.arena = Tier(machine.arena_bytes, sizes)
        self.host = None if machine.host_bytes is None else Tier(machine.host_bytes, sizes)

    def hold(self, tenants: Sequence[int]) -> tuple[list[int], list[int]]:
        """Holds distinct tenants in the arena: returns those it lacked, and of these those to be read."""
        missing = self.arena.hold(tenants)
        return missing, self._read(missing)

    def prefetch(self, tenants: Sequence[int]) -> tuple[list[int], list[int]]:
        """Brings tenants into the arena as far as there is room; returns as :meth:`hold`."""
        came = self.arena.prefetch(tenants)
        return came, self._read(came)

    def expect(self, tenant: int) -> tuple[Tickets[int], Tickets[int]]:
        """A request for ``tenant`` is queued."""
        return self.arena.queue.expect([tenant]), [] if self.host is None else self.host.queue.expect(
            [tenant]
        )

    def forget(self, tickets: tuple[Tickets[int], Tickets[int]]) -> None:
        """It has run, or will not."""
        self.arena.queue.release(tickets[0])
        if self.host is not None:
            self.host.queue.release(tickets[1])

    @property
    def tiers(self) -> list[Tier]:
        """The arena first."""
        return [self.arena] if self.host is None else [self.arena, self.host]

    def warm_up(self, popular: Sequence[_Sizes], asked: Sequence[int]) -> None:
        """As after long service: the most popular are here, and ``asked`` for were these, in order.

        ``popular`` has for each tier tenants, int64 [n], in order; those that the arena has it leaves out.
        """
        for tier, tenants in zip(self.tiers, popular, strict=True):
            tier.fill(tenant for tenant in tenants.tolist() if tier is self.arena or tenant not in self.arena)
        for tenant in asked:
            self.hold([tenant])
            self.arena.release([tenant])
        for tier in self.tiers:
            tier.hits = tier.misses = 0

    def _read(self, tenants: Sequence[int]) -> list[int]:
        if self.host is None:
            return list(tenants)
        missing = []
        for tenant in tenants:  # one by one: a batch may be larger than the tier
            missing += self.host.hold([tenant])
            self.host.release([tenant])
        return missing
