"""The mixed benchmark refuses to time systems that do not do the same work."""

from collections.abc import Sequence

import pytest

from hmi_engine.demo.peers import ServedTenant
from hmi_engine.errors import HmiError, UnknownTenantError
from hmi_engine.request import Request, Response

mixed = pytest.importorskip("benchmarks.mixed", reason="the peers' package needs numba (extra: bench)")


class Oracle:
    """A peer that always answers the same probability."""

    description = ""

    def __init__(self, name: str, probability: float, error: HmiError | None = None) -> None:
        self.name, self._probability, self._error = name, probability, error

    def prepare(self, tenants: Sequence[ServedTenant]) -> None:
        """Needs nothing."""

    def run(self, requests: Sequence[Request]) -> list[Response]:
        if self._error is not None:
            return [Response.failed(request, self._error) for request in requests]
        scores = {"no": 1 - self._probability, "yes": self._probability}
        return [Response(request.tenant, "classification", "yes", scores) for request in requests]

    def close(self) -> None:
        """Holds nothing."""


REQUESTS = [Request("tenant", "text")]


def test_equal_systems_pass() -> None:
    mixed.check_same_work(Oracle("ours", 0.7), Oracle("theirs", 0.7004), REQUESTS)


def test_different_systems_are_refused() -> None:
    with pytest.raises(HmiError, match=r"ours and theirs differ by 1\.0e-02 on tenant tenant"):
        mixed.check_same_work(Oracle("ours", 0.71), Oracle("theirs", 0.7), REQUESTS)


def test_a_failed_request_is_not_compared() -> None:
    with pytest.raises(UnknownTenantError):
        mixed.check_same_work(Oracle("ours", 0, UnknownTenantError("who")), Oracle("theirs", 0.7), REQUESTS)


def test_plain_linear_is_undone() -> None:
    from hmi_engine.models import linear

    before = linear.has_packed_matmul
    with mixed.plain_linear():
        assert linear.has_packed_matmul() is False
    assert linear.has_packed_matmul is before
