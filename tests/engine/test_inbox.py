"""The inbox: what it refuses at the door, and that it forgets nobody."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest

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
