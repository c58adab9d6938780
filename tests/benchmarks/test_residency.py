"""The residency benchmark's policies and simulations against naive ones, and a whole run of small sizes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import residency
from benchmarks.report import render
from benchmarks.residency_policies import (
    Belady,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    S3Fifo,
    WTinyLfu,
)
from benchmarks.residency_simulation import (
    FirstFit,
    QueueKnown,
    in_bytes,
    in_granules,
    simulate,
    simulate_arena,
)
from benchmarks.residency_traces import TRACES, Trace, draw_trace
from benchmarks.result import read_results
from hmi_engine.memory.eviction import FrequencyPerByte
from hmi_engine.memory.ranges import RangeAllocator


def draw(seed: int, *, num_tenants: int = 12, count: int = 400, equal: bool = False) -> Trace:
    generator = np.random.default_rng(seed)
    tenants = np.minimum(generator.zipf(1.4, count) - 1, num_tenants - 1).tolist()
    sizes = [4096 if equal else int(4096 * size) for size in generator.integers(1, 6, num_tenants)]
    return Trace("drawn", tenants, sizes)


def naive(trace: Trace, capacity: int, worst) -> int:
    """Misses of a memory that evicts ``worst(resident, time)`` of its tenants, in the order of loading."""
    resident: list[int] = []
    misses = 0
    for time, key in enumerate(trace.tenants):
        if key in resident:
            continue
        misses += 1
        while sum(trace.sizes[each] for each in resident) + trace.sizes[key] > capacity:
            resident.remove(worst(resident, time))
        resident.append(key)
    return misses


@pytest.mark.parametrize("seed", range(6))
def test_lru_lfu_and_belady_are_what_they_say(seed: int) -> None:
    trace, capacity = draw(seed), 6 * 4096
    past = trace.tenants

    def last_use(key: int, time: int) -> int:
        return max(place for place in range(time) if past[place] == key)

    def next_use(key: int, time: int) -> int:
        return next((place for place in range(time + 1, len(past)) if past[place] == key), 1 << 60)

    expected = {
        LeastRecentlyUsed: lambda resident, time: min(resident, key=lambda key: last_use(key, time)),
        LeastFrequentlyUsed: lambda resident, time: min(
            resident, key=lambda key: (past[:time].count(key), last_use(key, time))
        ),
    }
    for policy, worst in expected.items():
        assert simulate(trace, policy(), capacity).misses == naive(trace, capacity, worst)
    equal = draw(seed, equal=True)
    past = equal.tenants
    outcome = simulate(equal, Belady(equal.tenants), 4 * 4096)
    assert outcome.misses == naive(
        equal, 4 * 4096, lambda resident, time: max(resident, key=lambda key: next_use(key, time))
    )


@pytest.mark.parametrize("seed", range(4))
def test_nobody_beats_belady_where_all_are_equal(seed: int) -> None:
    trace = draw(seed, equal=True, num_tenants=40, count=1500)
    for places in (3, 8, 20):
        capacity = places * 4096
        best = simulate(trace, Belady(trace.tenants), capacity).misses
        policies = [
            LeastRecentlyUsed(),
            LeastFrequentlyUsed(),
            S3Fifo(capacity),
            WTinyLfu(capacity),
            FrequencyPerByte(),
            *(QueueKnown(trace.tenants, length) for length in (1, 8, 100)),
        ]
        assert all(simulate(trace, policy, capacity).misses >= best for policy in policies)
        assert simulate(trace, QueueKnown(trace.tenants, len(trace.tenants)), capacity).misses == best


def test_everything_in_memory_misses_once() -> None:
    trace = draw(3)
    total = sum(trace.sizes)
    distinct = set(trace.tenants)
    for name, make in residency._policies(trace, total).items():
        outcome = simulate(trace, make(), total)
        assert outcome.misses == len(distinct), name
        assert outcome.bytes_read == sum(trace.sizes[key] for key in distinct)
    with pytest.raises(ValueError, match="larger than the memory"):
        simulate(trace, LeastRecentlyUsed(), 1)


@pytest.mark.parametrize("most_moved", [0.0, 0.5, math.inf])
@pytest.mark.parametrize("allocator", [FirstFit, RangeAllocator])
def test_an_arena_wastes_what_does_not_fit(allocator: type[RangeAllocator], most_moved: float) -> None:
    trace = draw(5, num_tenants=60, count=3000)
    granules = 40
    ideal = simulate(trace, FrequencyPerByte(), in_bytes(granules))
    found = simulate_arena(trace, FrequencyPerByte(), allocator(granules), most_moved=most_moved)
    assert in_granules(4100) == 2 and in_bytes(2) == 8192
    assert found.misses >= ideal.misses * 0.98
    assert 0.5 < found.used_share <= 1
    if most_moved == math.inf:
        # Nothing is wasted, so it is the memory without fragments.
        assert (found.misses, found.bytes_read) == (ideal.misses, ideal.bytes_read)
        assert found.moves > 0
    if most_moved == 0:
        assert found.moves == found.bytes_moved == 0 and found.misses > ideal.misses


def test_traces_follow_their_laws() -> None:
    for name in TRACES:
        first, second = (draw_trace(name, 500, 20_000, seed=1) for _ in range(2))
        assert first.tenants == second.tenants and len(first.sizes) == 500
        assert set(first.tenants) <= set(range(500))
    counts = np.sort(np.bincount(draw_trace("zipf_1", 500, 200_000, seed=1).tenants))[::-1]
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.1)
    uniform = np.bincount(draw_trace("uniform", 500, 200_000, seed=1).tenants)
    assert uniform.min() > 300 and uniform.max() < 500
    drifting = draw_trace("drifting_zipf_1", 500, 200_000, seed=1).tenants
    first, last = (np.bincount(part, minlength=500) for part in (drifting[:20_000], drifting[-20_000:]))
    assert len(set(np.argsort(first)[-20:]) & set(np.argsort(last)[-20:])) < 10
    scans = draw_trace("zipf_1_and_scans", 500, 20_000, seed=1).tenants
    assert all(scans[2000 + 2 * number] == number for number in range(500))


def test_a_line_is_found_through_times() -> None:
    cost = residency_line([1e4, 1e5, 1e6], [100e-6 + 1e-10 * size for size in (1e4, 1e5, 1e6)])
    assert cost.fixed_microseconds == pytest.approx(100) and cost.nanoseconds_per_byte == pytest.approx(0.1)
    assert cost.fixed_bytes == pytest.approx(1e6)
    assert cost.seconds(10, 10**6) == pytest.approx(1.1e-3)


def residency_line(sizes, seconds):
    from benchmarks.residency_costs import _line

    return _line(sizes, seconds)


def test_a_whole_run(tmp_path: Path) -> None:
    residency.main(["--quick", "--out", str(tmp_path / "residency.json")])
    (result,) = read_results(tmp_path)
    assert result.is_quick and json.loads((tmp_path / "residency.json").read_text())["name"] == "residency"
    for name, kind in itertools.product(TRACES, ("requests", "bytes")):
        curves = [curve for curve in result.curves if curve.figure == f"{name}-{kind}"]
        assert [curve.name for curve in curves] == list(residency.POLICIES)
        for curve in curves:
            assert all(0 < share <= 1 for share in curve.y) and curve.y[0] >= curve.y[-1]
        assert len({curve.y[-1] for curve in curves}) == 1, "with all in memory policies are alike"
    for figure in ("half_life", "fixed_cost"):
        curves = [curve for curve in result.curves if curve.figure == figure]
        assert [curve.name for curve in curves] == [name.replace("_", " ") for name in TRACES]
        assert all(min(curve.y) == 1 for curve in curves)
    text = render([result], tmp_path, relative_to=tmp_path)
    assert "residency-zipf_1-requests.svg" in text and "HMI, queue of 1,024" in text
