"""Who asks for what and when, drawn before anything is sent; engine and simulation get the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Arrivals", "draw_arrivals", "heavy_popularity", "poisson_times", "zipf_popularity"]

_Floats = npt.NDArray[np.float64]
_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Requests in the order in which they come.

    Attributes:
        tenants: int64 [n], whom each asks for.
        texts: int64 [n], the number of its text.
        due: float64 [n], when it comes, in seconds from the start, never falling.
    """

    tenants: _Numbers
    texts: _Numbers
    due: _Floats

    def __len__(self) -> int:
        """How many requests."""
        return len(self.tenants)


def zipf_popularity(num_tenants: int, exponent: float, seed: int = 0) -> _Floats:
    """Shares of the requests by tenant, float64 [n] of sum 1: the r-th popular in proportion to r**-exponent.

    Which tenant is popular is drawn by ``seed``.
    """
    weights = np.arange(1, num_tenants + 1, dtype=np.float64) ** -exponent
    shares: _Floats = np.random.default_rng(seed).permutation(weights / weights.sum())
    return shares


def heavy_popularity(num_tenants: int, times: float) -> _Floats:
    """Shares of the requests by tenant: the first sends ``times`` as much as each of the others."""
    weights = np.ones(num_tenants)
    weights[0] = times
    return weights / weights.sum()


def poisson_times(rate: float, seconds: float, generator: np.random.Generator) -> _Floats:
    """Times of a Poisson process of ``rate`` a second: a Poisson number of them, uniform and in order."""
    return np.sort(generator.random(generator.poisson(rate * seconds))) * seconds


def draw_arrivals(
    popularity: _Floats,
    num_texts: int,
    rate: float,
    seconds: float,
    seed: int,
) -> Arrivals:
    """Arrivals of a Poisson process; same seed, same arrivals.

    Texts follow each other from one drawn by the seed on, so that none comes twice before all have come.
    """
    generator = np.random.default_rng(seed)
    due = poisson_times(rate, seconds, generator)
    cumulated = np.cumsum(popularity)
    tenants = np.searchsorted(cumulated, generator.random(len(due)) * cumulated[-1], side="right")
    first = int(generator.integers(num_texts))
    texts = (first + np.arange(len(due), dtype=np.int64)) % num_texts
    return Arrivals(tenants.astype(np.int64), texts, due)
