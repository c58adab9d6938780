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


def test_pinned_tenants_take_nothing_of_what_they_leave(residency, infos, store):
    size = -(-infos[0].bytes // GRANULE) * GRANULE
    assert residency.batch_bytes == size
    for name in ("t0", "t1"):
        store.pin_tenant(name)
    assert residency.batch_bytes_of(infos[0]) == size, "it is not there: it needs room like any other"
    hold_each(residency, infos[:1])
    assert residency.batch_bytes_of(infos[0]) == 0 and residency.batch_bytes == size
    with residency.holding(infos[1:2]):
        pass
    assert [residency.batch_bytes_of(info) for info in infos] == [0, 0, size, size]
    assert residency.batch_bytes == 0


def test_one_that_is_pinned_while_it_is_in_use_is_counted_at_once(residency, infos, store):
    with residency.holding(infos[:2]):
        store.pin_tenant("t0")
        with residency.holding([]):  # looks at the catalog
            assert residency.batch_bytes_of(infos[0]) == 0 < residency.batch_bytes_of(infos[1])
            store.pin_tenant("t1")
        with residency.holding([]):
            assert residency.batch_bytes == 0


def test_room_of_the_unpinned_is_free_when_who_knew_them_as_pinned_is_done(residency, infos, store):
    """Such requests count nothing in their batch: with others in the free room they would not fit in all."""
    for name in ("t0", "t1"):
        store.pin_tenant(name)
    residency.load_pinned(store.tenants.pinned())
    (earlier,) = residency.expect([infos[:1]])
    assert residency.batch_bytes_of(infos[0]) == residency.batch_bytes == 0
    store.unpin_tenant("t0")
    hold_each(residency, infos[2:3])
    assert names_in(residency) == {"t1", "t2"}, "who is not pinned may leave, as before"
    (later,) = residency.expect([infos[:1]])
    assert residency.batch_bytes_of(infos[0]) > 0 == residency.batch_bytes
    residency.release(earlier)
    assert residency.batch_bytes == residency.batch_bytes_of(infos[0])
    store.pin_tenant("t0")
    hold_each(residency, infos[:1])
    store.unpin_tenant("t0")
    hold_each(residency, infos[:1])
    assert residency.batch_bytes == 0, "now it is the later request that may know it as pinned"
    residency.release(later)
    assert residency.batch_bytes == residency.batch_bytes_of(infos[0])
