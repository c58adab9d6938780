"""Pinned tenants while requests that came earlier wait: the catalog of now decides who stays."""

import pytest
from arena_accounts import GRANULE, names_in

from hmi_engine.errors import OverloadedError


@pytest.fixture
def infos(add_tenant):
    """Records of four equally large tenants, none of them pinned yet."""
    return [add_tenant(f"t{number}", 64, 0) for number in range(4)]


@pytest.fixture
def residency(open_residency, infos):
    """Memory for two of them."""
    return open_residency(2 * -(-infos[0].bytes // GRANULE))


def hold_each(residency, infos):
    for info in infos:
        with residency.holding([info]):
            pass


@pytest.mark.parametrize("is_there", [True, False])
def test_a_request_that_came_before_the_pin_does_not_unpin(residency, infos, store, is_there):
    if is_there:
        hold_each(residency, infos[:1])
    store.pin_tenant("t0")
    hold_each(residency, infos[:1])
    with residency.holding(infos[2:]) as (_, second):
        assert isinstance(second, OverloadedError)
    assert names_in(residency) == {"t0", "t2"}


@pytest.mark.parametrize("is_there", [True, False])
def test_a_request_that_came_before_the_unpinning_does_not_pin(residency, infos, store, is_there):
    store.pin_tenant("t0")
    pinned = store.tenants["t0"]
    if is_there:
        hold_each(residency, [pinned])
    store.unpin_tenant("t0")
    hold_each(residency, [pinned])
    with residency.holding(infos[2:]) as (first, second):
        assert (first.info, second.info) == tuple(infos[2:])
    assert names_in(residency) == {"t2", "t3"}
