"""Every batch is prepared, then computed or discarded, once, in order, never more at a time than allowed."""

import itertools
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmi_engine.pipeline.flow import Flow


class Recorded:
    """Stages that note what happens, and check that it may."""

    is_asynchronous = False

    def __init__(self, delays=(), fail_prepare=None, fail_compute=None):
        self.prepared, self.computed, self.discarded, self.threads = [], [], [], set()
        self.fail_prepare, self.fail_compute = fail_prepare, fail_compute
        self.delays = itertools.cycle(delays or [0])
        self.lock = threading.Lock()
        self.in_flight = self.most_in_flight = 0

    def prepare(self, batch):
        time.sleep(next(self.delays))
        with self.lock:
            self.threads.add(threading.current_thread())
            self.prepared.append(batch)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if batch == self.fail_prepare:
            raise ZeroDivisionError(batch)
        return batch

    def compute(self, prepared):
        time.sleep(next(self.delays))
        assert prepared in self.prepared
        if prepared == self.fail_compute:
            raise ZeroDivisionError(prepared)
        with self.lock:
            self.in_flight -= 1
        self.computed.append(prepared)
        return lambda: prepared * 10

    def discard(self, prepared):
        if prepared not in self.computed:
            self.discarded.append(prepared)


class Numbers:
    """A source of 0 to ``count`` - 1 that has nothing every so often."""

    def __init__(self, count, pauses=()):
        self.numbers, self.pauses = iter(range(count)), itertools.cycle(pauses or [False])
        self.taken = 0

    def next_batch(self, *, wait):
        if not wait and next(self.pauses):
            return None
        number = next(self.numbers, None)
        self.taken += number is not None
        return number


def run(stages, source, depth, stop_after=None):
    flow = Flow(stages, depth=depth)
    results = flow.run(source)
    try:
        return list(itertools.islice(results, stop_after))
    finally:
        results.close()
        flow.close()


class OnDevice(Recorded):
    """Stages whose device computes beside the host: what a batch holds, it holds until its result is."""

    is_asynchronous = True

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.events = []

    def compute(self, prepared):
        time.sleep(next(self.delays))
        if prepared == self.fail_compute:
            raise ZeroDivisionError(prepared)
        self.events.append(("launch", prepared))

        def result():
            time.sleep(next(self.delays))
            with self.lock:
                self.in_flight -= 1
            self.events.append(("finish", prepared))
            self.computed.append(prepared)
            return prepared * 10

        return result


delays = st.lists(st.floats(0, 0.002), max_size=5)


kinds = st.sampled_from([Recorded, OnDevice])


@given(kinds, st.integers(0, 12), st.integers(1, 5), delays, st.lists(st.booleans(), max_size=4))
def test_results_in_order_whatever_the_depth_and_the_timing(kind, count, depth, delays, pauses):
    stages = kind(delays)
    assert run(stages, Numbers(count, pauses), depth) == [10 * number for number in range(count)]
    assert stages.prepared == stages.computed == list(range(count)) and not stages.discarded
    assert stages.most_in_flight <= depth


@given(kinds, st.integers(1, 12), st.integers(1, 5), delays, st.integers(0, 12))
def test_who_stops_early_leaves_nothing_in_flight(kind, count, depth, delays, stop_after):
    stages, source = kind(delays), Numbers(count)
    results = run(stages, source, depth, stop_after)
    assert results == [10 * number for number in range(min(count, stop_after))]
    assert sorted(stages.computed + stages.discarded) == stages.prepared
    assert source.taken <= stop_after + depth


@given(kinds, st.integers(1, 5), st.integers(0, 6), st.booleans(), delays)
def test_an_error_ends_the_flow_and_nothing_stays_held(kind, depth, failing, in_prepare, delays):
    stages = kind(
        delays, fail_prepare=failing if in_prepare else None, fail_compute=None if in_prepare else failing
    )
    with pytest.raises(ZeroDivisionError):
        run(stages, Numbers(7), depth)
    assert stages.computed == list(range(failing))
    held = set(stages.prepared) - set(stages.computed) - set(stages.discarded)
    assert held <= ({failing} if in_prepare else set()), "what prepare raised for holds nothing"


def test_the_next_batch_is_prepared_while_one_is_computed():
    """Compute of each batch ends only when the next has been prepared: one thread alone would never end."""
    ready = [threading.Event() for _ in range(6)]

    class Meeting(Recorded):
        def prepare(self, batch):
            ready[batch].set()
            return super().prepare(batch)

        def compute(self, prepared):
            assert prepared == 5 or ready[prepared + 1].wait(30)
            return super().compute(prepared)

    assert run(Meeting(), Numbers(6), 2) == [0, 10, 20, 30, 40, 50]


def test_a_device_gets_the_next_batch_before_the_host_waits_for_results():
    """If it is prepared, as it is with three in flight: two for the device, one on its way to it."""

    class Meeting(OnDevice):
        def compute(self, prepared):
            flow._thread().submit(int).result(30)  # what was to be prepared before is
            return super().compute(prepared)

    stages = Meeting()
    flow = Flow(stages, depth=3)
    assert list(flow.run(Numbers(6))) == [0, 10, 20, 30, 40, 50]
    flow.close()
    for number in range(5):
        assert stages.events.index(("launch", number + 1)) < stages.events.index(("finish", number))


def test_a_single_batch_needs_no_thread():
    stages = Recorded()
    run(stages, Numbers(1), 4)
    assert stages.threads == {threading.current_thread()}


def test_preparing_takes_one_core_and_changes_nothing_for_others():
    seen = []

    class Looking(Recorded):
        def prepare(self, batch):
            seen.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
            return super().prepare(batch)

    before = torch.get_num_threads()
    run(Looking(), Numbers(3), 2)
    assert {threads for is_main, threads in seen if not is_main} == {1}
    assert torch.get_num_threads() == before
    others = []
    thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert others == [before]


def test_looking_ahead_is_done_when_nothing_else_is_to_prepare():
    """On the preparing thread, after the batches that are there, once at a time."""
    happened = []

    class Noting(Recorded):
        def prepare(self, batch):
            happened.append(("prepare", batch, threading.current_thread()))
            return super().prepare(batch)

    stages = Noting()
    looked = threading.Event()

    def look_ahead():
        happened.append(("ahead", len(stages.prepared), threading.current_thread()))
        looked.set()

    flow = Flow(stages, depth=3, look_ahead=look_ahead)
    for _ in flow.run(Numbers(5)):
        assert looked.wait(30)
    flow.close()
    first = next(index for index, (what, _, _) in enumerate(happened) if what == "ahead")
    assert happened[first][1] == 3, "the three in flight come first"
    assert happened[first][2] is not threading.main_thread()


def test_depth_must_be_positive():
    with pytest.raises(ValueError, match="pipeline_depth"):
        Flow(Recorded(), depth=0)
