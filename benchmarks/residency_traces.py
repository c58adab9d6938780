"""Requests to tenants in the order of their arrival, drawn from laws of popularity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["TRACES", "Trace", "draw_sizes", "draw_trace", "zipf_ranks"]

_Numbers = npt.NDArray[np.int64]
_HIDDEN_SIZE, _UPPER_LAYERS, _FLOAT_BYTES = 384, 3, 4  # MiniLM, K = 3
_RANKS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests: ``tenants`` int64 [n], numbers below len(``sizes``); ``sizes`` in bytes, by tenant."""

    name: str
    tenants: list[int]
    sizes: list[int]


def draw_sizes(num_tenants: int, generator: np.random.Generator) -> list[int]:
    """Bytes of tenants of MiniLM's shape: bottlenecks, LoRA on two linears, and vectors, of all ranks."""
    ranks = generator.choice(_RANKS, num_tenants)
    matrices = _UPPER_LAYERS * 2 * _HIDDEN_SIZE * ranks
    # A bottleneck, LoRA on query and value, IA3's three vectors (two of H, one of 4 H); each with a head.
    elements = np.choose(
        generator.integers(0, 3, num_tenants),
        [matrices, 2 * matrices, np.full(num_tenants, _UPPER_LAYERS * 6 * _HIDDEN_SIZE)],
    )
    return [int(size) for size in (elements + 4 * _HIDDEN_SIZE) * _FLOAT_BYTES]


def zipf_ranks(num_tenants: int, exponent: float, count: int, generator: np.random.Generator) -> _Numbers:
    """Ranks of popularity, 0 the most popular; rank r comes in proportion to 1 / (r + 1) ** exponent."""
    cumulated = np.cumsum(np.arange(1, num_tenants + 1, dtype=np.float64) ** -exponent)
    ranks: _Numbers = np.searchsorted(cumulated, generator.random(count) * cumulated[-1]).astype(np.int64)
    return ranks


def _steady(exponent: float) -> Callable[[int, int, np.random.Generator], _Numbers]:
    def draw(num_tenants: int, count: int, generator: np.random.Generator) -> _Numbers:
        return generator.permutation(num_tenants)[zipf_ranks(num_tenants, exponent, count, generator)]

    return draw


def _drifting(num_tenants: int, count: int, generator: np.random.Generator) -> _Numbers:
    """Zipf(1) where every 20 requests two tenants change places: any one, and one of the popular."""
    order = generator.permutation(num_tenants)
    ranks = zipf_ranks(num_tenants, 1.0, count, generator)
    places = np.stack(
        [generator.integers(0, num_tenants, count), zipf_ranks(num_tenants, 1.0, count, generator)], axis=1
    )
    tenants = np.empty(count, dtype=np.int64)
    for start in range(0, count, 20):
        tenants[start : start + 20] = order[ranks[start : start + 20]]
        order[places[start]] = order[places[start][::-1]]
    return tenants


def _scanned(num_tenants: int, count: int, generator: np.random.Generator) -> _Numbers:
    """Zipf(1), and five times someone asks each tenant once, in order, between every second request."""
    tenants = _steady(1.0)(num_tenants, count, generator)
    for scan in range(5):
        start = (2 * scan + 1) * count // 10
        places = tenants[start : start + 2 * num_tenants : 2]
        places[:] = np.arange(len(places))
    return tenants


TRACES: dict[str, Callable[[int, int, np.random.Generator], _Numbers]] = {
    "zipf_1": _steady(1.0),
    "zipf_0.8": _steady(0.8),
    "uniform": _steady(0.0),
    "drifting_zipf_1": _drifting,
    "zipf_1_and_scans": _scanned,
}


def draw_trace(name: str, num_tenants: int, count: int, seed: int) -> Trace:
    """A trace of ``TRACES``: the same seed gives the same."""
    generator = np.random.default_rng(seed)
    sizes = draw_sizes(num_tenants, generator)
    return Trace(name, TRACES[name](num_tenants, count, generator).tolist(), sizes)
