"""The inbox: what it refuses at the door, and that it forgets nobody."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmi_engine as hmi
from hmi_engine.errors import EngineClosedError, InvalidRequestError
from hmi_engine.inbox import Inbox, answer

REQUEST = hmi.Request("a", "text")


@pytest.fixture
def inbox():
    return Inbox(threading.Lock(), max_requests=100, num_queued=lambda: 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"priority": "high"}, "priority must be an integer, found 'high'"),
        ({"priority": math.nan}, "priority must be an integer, found nan"),
        ({"priority": None}, "priority must be an integer, found None"),
        ({"timeout": math.nan}, "timeout must be a number of seconds.*found nan"),
        ({"timeout": "5"}, "timeout must be a number of seconds.*found '5'"),
        ({"timeout": 1j}, "timeout must be a number of seconds"),
        ({"request": "text"}, "must be a Request, found str"),
    ],
)
def test_what_no_thread_could_read_is_refused_and_leaves_nothing(inbox, given, said):
    with pytest.raises(InvalidRequestError, match=said):
        inbox.put(**({"request": REQUEST, "priority": 0, "timeout": None} | given))
    assert not len(inbox)
    inbox.wait_until_empty()


def test_a_time_of_any_size_is_a_deadline(inbox):
    start = time.perf_counter()
    for timeout in (None, 5, -1, -(10**400), 10**400, math.inf, -math.inf, np.float32(2.5)):
        inbox.put(REQUEST, priority=10**400, timeout=timeout)
    end = time.perf_counter()
    never, five, *past, large, infinite, below, single = (each.deadline for each in inbox.take())
    assert never is None
    assert start + 5 <= five <= end + 5 and start + 2.5 <= single <= end + 2.5
    assert all(start <= deadline <= end for deadline in (*past, below))
    assert min(large, infinite) > 1e29


@given(
    tenants=st.lists(st.sampled_from("abc"), max_size=30),
    most=st.lists(st.one_of(st.none(), st.integers(1, 9)), min_size=30, max_size=30),
)
def test_tenants_take_turns_and_each_of_them_stays_in_order(tenants, most):
    inbox = Inbox(threading.Lock(), max_requests=100, num_queued=lambda: 0)
    for number, tenant in enumerate(tenants):
        inbox.put(hmi.Request(tenant, "text", id=number), priority=0, timeout=None)
    waiting = {tenant: [i for i, other in enumerate(tenants) if other == tenant] for tenant in tenants}
    turns = list(waiting)  # by their first requests
    for each in most:
        expected = []
        while turns and len(expected) != each:
            tenant = turns.pop(0)
            expected.append(waiting[tenant].pop(0))
            if waiting[tenant]:
                turns.append(tenant)
        assert [arrival.request.id for arrival in inbox.take(each)] == expected
        assert len(inbox) == sum(map(len, waiting.values()))


def test_a_flood_of_one_tenant_does_not_keep_a_newcomer_from_the_fair_queue(inbox):
    for _ in range(90):
        inbox.put(hmi.Request("flood", "text"), priority=0, timeout=None)
    inbox.put(hmi.Request("newcomer", "text"), priority=0, timeout=None)
    assert [arrival.request.tenant for arrival in inbox.take(3)] == ["flood", "newcomer", "flood"]


def test_what_is_no_name_waits_with_the_others(inbox):
    for tenant in (["a", "list"], None, {}, "a"):
        inbox.put(hmi.Request(tenant, "text"), priority=0, timeout=None)
    assert len(inbox) == len(inbox.take()) == 4


def test_whoever_was_taken_and_never_answered_is_failed_with_the_rest(inbox):
    futures = [inbox.put(REQUEST, priority=0, timeout=None) for _ in range(5)]
    answered, cancelled, *_ = inbox.take(4)
    response = hmi.Response("a", "classification")
    answer(answered.future, response)
    assert cancelled.future.cancel()
    inbox.abandon(EngineClosedError("over"))
    inbox.wait_until_empty()
    assert futures[0].result() is response and futures[1].cancelled()
    for future in futures[2:]:
        with pytest.raises(EngineClosedError, match="over"):
            future.result()
    with pytest.raises(EngineClosedError):
        inbox.put(REQUEST, priority=0, timeout=None)
