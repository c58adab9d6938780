"""The benchmark of many tenants: its traffic follows the law that it names, and it runs to a result."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

REASON = "the benchmark needs the extra: bench"
pytest.importorskip("psutil", reason=REASON)
tenants = pytest.importorskip("benchmarks.tenants", reason=REASON)
read_results = pytest.importorskip("benchmarks.result", reason=REASON).read_results
tenant_fleet = pytest.importorskip("benchmarks.tenant_fleet", reason=REASON)


def asked(exponent: float) -> Counter[str]:
    traffic = tenant_fleet.Traffic(100, exponent)
    return Counter(name for name, _ in tenant_fleet.draw_requests(traffic, ["a", "b"], 20_000, 3))


def test_traffic_follows_its_law() -> None:
    uniform = asked(0.0)
    assert len(uniform) == 100
    assert 150 < min(uniform.values()) <= max(uniform.values()) < 260  # 200 expected, deviation 14
    zipf = [count for _, count in asked(1.0).most_common()]
    harmonic = sum(1 / rank for rank in range(1, 101))
    assert zipf[0] == pytest.approx(20_000 / harmonic, rel=0.1)
    assert zipf[9] == pytest.approx(20_000 / harmonic / 10, rel=0.2)


def test_every_law_has_the_same_favourites_and_every_seed_other_requests() -> None:
    traffic = tenant_fleet.Traffic(50, 1.0)
    first, second = (tenant_fleet.draw_requests(traffic, ["a"], 5_000, seed) for seed in (1, 2))
    assert first != second
    assert Counter(first).most_common(1)[0][0] == Counter(second).most_common(1)[0][0]


@pytest.mark.slow
def test_the_quick_benchmark_runs(tmp_path: Path) -> None:
    """Engines in processes of their own load real weights: a minute."""
    out = tmp_path / "results" / "tenants.json"
    tenants.main(["--quick", "--out", str(out)])
    [result] = read_results(out.parent)
    cases = [case.name for case in result.cases]
    assert cases[0] == "40 tenants, Zipf(1)"
    assert cases[-1] == "growth to 40 tenants"
    rows = {row[0]: row for row in result.tables[0].rows}
    miss_ratio = result.tables[0].columns.index("miss ratio, %")
    assert rows["40 tenants, Zipf(1): all in memory"][miss_ratio] == 0
    assert rows["40 tenants, uniform: 5 % in memory"][miss_ratio] > 0
