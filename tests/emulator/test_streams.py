"""The emulated streams: they keep CUDA's promises, and none that CUDA does not make."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.device_streams import (
    SCHEDULES,
    Device,
    Schedule,
    assert_right_under_all_schedules,
    assert_wrong_under_some_schedule,
    emulated_device,
)
from hmi_kernels.copies import CopyEvent, copy_batch_async
from hmi_kernels.errors import CudaError
from hmi_kernels.pinned_pool import PinnedPool

LATEST = Schedule("latest")


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    with emulated_device(), PinnedPool(1 << 20) as opened:
        yield opened


# ---- Order ----

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["work", "record", "wait"]), st.integers(0, 2), st.integers(0, 2)), max_size=25
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, schedule=st.sampled_from(SCHEDULES))
def test_work_runs_once_and_after_what_it_depends_on(
    actions: list[tuple[str, int, int]], schedule: Schedule
) -> None:
    ran: list[int] = []
    # What must have run before the next work of each stream, and what each event stands for.
    before: list[set[int]] = [set(), set(), set()]
    recorded: list[set[int]] = [set(), set(), set()]
    required: dict[int, set[int]] = {}
    with emulated_device(schedule) as device:
        streams, events = [device.stream() for _ in range(3)], [CopyEvent() for _ in range(3)]
        for number, (action, stream, event) in enumerate(actions):
            if action == "work":
                device.submit(streams[stream], lambda number=number: ran.append(number))
                required[number] = set(before[stream])
                before[stream].add(number)
            elif action == "record":
                events[event].record(streams[stream])
                recorded[event] = set(before[stream])
            else:
                events[event].wait(streams[stream])
                before[stream] |= recorded[event]
    assert sorted(ran) == sorted(required)
    for number, earlier in required.items():
        assert earlier <= set(ran[: ran.index(number)])


def order_of_two(schedule: Schedule) -> list[str]:
    ran: list[str] = []
    with emulated_device(schedule) as device:
        first, second = device.stream(), device.stream()
        device.submit(first, lambda: ran.append("first"))
        device.submit(second, lambda: ran.append("second"))
        device.synchronize(second)
    return ran


def test_streams_that_nobody_orders_run_in_any_order() -> None:
    orders = {tuple(order_of_two(schedule)) for schedule in SCHEDULES}
    assert orders == {("first", "second"), ("second", "first")}
    assert order_of_two(LATEST) == ["second", "first"]


def test_nothing_runs_before_somebody_waits() -> None:
    ran: list[str] = []
    with emulated_device(LATEST) as device:
        stream = device.stream()
        for name in "ab":
            device.submit(stream, lambda name=name: ran.append(name))
        event = CopyEvent()
        event.record(stream)
        assert ran == []
        asked = 0
        while not event.query():
            asked += 1
        # One piece of work ran for each answer of no: the two, and the record.
        assert ran == ["a", "b"] and asked == 3


@pytest.mark.parametrize("is_blocking", [True, False])
def test_legacy_default_stream_is_ordered_with_blocking_streams_only(is_blocking: bool) -> None:
    ran: list[str] = []
    with emulated_device(LATEST) as device:
        stream = device.stream(is_blocking=is_blocking)
        device.submit(stream, lambda: ran.append("before"))
        device.submit(0, lambda: ran.append("default"))
        device.submit(stream, lambda: ran.append("after"))
        device.synchronize(0)
        assert ran == (["before", "default"] if is_blocking else ["default"])
        device.synchronize(stream)
    assert ran == (["before", "default", "after"] if is_blocking else ["default", "before", "after"])


def test_an_event_stands_for_what_was_recorded_when_the_wait_was_submitted() -> None:
    ran: list[str] = []
    with emulated_device(LATEST) as device:
        first, second = device.stream(), device.stream()
        event = device.module.Event()
        device.submit(first, lambda: ran.append("early"))
        event.record(first)
        event.wait(second)
        device.submit(first, lambda: ran.append("late"))
        event.record(first)
        device.submit(second, lambda: ran.append("second"))
        device.synchronize(second)
        assert ran == ["early", "second"]


def test_a_wait_for_an_unrecorded_event_is_counted() -> None:
    with emulated_device(LATEST) as device:
        before = device.num_waits_for_unrecorded_events
        device.module.emulator.wait_for_unrecorded_event(device.stream())
        assert device.num_waits_for_unrecorded_events == before + 1


def test_what_work_throws_comes_out_where_it_runs() -> None:
    def fail() -> None:
        raise KeyError("deliberate")

    ran: list[str] = []
    with emulated_device(LATEST) as device:
        stream = device.stream()
        device.submit(stream, fail)
        device.submit(stream, lambda: ran.append("next"))
        with pytest.raises(KeyError, match="deliberate"):
            device.synchronize(stream)
        device.synchronize(stream)
    assert ran == ["next"]


# ---- Copies, by kind of memory ----


def test_pinned_memory_is_read_when_the_copy_runs(pool: PinnedPool) -> None:
    with emulated_device(LATEST) as device:
        stream, target, source = device.stream(), device.empty([4]), pool.empty([4])
        source.fill_(1)
        copied = copy_batch_async([target], [source], stream=stream, method="loop")
        source.fill_(2)
        copied.synchronize()
        assert target.tolist() == [2] * 4


def test_pageable_memory_is_read_before_the_call_returns() -> None:
    with emulated_device(LATEST) as device:
        stream, target, source = device.stream(), device.empty([4]), torch.ones(4)
        copied = copy_batch_async([target], [source], stream=stream, method="loop")
        source.fill_(2)
        assert target.isnan().all()  # staged, not yet arrived
        copied.synchronize()
        assert target.tolist() == [1] * 4


def test_a_copy_to_pageable_memory_has_arrived_when_the_call_returns() -> None:
    with emulated_device(LATEST) as device:
        stream, source, target = device.stream(), device.empty([4]), torch.zeros(4)
        device.submit(stream, lambda: source.fill_(3))
        copy_batch_async([target], [source], stream=stream, method="loop")
        assert target.tolist() == [3] * 4


def test_a_copy_to_pinned_memory_arrives_when_it_runs(pool: PinnedPool) -> None:
    with emulated_device(LATEST) as device:
        stream, source, target = device.stream(), device.empty([4]), pool.empty([4]).fill_(0)
        source.fill_(3)
        copied = copy_batch_async([target], [source], stream=stream, method="loop")
        assert target.tolist() == [0] * 4
        copied.synchronize()
        assert target.tolist() == [3] * 4


def test_a_copy_beyond_an_allocation_is_refused(pool: PinnedPool) -> None:
    with emulated_device() as device:
        source, target = pool.empty([4]), device.empty([4])
        with pytest.raises(CudaError, match=r"cudaMemcpyAsync failed: cudaErrorInvalidValue \(1\)"):
            device.module.copy_batch([target.data_ptr()], [source.data_ptr()], [20], "loop", device.stream())


# ---- What a correct program never does ----


def test_freeing_memory_that_a_copy_still_reads_is_a_problem() -> None:
    with emulated_device(LATEST) as device:
        target, blocks = device.empty([4]), device.module.pinned_pool(4096)
        block = blocks.allocate(16)
        source = torch.frombuffer(block, dtype=torch.float32)
        # Beside copy_batch_async, which would keep the source.
        device.module.copy_batch([target.data_ptr()], [source.data_ptr()], [16], "loop", device.stream())
        del block, source
        blocks.close()
        assert device.take_problems() == ["cudaFreeHost of memory that a queued copy still reads or writes"]


def test_use_of_a_destroyed_stream_is_refused() -> None:
    with emulated_device(LATEST) as device:
        ran: list[int] = []
        stream = device.stream()
        device.submit(stream, lambda: ran.append(1))
        device.destroy(stream)
        with pytest.raises(RuntimeError, match="does not exist"):
            device.submit(stream, lambda: ran.append(2))
        with pytest.raises(CudaError, match="cudaStreamGetDevice failed: cudaErrorInvalidResourceHandle"):
            copy_batch_async([device.empty([1])], [torch.ones(1)], stream=stream)
        assert device.take_problems() == ["a destroyed stream was used"] * 2
    assert ran == [1]  # what was submitted before still runs


def test_an_untaken_problem_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="a destroyed stream was used"), emulated_device() as device:
        stream = device.stream()
        device.destroy(stream)
        with pytest.raises(RuntimeError):
            device.synchronize(stream)


# ---- Captures ----


def test_a_captured_stream_runs_when_its_graph_is_launched(pool: PinnedPool) -> None:
    with emulated_device(LATEST) as device:
        stream, target, source = device.stream(), device.empty([4]), pool.empty([4])
        total = torch.zeros(4)
        with device.captured(stream) as graphs:
            copy_batch_async([target], [source], stream=stream)
            device.submit(stream, lambda: total.add_(target))
        for value in (1, 2):
            source.fill_(value)
            device.launch(graphs[0], stream)
            device.synchronize(stream)
        assert total.tolist() == [3] * 4


def test_waiting_for_the_device_spoils_a_capture() -> None:
    with emulated_device() as device:
        stream, other = device.stream(), device.stream()
        with (
            pytest.raises(RuntimeError, match="CaptureInvalidated"),
            device.captured(stream),
            pytest.raises(RuntimeError, match="cudaErrorStreamCaptureUnsupported"),
        ):
            device.synchronize(other)


def test_a_stream_that_waits_for_captured_work_is_captured_too() -> None:
    ran: list[str] = []
    with emulated_device() as device:
        origin, side = device.stream(), device.stream()
        fork, join = CopyEvent(), CopyEvent()
        with device.captured(origin) as graphs:
            fork.record(origin)
            fork.wait(side)
            device.submit(side, lambda: ran.append("side"))
            join.record(side)
            join.wait(origin)
            device.submit(origin, lambda: ran.append("origin"))
        assert ran == []
        device.launch(graphs[0], origin)
        device.synchronize(origin)
    assert ran == ["side", "origin"]


# ---- Programs with mistakes are caught ----

LAYERS = 3


def pipeline(
    device: Device,
    *,
    waits_for_copies: bool = True,
    waits_for_compute: bool = True,
    recycles_early: bool = False,
) -> None:
    """Two batches of layers through one set of device slots: copy on one stream, compute on another."""
    copy, compute = device.stream(), device.stream()
    slots = [device.empty([8]) for _ in range(LAYERS)]
    results = torch.zeros(2, LAYERS)
    with PinnedPool(1 << 20) as pool:
        used = CopyEvent()
        staging = pool.empty([8])
        for batch in range(2):
            if waits_for_compute:
                used.wait(copy)
            for layer, slot in enumerate(slots):
                source = staging if recycles_early else pool.empty([8])
                source.fill_(10 * batch + layer)
                copied = copy_batch_async([slot], [source], stream=copy)
                if waits_for_copies:
                    copied.wait(compute)
                device.submit(compute, consume(results[batch], layer, slot))
            used.record(compute)
        device.synchronize(copy)
        device.synchronize(compute)
        assert results.tolist() == [
            [80.0 * batch + 8 * layer for layer in range(LAYERS)] for batch in range(2)
        ]


def consume(results: torch.Tensor, layer: int, slot: torch.Tensor) -> Callable[[], None]:
    def kernel() -> None:
        results[layer] = slot.sum()

    return kernel


def test_a_pipeline_with_all_its_events_is_right() -> None:
    assert_right_under_all_schedules(pipeline)


@pytest.mark.parametrize(
    "mistake",
    [{"waits_for_copies": False}, {"waits_for_compute": False}, {"recycles_early": True}],
    ids=[
        "compute does not wait for copies",
        "copies do not wait for compute",
        "staging used again too early",
    ],
)
def test_a_pipeline_with_a_mistake_is_caught(mistake: dict[str, bool]) -> None:
    assert_wrong_under_some_schedule(lambda device: pipeline(device, **mistake))
