"""What the mixed benchmark turns off, it turns on again."""

import pytest

from hmi_engine.models import linear

mixed = pytest.importorskip("benchmarks.mixed", reason="the peers' package needs numba (extra: bench)")


def test_plain_linear_is_undone() -> None:
    before = linear.has_packed_matmul
    with mixed.plain_linear():
        assert linear.has_packed_matmul() is False
    assert linear.has_packed_matmul is before
