"""Which engine of several a tenant's requests go to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["AffinityRouter"]

_Numbers = npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.uint64]
_CHUNK = 1 << 16


class AffinityRouter:
    """Sends a tenant to the engine that it hashes to, or, where that has too much to do, to the next.

    Methods: rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
    IEEE/ACM Transactions on Networking 1998): of all engines the one whose hash with the tenant is highest,
    so that one engine more or less moves only its own tenants. Bounded loads (Mirrokni, Thorup and
    Zadimoghaddam, "Consistent hashing with bounded loads", SODA 2018): none gets more than ``balance`` times
    the mean of what all have open; then the one of the next highest hash is asked.
    """

    def __init__(self, num_engines: int, *, balance: float = 1.25, always: int = 0) -> None:
        """Knows nothing of tenants: all follows from hashes.

        Args:
            num_engines: how many there are.
            balance: above 1; how many times the mean load an engine may have.
            always: requests that an engine may have open whatever the mean is, such as a batch's.

        Raises:
            ValueError: an argument is out of range.
        """
        if num_engines < 1 or not balance > 1 or always < 0:
            raise ValueError(
                f"num_engines={num_engines}, balance={balance}, always={always}: there must be an engine, "
                "balance above 1 and always at least 0"
            )
        self.num_engines = num_engines
        self.balance = balance
        self._always = always

    def first_choices(self, tenants: _Numbers) -> _Numbers:
        """The engine that each of the tenants, int64 [n], hashes to, int64 [n]."""
        chunks = [
            self._hashes(tenants[start : start + _CHUNK]).argmax(axis=1)
            for start in range(0, len(tenants), _CHUNK)
        ]
        return np.concatenate([*chunks, np.empty(0, dtype=np.int64)])

    def preferences(self, tenant: int) -> list[int]:
        """All engines in the order in which the tenant is offered to them."""
        hashes = self._hashes(np.array([tenant]))[0]
        return [int(number) for number in np.argsort(hashes)[::-1]]

    def bound(self, total_load: int) -> int:
        """How many requests an engine may have open when there will be ``total_load`` at all engines."""
        return max(self._always, math.ceil(self.balance * total_load / self.num_engines))

    def route(self, tenant: int, first_choice: int, loads: Sequence[int], total_load: int) -> int:
        """The engine for one more request, where ``loads`` are open and ``total_load`` their sum."""
        bound = self.bound(total_load + 1)
        if loads[first_choice] < bound:
            return first_choice
        return next(engine for engine in self.preferences(tenant) if loads[engine] < bound)

    def _hashes(self, tenants: _Numbers) -> _Hashes:
        """uint64 [n, engines]."""
        engines = _mixed(np.arange(1, self.num_engines + 1, dtype=np.uint64))
        return _mixed(_mixed(tenants.astype(np.uint64))[:, None] ^ engines[None, :])


def _mixed(values: _Hashes) -> _Hashes:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    OOPSLA 2014)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
