"""The heap against sorting."""

import gc
import weakref

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hmi_engine.lazy_heap import LazyHeap

KEYS = st.integers(0, 9)
ORDERS = st.integers(-3, 3).map(float)


class HeapMachine(RuleBasedStateMachine):
    """A dictionary of orders, in the sequence of the last ``put``, sorted anew each time, stably."""

    def __init__(self):
        super().__init__()
        self.heap = LazyHeap()
        self.orders = {}

    def in_order(self):
        return sorted(self.orders, key=self.orders.__getitem__)

    @rule(key=KEYS, order=ORDERS)
    def put(self, key, order):
        self.orders.pop(key, None)
        self.orders[key] = order
        self.heap.put(key, order)

    @rule(key=KEYS, orders=st.lists(ORDERS, min_size=50, max_size=100))
    def put_often(self, key, orders):
        for order in orders:
            self.put(key, order)

    @rule(key=KEYS)
    def remove(self, key):
        self.orders.pop(key, None)
        self.heap.remove(key)

    @rule()
    def pop(self):
        expected = self.in_order()[0] if self.orders else None
        assert self.heap.pop() == expected
        self.orders.pop(expected, None)

    @rule(limit=st.integers(0, 12))
    def look_at_several(self, limit):
        assert self.heap.smallest(limit) == self.in_order()[:limit]

    @invariant()
    def holds_the_same(self):
        assert len(self.heap) == len(self.orders)
        assert [key in self.heap for key in range(10)] == [key in self.orders for key in range(10)]
        assert self.heap.first() == (self.in_order()[0] if self.orders else None)


TestHeapMachine = HeapMachine.TestCase


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=200))
def test_orders_may_be_tuples(entries):
    heap = LazyHeap()
    for number, order in enumerate(entries):
        heap.put(number, order)
    popped = [heap.pop() for _ in entries]
    assert popped == sorted(range(len(entries)), key=entries.__getitem__)


def test_a_removed_key_is_free_at_once():
    class Key:
        pass

    heap, key = LazyHeap(), Key()
    heap.put(key, 1.0)
    watched = weakref.ref(key)
    heap.remove(key)
    del key
    gc.collect()
    assert watched() is None
